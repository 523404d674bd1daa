"""The numerics gate: a provider whose results are wrong prints no speed.

Every result (y and each gradient) is compared with float64. Its error may be at most 1.5 times that
of the eager form in the same dtype, plus one rounding unit; in the Frobenius norm, which sees a
systematic error, and in the largest element, which sees one wrong value among millions. Results
that are only copied must be the eager form's to the bit.
Uninitialised memory is filled with NaN meanwhile, so that an element nobody wrote shows.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.method import Provider, results
from bench.methods import method_of

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


def _errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    difference = value.double() - truth
    error = difference.norm() / truth.norm()
    worst = difference.abs().max() / truth.abs().max()
    return float(error), float(worst)


@dataclass(frozen=True)
class _Bounds:
    """What results are held against: float64 values with two bounds each, and exact values."""

    near: dict[str, tuple[Tensor, float, float]]
    exact: dict[str, Tensor]


class Gate:
    """Float64 results and eager errors of one problem, against which providers are held."""

    def __init__(self, problem: Any) -> None:
        """Remember the problem; its float64 results are computed when first asked for."""
        self.problem = problem
        self.method = method_of(problem.case)
        self.keep = problem.keep_mask()
        self._known: dict[bool, _Bounds] = {}

    def _bounds(self, frozen: bool) -> _Bounds:
        """Return what is right, of the method or of the layer without it."""
        if frozen in self._known:
            return self._known[frozen]
        expected = self.method.expected(self.problem, self.keep, frozen)
        unit = torch.finfo(self.problem.case.torch_dtype).eps / 2
        near = {}
        for name, value in expected.truth.items():
            found = [_errors(each[name], value) for each in expected.eager]
            error, worst = (max(each) for each in zip(*found, strict=True))
            near[name] = (value, FACTOR * error + unit, FACTOR * worst + unit)
        self._known[frozen] = _Bounds(near, expected.exact)
        return self._known[frozen]

    def check(self, provider: Provider) -> GateResult:
        """Run ``provider`` forward and backward on the gate's dropout mask and compare."""
        right = self._bounds(provider.frozen)
        leaves = self.problem.leaves(provider.frozen)
        try:
            memory = poisoned_memory() if provider.poison else contextlib.nullcontext()
            with provider.around(), memory:
                outputs = provider.build(self.problem, self.keep)()
                found = results(outputs, self.problem.dy, leaves, self.method.outputs)
        except Exception as raised:  # whatever a provider raises, the others still run
            return GateResult((), f"{type(raised).__name__}: {str(raised)[:300]}")
        wrong = [
            f"{name} differs from eager's"
            for name, value in right.exact.items()
            if not torch.equal(found[name], value.to(found[name].dtype))
        ]
        comparisons = []
        for name, (value, error_bound, worst_bound) in right.near.items():
            error, worst = _errors(found[name], value)
            comparisons.append(Comparison(name, error, error_bound, worst, worst_bound))
        return GateResult(tuple(comparisons), "; ".join(wrong) or None)


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
