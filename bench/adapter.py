"""The bottleneck adapter, for every benchmark: cases, providers, what is right, what is asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.method import (
    BOTH,
    COMPILED,
    CPU,
    DIRECTIONS,
    DRY,
    FORWARD,
    GPU,
    HOST,
    MAIN,
    MEMORY,
    OURS,
    SHORT,
    Case,
    Expected,
    Forward,
    Method,
    Provider,
    Target,
    packaged,
    results,
    roofline,
    speed_up,
)
from bench.roofline import Work
from peft_kernels import adapter
from peft_kernels.core.rng import dropout_mask

# Of eager's sums: where all errors come of a handful of sums, a few orders say little.
OTHER_ORDERS, OTHER_ORDERS_OF_SMALL, SMALL = 4, 24, 1 << 13
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class AdapterCase(Case):
    """One adapter: x [tokens, features] through a bottleneck and back, residual x.

    Attributes:
        name: as in ``Case``, like suite and reported.
        dtype: of every tensor.
        bottleneck: r.
        activation: "relu" or "gelu".
        dropout_p: drop probability of the branch.
    """

    op: ClassVar[str] = "adapter"
    name: str
    suite: str
    tokens: int
    features: int
    bottleneck: int = 64
    activation: str = "relu"
    dropout_p: float = 0.0
    dtype: str = "bfloat16"
    reported: bool = False


def _case(
    suite: str, tokens: int, features: int, bottleneck: int, activation: str, p: float, dtype: str,
    reported: bool = False,
) -> AdapterCase:  # fmt: skip
    place = {HOST: "host ", MEMORY: "saved ", DRY: "dry "}.get(suite, "")
    name = (
        f"{place}adapter {tokens}x{features} r{bottleneck} {activation} {SHORT[dtype]} "
        f"p{p:g}".removesuffix(" p0")
    )
    return AdapterCase(name, suite, tokens, features, bottleneck, activation, p, dtype, reported)


_KINDS = (("relu", 0.0), ("gelu", 0.0), ("relu", 0.1))
_GPU_GRID = tuple(
    (features, bottleneck, p)
    for features in (768, 1024, 2048, 4096, 8192)
    for bottleneck in (16, 48, 64, 128)
    for p in (0.0, 0.1)
)
_REPORTED = {
    (768, 16, 0.0), (768, 64, 0.0), (2048, 64, 0.0), (2048, 64, 0.1), (4096, 64, 0.0),
    (4096, 128, 0.0), (8192, 16, 0.0), (8192, 128, 0.0),
}  # fmt: skip
CASES = (
    *(
        _case(CPU, 4096, features, 64, activation, p, dtype)
        for features in (768, 2048, 4096)
        for dtype in ("bfloat16", "float32")
        for activation, p in (_KINDS if features == 2048 else _KINDS[:1])
    ),
    _case(HOST, 1, 64, 8, "relu", 0.0, "float32"),
    *(
        _case(MEMORY, 4096, 2048, 128, activation, p, "bfloat16")
        for activation, p in (("relu", 0.0), ("gelu", 0.0), ("gelu", 0.1))
    ),
    *(
        _case(GPU, 16384, d, r, "relu", p, "bfloat16", (d, r, p) in _REPORTED)
        for d, r, p in _GPU_GRID
    ),
    # float32, because Triton's interpreter computes bfloat16 wrongly.
    _case(DRY, 40, 48, 8, "relu", 0.0, "float32", True),
    _case(DRY, 33, 40, 5, "gelu", 0.1, "float32", True),
)


def quick(case: AdapterCase) -> AdapterCase:
    """Return ``case`` cut to a size that proves the code runs and measures nothing."""
    return replace(
        case,
        name=f"quick {case.name}",
        tokens=min(case.tokens, 24),
        features=min(case.features, 40),
        bottleneck=min(case.bottleneck, 8),
    )


def input_bytes(case: AdapterCase) -> int:
    """Return the bytes of x."""
    return case.tokens * case.features * case.torch_dtype.itemsize


@dataclass(frozen=True)
class AdapterProblem:
    """The tensors of one case; x and all four parameters require gradients."""

    case: AdapterCase
    tensors: tuple[Tensor, ...]  # x [M, D], down [r, D], up [D, r], down_bias [r], up_bias [D]
    dy: Tensor  # [M, D]
    seed: Tensor  # int64 [1]
    scale: float = 1.0

    @property
    def alive(self) -> tuple[Tensor, ...]:
        """x, which the layer before or after holds, and the parameters."""
        return self.tensors

    def leaves(self, frozen: bool) -> dict[str, Tensor]:
        """Return what gradients are taken of."""
        names = ("x", "down", "up", "down_bias", "up_bias")
        return dict(zip(names, self.tensors, strict=True))

    def keep_mask(self) -> Tensor | None:
        """Return the dropout mask that ``seed`` stands for, bool [M, D]; None without dropout."""
        if self.case.dropout_p == 0.0:
            return None
        tokens, features = self.dy.shape
        return dropout_mask(self.seed, tokens, features, self.case.dropout_p)


def make_problem(case: AdapterCase, device: str | torch.device, seed: int = 0) -> AdapterProblem:
    """Return the tensors of ``case``, the same ones for the same seed; y is of order one."""
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens, features, bottleneck = case.tokens, case.features, case.bottleneck

    def random(*shape: int, fan: int = 1) -> Tensor:
        value = torch.randn(*shape, device=device, generator=generator) / math.sqrt(fan)
        return value.to(case.torch_dtype).requires_grad_()

    return AdapterProblem(
        case,
        (
            random(tokens, features),
            random(bottleneck, features, fan=features),
            random(features, bottleneck, fan=bottleneck),
            random(bottleneck),
            random(features),
        ),
        dy=random(tokens, features).detach(),
        seed=torch.randint(2**62, (1,), device=device, generator=generator),
    )


def eager_adapter(
    x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor, up_bias: Tensor, activation: str,
    scale: float, p: float, keep: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return y as one writes it in PyTorch; dropout by ``keep``, or freshly drawn."""
    hidden = ACTIVATIONS[activation](F.linear(x, down, down_bias))
    branch = F.linear(hidden, up, up_bias)
    if p:
        branch = F.dropout(branch, p) if keep is None else branch * keep / (1.0 - p)
    return x + branch * scale if scale != 1.0 else x + branch


def _call(function: Callable[..., Tensor], given: AdapterProblem, keep: Tensor | None) -> Forward:
    case = given.case
    return lambda: function(*given.tensors, case.activation, given.scale, case.dropout_p, keep)


def _eager(problem: AdapterProblem, keep: Tensor | None) -> Forward:
    return _call(eager_adapter, problem, keep)


def _compiled(problem: AdapterProblem, keep: Tensor | None) -> Forward:
    # Compiled graphs of other shapes count towards dynamo's limit of recompilations.
    torch._dynamo.reset()
    return _call(torch.compile(eager_adapter, dynamic=False), problem, keep)


def fused(backend: str | None = None) -> Provider:
    """Return the provider of ``adapter`` on a backend (None: the best)."""

    def arguments(
        problem: AdapterProblem, keep: Tensor | None
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        case = problem.case
        return problem.tensors, {
            "activation": case.activation, "scale": problem.scale, "dropout_p": case.dropout_p,
            "seed": None if keep is None else problem.seed,
        }  # fmt: skip

    return packaged(adapter, arguments, backend)


EAGER = Provider("eager", _eager)
FUSED = fused()


def _reordered(problem: AdapterProblem, keep: Tensor | None, order: int) -> dict[str, Tensor]:
    """Return eager's results, all sums added in another order: one order alone is luck."""
    generator = torch.Generator().manual_seed(order)
    case = problem.case
    tokens, inner, low = (
        torch.randperm(size, generator=generator).to(problem.dy.device)
        for size in (case.tokens, case.features, case.bottleneck)
    )
    places = ((tokens, inner), (low, inner), (inner, low), (low,), (inner,))

    def ordered(value: Tensor, place: tuple[Tensor, ...], back: bool = False) -> Tensor:
        for dim, index in enumerate(place):
            value = value.index_select(dim, index.argsort() if back else index)
        return value

    tensors = tuple(
        ordered(value.detach(), place).requires_grad_()
        for value, place in zip(problem.tensors, places, strict=True)
    )
    given = replace(problem, tensors=tensors, dy=ordered(problem.dy, places[0]))
    mask = None if keep is None else ordered(keep, places[0])
    found = results(_eager(given, mask)(), given.dy, given.leaves(False))
    return {
        name: ordered(value, place, back=True)
        for (name, value), place in zip(found.items(), (places[0], *places), strict=True)
    }


def expected(problem: AdapterProblem, keep: Tensor | None, frozen: bool) -> Expected:
    """Return the results in float64, and in the case's dtype by several orders of the sums."""
    wide = replace(
        problem,
        tensors=tuple(each.detach().double().requires_grad_() for each in problem.tensors),
        dy=problem.dy.double(),
    )
    truth, eager = (
        results(_eager(each, keep)(), each.dy, each.leaves(False)) for each in (wide, problem)
    )
    orders = OTHER_ORDERS_OF_SMALL if problem.dy.numel() <= SMALL else OTHER_ORDERS
    return Expected(truth, [eager, *(_reordered(problem, keep, n) for n in range(orders))])


def work(case: AdapterCase, direction: str, provider: str = OURS) -> Work:
    """Return what must be done: x read and y written once; dy and x read, dx written once."""
    m, d, r = case.tokens, case.features, case.bottleneck
    parameters = 2 * r * d + r + d
    flops, elements = 4 * m * d * r, 2 * m * d + m * r + parameters
    if direction == BOTH:
        flops += 8 * m * d * r
        elements += 3 * m * d + m * r + 2 * parameters - d  # up_bias is not read
    return Work(flops, elements * case.torch_dtype.itemsize)


def saved_over_x(row: Any) -> float | None:
    """Return what lives for backward, x among it, as a multiple of x."""
    return None if row.saved_bytes is None else 1.0 + row.saved_bytes / input_bytes(row.case)


def _targets() -> tuple[Target, ...]:
    def chosen(features: tuple[int, ...], *dtypes: str) -> Callable[[AdapterCase], bool]:
        def choose(case: AdapterCase) -> bool:
            plain = case.activation == "relu" and case.dropout_p == 0.0
            return plain and case.features in features and case.dtype in dtypes

        return choose

    both = ("bfloat16", "float32")
    limits = (
        ("bf16 D 2048", FORWARD, 1.15, chosen((2048,), "bfloat16")),
        ("bf16 D 4096", FORWARD, 1.3, chosen((4096,), "bfloat16")),
        ("fp32 D 2048, 4096", FORWARD, 1.1, chosen((2048, 4096), "float32")),
        ("D 2048, 4096", BOTH, 1.1, chosen((2048, 4096), *both)),
        *(("D 768", each, 0.97, chosen((768,), *both)) for each in DIRECTIONS),
    )
    asked = [
        Target(f"cpu {kind}, {each}: eager / ours", limit, speed_up, CPU, each, cases, True)
        for kind, each, limit, cases in limits
    ]
    asked.append(
        Target("saved for backward, x included: x of x", 1.07, saved_over_x, MEMORY, FORWARD)
    )
    asked += [
        Target(f"gpu, {each}: eager / ours", limit, speed_up, GPU, each, at_least=True)
        for each, limit in ((FORWARD, 2.2), (BOTH, 1.8))
    ]
    asked.append(Target("gpu, forward: roofline", 0.85, roofline, GPU, FORWARD, at_least=True))
    return tuple(asked)


METHOD = Method(
    name=AdapterCase.op,
    case_type=AdapterCase,
    cases=CASES,
    quick=quick,
    make_problem=make_problem,
    expected=expected,
    providers=(EAGER, Provider(COMPILED, _compiled, poison=False), FUSED),
    work=work,
    targets=_targets(),
    seconds={CPU: 8.0, HOST: 4.0, GPU: 4.0},
    gpu={MAIN: (EAGER, replace(fused("triton"), name=OURS))},
    columns={"compile": "torch.compile", "fused": "peft_kernels"},
    title="adapter: tokens x features, bottleneck, activation, dtype, dropout",
    input_bytes=input_bytes,
)
