"""The bottleneck adapter, for every benchmark: providers, what is right, what is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.adapter.cases import (
    CASES,
    AdapterCase,
    AdapterProblem,
    input_bytes,
    make_problem,
    quick,
)
from bench.method import (
    BOTH,
    COMPILED,
    CPU,
    DIRECTIONS,
    FORWARD,
    GPU,
    HOST,
    MAIN,
    MEMORY,
    OURS,
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
from bench.third_party import adapters, usable
from peft_kernels import adapter

# Of eager's sums: where all errors come of a handful of sums, a few orders say little.
OTHER_ORDERS, OTHER_ORDERS_OF_SMALL, SMALL = 4, 24, 1 << 13
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


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


THIRD_PARTIES = usable(adapters.ADAPTER)
METHOD = Method(
    name=AdapterCase.op,
    case_type=AdapterCase,
    cases=CASES,
    quick=quick,
    make_problem=make_problem,
    expected=expected,
    providers=(EAGER, Provider(COMPILED, _compiled, poison=False), *THIRD_PARTIES, FUSED),
    work=work,
    targets=_targets(),
    seconds={CPU: 8.0, HOST: 4.0, GPU: 4.0},
    gpu={MAIN: (EAGER, *THIRD_PARTIES, replace(fused("triton"), name=OURS))},
    columns={"compile": "torch.compile", "fused": "peft_kernels"},
    title="adapter: tokens x features, bottleneck, activation, dtype, dropout",
    input_bytes=input_bytes,
)
