"""The bottleneck adapter, measured: cases, providers, the numerics gate, and a table.

``python -m bench.adapter`` prints a line per case and direction: least times of all providers in
turn, and eager's over the package's. ``pytest bench/test_adapter_benchmark.py --benchmark-only``
puts the same providers into pytest-benchmark's tables.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gate import FACTOR, results
from bench.measure import wall_times
from bench.memory import saved_bytes
from peft_kernels import adapter, explain
from peft_kernels.core.rng import dropout_mask

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
OTHER_ORDERS = 4
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class AdapterCase:
    """One adapter: x [tokens, features] through a bottleneck and back, residual x.

    Attributes:
        name: unique; what tables show.
        tokens: M.
        features: D.
        bottleneck: r.
        activation: "relu" or "gelu".
        dropout_p: drop probability of the branch.
        dtype: of every tensor, as torch spells it.
    """

    name: str
    tokens: int
    features: int
    bottleneck: int
    activation: str
    dropout_p: float
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


def _case(
    tokens: int, features: int, bottleneck: int, activation: str, p: float, dtype: str
) -> AdapterCase:
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    name = f"adapter {tokens}x{features} r{bottleneck} {activation} {short} p{p:g}"
    return AdapterCase(name, tokens, features, bottleneck, activation, p, dtype)


CPU_CASES = tuple(
    _case(4096, features, 64, activation, p, dtype)
    for features in (768, 2048, 4096)
    for dtype in ("bfloat16", "float32")
    for activation, p in (("relu", 0.0), ("gelu", 0.0), ("relu", 0.1))
)
GPU_CASES = tuple(
    _case(16384, features, bottleneck, "gelu", p, "bfloat16")
    for features in (768, 1024, 2048, 4096, 8192)
    for bottleneck in (16, 48, 64, 128)
    for p in (0.0, 0.1)
)
TINY_CASES = tuple(_case(24, 40, 8, "gelu", p, "float32") for p in (0.0, 0.1))


@dataclass(frozen=True)
class AdapterProblem:
    """The tensors of one case; x and all four parameters require gradients."""

    case: AdapterCase
    tensors: tuple[Tensor, ...]  # x [M, D], down [r, D], up [D, r], down_bias [r], up_bias [D]
    dy: Tensor  # [M, D]
    seed: Tensor  # int64 [1]
    scale: float = 1.0


def make_problem(case: AdapterCase, device: torch.device, seed: int = 0) -> AdapterProblem:
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


Forward = Callable[[AdapterProblem, Tensor | None], Callable[[], Tensor]]


def _eager(problem: AdapterProblem, keep: Tensor | None) -> Callable[[], Tensor]:
    each = problem.case
    return lambda: eager_adapter(
        *problem.tensors, each.activation, problem.scale, each.dropout_p, keep
    )


def _compiled(problem: AdapterProblem, keep: Tensor | None) -> Callable[[], Tensor]:
    torch._dynamo.reset()
    compiled, each = torch.compile(eager_adapter, dynamic=False), problem.case
    return lambda: compiled(*problem.tensors, each.activation, problem.scale, each.dropout_p, keep)


def _fused(problem: AdapterProblem, keep: Tensor | None) -> Callable[[], Tensor]:
    each, seed = problem.case, None if keep is None else problem.seed
    return lambda: adapter(
        *problem.tensors, activation=each.activation, scale=problem.scale,
        dropout_p=each.dropout_p, seed=seed,
    )  # fmt: skip


PROVIDERS: dict[str, Forward] = {"eager": _eager, "compile": _compiled, "fused": _fused}


def call_of(name: str, problem: AdapterProblem, direction: str) -> Callable[[], object]:
    """Return what is timed: forward, or that and all five gradients."""
    forward = PROVIDERS[name](problem, None)
    if direction == FORWARD:
        return forward
    return lambda: torch.autograd.grad(forward(), problem.tensors, problem.dy)


def failure(name: str, problem: AdapterProblem) -> str | None:
    """Return what is wrong with a provider's numbers by the 1.5x rule, or None.

    Every result is compared with float64, in the Frobenius norm and by the largest element.
    """
    case = problem.case
    keep = None
    if case.dropout_p:
        keep = dropout_mask(problem.seed, case.tokens, case.features, case.dropout_p)
    names = ("x", "down", "up", "down_bias", "up_bias")

    def run(call: Callable[[], Tensor], tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        dy = problem.dy.to(tensors[0].dtype)
        return results(call(), dy, dict(zip(names, tensors, strict=True)))

    def reordered(order: int) -> dict[str, Tensor]:
        """Return eager's results, all sums added in another order: one order alone is luck."""
        generator = torch.Generator().manual_seed(order)
        sizes = (case.tokens, case.features, case.bottleneck)
        tokens, inner, low = (
            torch.randperm(size, generator=generator).to(problem.dy.device) for size in sizes
        )
        places = ((tokens, inner), (low, inner), (inner, low), (low,), (inner,))

        def ordered(value: Tensor, place: tuple[Tensor, ...], back: bool = False) -> Tensor:
            for dim, index in enumerate(place):
                value = value.index_select(dim, index.argsort() if back else index)
            return value

        given = AdapterProblem(
            case,
            tuple(
                ordered(value.detach(), place).requires_grad_()
                for value, place in zip(problem.tensors, places, strict=True)
            ),
            ordered(problem.dy, places[0]), problem.seed, problem.scale,
        )  # fmt: skip
        mask = None if keep is None else ordered(keep, places[0])
        y = _eager(given, mask)()
        found = results(y, given.dy, dict(zip(names, given.tensors, strict=True)))
        return {
            key: ordered(value, place, back=True)
            for (key, value), place in zip(found.items(), (places[0], *places), strict=True)
        }

    wide = tuple(t.detach().double().requires_grad_() for t in problem.tensors)
    exact_call = _eager(AdapterProblem(case, wide, problem.dy, problem.seed, problem.scale), keep)
    exact = run(exact_call, wide)
    eager = [run(_eager(problem, keep), problem.tensors), *map(reordered, range(OTHER_ORDERS))]
    found = run(PROVIDERS[name](problem, keep), problem.tensors)
    unit = torch.finfo(case.torch_dtype).eps / 2
    wrong = []
    for key, truth in exact.items():
        for norm in (torch.linalg.vector_norm, lambda t: t.abs().max()):
            allowed = FACTOR * max(norm(each[key].double() - truth) for each in eager)
            allowed += unit * norm(truth)
            error = norm(found[key].double() - truth)
            if not error <= allowed:
                wrong.append(f"{key} error {error:.2e} (bound {allowed:.2e})")
    return "; ".join(wrong) or None


def main(argv: list[str]) -> int:
    """Print the table; 1 where a provider's numbers are wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.adapter", description=__doc__)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--seconds", type=float, default=4.0, help="per case (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    options = parser.parse_args(argv)
    cases = TINY_CASES if options.quick else CPU_CASES
    status = 0
    for case in cases:
        if options.only not in case.name:
            continue
        problem = make_problem(case, torch.device("cpu"))
        wrong = {name: failure(name, problem) for name in ("eager", "fused")}
        if any(wrong.values()):
            print(f"{case.name}: {wrong}")
            status = 1
            continue
        plan = explain(adapter, *problem.tensors, dropout_p=case.dropout_p).backend
        saved = {
            name: saved_bytes(PROVIDERS[name](problem, None), problem.tensors) for name in wrong
        }
        for direction in DIRECTIONS:
            calls = {name: call_of(name, problem, direction) for name in wrong}
            times = wall_times(calls, options.seconds / 2)
            eager, fused = times["eager"], times["fused"]
            print(
                f"{case.name:42} {direction:17} eager {eager.min_ms:8.2f} ms  {plan} "
                f"{fused.min_ms:8.2f} ms  {eager.min_ms / fused.min_ms:5.2f}x  saved beyond x, MiB "
                f"{saved['eager'] / 2**20:.2f} / {saved['fused'] / 2**20:.2f}",
                flush=True,
            )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
