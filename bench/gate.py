"""The numerics gate: a provider whose results are wrong prints no speed.

Every result (y and each gradient) is compared with float64. Its error may be at most 1.5 times that
of the eager form in the same dtype, plus one rounding unit; in the Frobenius norm, which sees a
systematic error, and in the largest element, which sees one wrong value among millions.
Uninitialised memory is filled with NaN meanwhile, so that an element nobody wrote shows.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.baselines import Provider, eager_lora, frozen_linear
from bench.problem import Problem

FACTOR = 1.5


@dataclass(frozen=True)
class Comparison:
    """One result against float64: relative errors, and what they may be at most."""

    tensor: str
    error: float
    error_bound: float
    worst: float
    worst_bound: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within their bounds; NaN is not."""
        return self.error <= self.error_bound and self.worst <= self.worst_bound


@dataclass(frozen=True)
class GateResult:
    """All comparisons of one provider."""

    comparisons: tuple[Comparison, ...]
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the provider may be timed."""
        return self.problem is None and all(each.passed for each in self.comparisons)

    def __str__(self) -> str:
        """Return what failed, or the largest share of a bound that was used."""
        if self.problem is not None:
            return self.problem
        failed = [each for each in self.comparisons if not each.passed]
        if failed:
            return "; ".join(
                f"{each.tensor} error {each.error:.2e} (bound {each.error_bound:.2e}), "
                f"largest {each.worst:.2e} (bound {each.worst_bound:.2e})"
                for each in failed
            )
        shares = (max(c.error / c.error_bound, c.worst / c.worst_bound) for c in self.comparisons)
        return f"passed, at most {max(shares):.0%} of the bound"


def results(y: Tensor, dy: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return y and the gradient of each named leaf."""
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))


def _errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    difference = value.double() - truth
    error = difference.norm() / truth.norm()
    worst = difference.abs().max() / truth.abs().max()
    return float(error), float(worst)


class Gate:
    """Float64 results and eager errors of one problem, against which providers are held."""

    def __init__(self, problem: Problem) -> None:
        """Remember the problem; its float64 results are computed when first asked for."""
        self.problem = problem
        self.keep = problem.keep_mask()
        self._truths: dict[bool, dict[str, tuple[Tensor, float, float]]] = {}

    def leaves(self, frozen: bool) -> dict[str, Tensor]:
        """Return the tensors whose gradients are compared: of a frozen layer, x alone."""
        each = self.problem
        return {"x": each.x} if frozen else {"x": each.x, "a": each.lora_a, "b": each.lora_b}

    def _formula(self, frozen: bool, double: bool) -> dict[str, Tensor]:
        each = self.problem

        def cast(value: Tensor) -> Tensor:
            return value.detach().double() if double else value.detach()

        leaves = {name: cast(t).requires_grad_() for name, t in self.leaves(frozen).items()}
        weight, bias = cast(each.weight), None if each.bias is None else cast(each.bias)
        if frozen:
            y = frozen_linear(leaves["x"], weight, bias)
        else:
            p = each.case.dropout_p
            a, b = leaves["a"], leaves["b"]
            y = eager_lora(leaves["x"], weight, bias, a, b, each.scale, p, self.keep)
        return results(y, cast(each.dy), leaves)

    def _truth(self, frozen: bool) -> dict[str, tuple[Tensor, float, float]]:
        """Return each result in float64 and its two bounds."""
        if frozen in self._truths:
            return self._truths[frozen]
        truth = self._formula(frozen, double=True)
        eager = self._formula(frozen, double=False)
        unit = torch.finfo(self.problem.case.torch_dtype).eps / 2
        bounds = {}
        for name, value in truth.items():
            error, worst = _errors(eager[name], value)
            bounds[name] = (value, FACTOR * error + unit, FACTOR * worst + unit)
        self._truths[frozen] = bounds
        return bounds

    def check(self, provider: Provider) -> GateResult:
        """Run ``provider`` forward and backward on the gate's dropout mask and compare."""
        truth = self._truth(provider.frozen)
        try:
            memory = poisoned_memory() if provider.poison else contextlib.nullcontext()
            with provider.around(), memory:
                y = provider.build(self.problem, self.keep)()
                found = results(y, self.problem.dy, self.leaves(provider.frozen))
        except Exception as raised:  # whatever a provider raises, the others still run
            return GateResult((), f"{type(raised).__name__}: {str(raised)[:300]}")
        comparisons = []
        for name, (value, error_bound, worst_bound) in truth.items():
            error, worst = _errors(found[name], value)
            comparisons.append(Comparison(name, error, error_bound, worst, worst_bound))
        return GateResult(tuple(comparisons))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make ``torch.empty`` give NaN, as PyTorch does in its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            # The mode also warns of operations whose sums have no fixed order.
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
