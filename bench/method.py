"""What a benchmark knows of one method: cases, problems, providers, what is right, what is asked.

A method is one ``Method``, data and functions, in a file or folder of its own that imports this
module and nothing of the runner; ``bench.methods`` lists them. Everything else (gate, timers, rows,
tables, figures, result files, README, the GPU report) is shared and asks the ``Method``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bench.roofline import Work
from peft_kernels import explain
from peft_kernels.core import lora_tiles

CPU, GPU, HOST, MEMORY, DRY = "cpu", "gpu", "host", "memory", "dry"
FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
MAIN, VARIANTS = "main", "variants"
# What a user gets who names no backend.
OURS = "fused"
COMPILED = "compile"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MIB = 2**20

Output = Tensor | tuple[Tensor, ...]
Forward = Callable[[], Output]


class Case:
    """What cases of every method have; each is a frozen dataclass with sizes of its own.

    Attributes:
        op: the method's name.
        name: unique over all methods; what tables, JSON and pytest ids show.
        suite: "cpu", "gpu", "host" (time per call where the arithmetic is nothing), "memory"
            (bytes saved for backward) or "dry" (the GPU report walked without a GPU).
        dtype: of what is computed, as torch spells it.
        reported: one of the cases that ``make gpu-report`` times.
    """

    op: ClassVar[str]
    name: str
    suite: str
    dtype: str
    reported: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


class Problem(Protocol):
    """The tensors of one case, given to every provider."""

    case: Any
    dy: Tensor

    @property
    def alive(self) -> tuple[Tensor, ...]:
        """Inputs and parameters: they live whether or not backward needs them."""

    def leaves(self, frozen: bool) -> dict[str, Tensor]:
        """Return what gradients are taken of; ``frozen``: of a layer without the method."""

    def keep_mask(self) -> Tensor | None:
        """Return the dropout mask that the problem's seed stands for; None without dropout."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    ``build(problem, keep)`` returns a call without arguments that gives the outputs. With ``keep``
    None the provider draws its dropout as its users would; with a mask it applies exactly that one,
    so that the numerics gate can compare providers whose random streams differ.

    Attributes:
        name: what tables show.
        build: from a problem and a dropout mask (or None) to the call that is measured.
        why_not: the reason why this machine or case cannot run it, or None.
        frozen: computes the base layer alone: the floor, not the method.
        around: entered around every call, as for a forced kernel variant.
        plan: how it would run a problem, where it has a choice.
        poison: whether the gate may run it in PyTorch's deterministic mode, which fills fresh
            memory with NaN; a compiled graph would be compiled anew for it.
    """

    name: str
    build: Callable[[Any, Tensor | None], Forward]
    why_not: Callable[[Any], str | None] = lambda problem: None
    frozen: bool = False
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    plan: Callable[[Any], str | None] = lambda problem: None
    poison: bool = True


def packaged(
    function: Callable[..., Any],
    arguments: Callable[[Any, Tensor | None], tuple[tuple[Any, ...], dict[str, Any]]],
    backend: str | None = None,
    variant: str | None = None,
    outputs: Callable[[Any], Output] | None = None,
) -> Provider:
    """Return the provider of one of the package's functions.

    Args:
        function: what users call.
        arguments: from a problem and a mask to the function's arguments; with a mask, its seed is
            among them.
        backend: a demand; None takes the best.
        variant: of LoRA's kernels, forced.
        outputs: takes what the method compares from the function's result.
    """
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    if variant is not None:
        around = functools.partial(lora_tiles.forced_variant, variant)

    def build(problem: Any, keep: Tensor | None) -> Forward:
        given, options = arguments(problem, keep)
        if outputs is None:
            return lambda: function(*given, backend=backend, **options)
        return lambda: outputs(function(*given, backend=backend, **options))

    def explained(problem: Any) -> Any:
        given, options = arguments(problem, None)
        return explain(function, *given, backend=backend, **options)

    def why_not(problem: Any) -> str | None:
        found = explained(problem)
        if found.backend is None:
            reason: str = found.reasons.get(backend or "", str(found))
            return reason
        return None

    def plan(problem: Any) -> str | None:
        with around():
            found = explained(problem)
        return f"{found.backend}: {found.plan}" if found.plan else found.backend

    name = (backend or OURS) + (f":{variant}" if variant else "")
    return Provider(name, build, why_not, around=around, plan=plan)


@dataclass(frozen=True)
class Expected:
    """What is right for a problem.

    Attributes:
        truth: results in float64, by name.
        eager: the same results in the case's dtype, by the eager form; of several orders of its
            sums the largest error counts.
        exact: results that must be these to the bit.
    """

    truth: dict[str, Tensor]
    eager: Sequence[dict[str, Tensor]]
    exact: dict[str, Tensor] = field(default_factory=dict)


def first(output: Output) -> Tensor:
    """Return the output that gradients flow through."""
    return output if isinstance(output, Tensor) else output[0]


def results(
    output: Output, dy: Tensor, leaves: Mapping[str, Tensor], names: Sequence[str] = ("y",)
) -> dict[str, Tensor]:
    """Return every output by its name, and the gradient of each leaf as ``d`` and its name."""
    outputs = (output,) if isinstance(output, Tensor) else output
    gradients = torch.autograd.grad(outputs[0], list(leaves.values()), dy)
    named = dict(zip(names, (each.detach() for each in outputs), strict=True))
    return named | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))


@dataclass(frozen=True)
class Target:
    """A figure that is asked of our rows: the worst of the chosen cases counts.

    Attributes:
        label: what is asked, in words.
        limit: the value may be at most this, or, ``at_least``, not be below it.
        value: from a row to the value, None where it was not measured; of a target ``over`` another
            provider it is not asked.
        suite: of the cases.
        direction: of the rows.
        chosen: the cases.
        at_least: more is better.
        mean_over: instead of the worst value, the geometric mean of the time over this provider's.
        over: the value is this provider's time over ours.
    """

    label: str
    limit: float
    value: Callable[[Any], float | None] | None
    suite: str
    direction: str
    chosen: Callable[[Any], bool] = lambda case: True
    at_least: bool = False
    mean_over: str | None = None
    over: str | None = None


def x_frozen(row: Any) -> float | None:
    """Return the time over the frozen layer's."""
    value: float | None = row.ratio_frozen
    return value


def x_eager(row: Any) -> float | None:
    """Return the time over the eager form's."""
    value: float | None = row.ratio_eager
    return value


def speed_up(row: Any) -> float | None:
    """Return the eager form's time over this one's."""
    return None if row.ratio_eager is None else 1.0 / row.ratio_eager


def roofline(row: Any) -> float | None:
    """Return the least time that the counted work allows, over the time taken."""
    value: float | None = row.roofline
    return value


def saved_mib(row: Any) -> float | None:
    """Return what is saved for backward beyond x and the parameters."""
    return None if row.saved_bytes is None else row.saved_bytes / MIB


@dataclass(frozen=True)
class Method:
    """One method, for every benchmark.

    Attributes:
        name: of the op on the command line and in result files.
        case_type: its cases' dataclass.
        cases: of every suite.
        quick: cuts a case to a size that proves the code runs and measures nothing.
        make_problem: tensors of a case on a device, the same ones every time.
        expected: what is right, from a problem, its dropout mask, and whether the layer is frozen.
        providers: what is measured side by side, ours last.
        work: least arithmetic and traffic of a case, a direction and a provider's name.
        targets: the figures asked of it.
        seconds: of timing per case by suite, over all providers and both directions.
        gpu: what the GPU report times, by group of items.
        eager: names of the hand-written forms; the fastest of them is "eager" in ratios.
        outputs: names of what a forward gives; gradients flow through the first.
        input_bytes: of x in a case, where saved bytes are told as a multiple of it.
        compiled_alike: of cases with the same value, torch.compile is measured at one on a CPU.
        columns: what the README shows of it, provider to heading.
        title: of its table in the README.
    """

    name: str
    case_type: type[Case]
    cases: tuple[Any, ...]
    quick: Callable[[Any], Any]
    make_problem: Callable[[Any, torch.device], Any]
    expected: Callable[[Any, Tensor | None, bool], Expected]
    providers: tuple[Provider, ...]
    work: Callable[[Any, str, str], Work]
    targets: tuple[Target, ...]
    seconds: Mapping[str, float]
    gpu: Mapping[str, tuple[Provider, ...]]
    columns: Mapping[str, str]
    title: str
    eager: tuple[str, ...] = ("eager",)
    outputs: tuple[str, ...] = ("y",)
    input_bytes: Callable[[Any], int] | None = None
    compiled_alike: Callable[[Any], object] = lambda case: case

    def of_suite(self, suite: str, *, reported: bool = False) -> tuple[Any, ...]:
        """Return the cases of a suite; ``reported``: those of the GPU report alone."""
        return tuple(c for c in self.cases if c.suite == suite and (c.reported or not reported))

    @property
    def ours(self) -> Provider:
        """What is held against the others."""
        return self.providers[-1]

    @property
    def frozen(self) -> str | None:
        """The name of the provider of the layer without the method."""
        return next((each.name for each in self.providers if each.frozen), None)
