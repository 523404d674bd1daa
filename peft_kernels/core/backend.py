"""Which backend runs an op, and why not the others.

A backend is a record of two launchers and a ``why_not``. The first one in the order of the tensors'
device that has no reason against it runs. ``backend=`` and ``PEFT_KERNELS_BACKEND`` are demands:
one that cannot be met raises, with every reason. A GPU tensor that ends up on the reference warns
once per reason, and raises under ``PEFT_KERNELS_STRICT=1``.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

NAMES = ("triton", "cuda", "cpp", "reference")
_ORDER = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpp", "reference")}
# On demand only: Triton's interpreter, and the emulation of CUDA that tests load, run kernels on
# CPU tensors far slower than eager.
_ON_DEMAND = {"cuda": (), "cpu": ("triton", "cuda")}


class BackendUnavailable(RuntimeError):
    """A demanded backend cannot serve this call, or strict mode forbids falling back."""


class Spec(Protocol):
    """What a selection may depend on: hashable, cheap to build, one type per op."""

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is computed in."""

    def __hash__(self) -> int:
        """Return a hash: choices are cached by spec."""


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Attributes:
        name: "triton", "cuda", "cpp" or "reference".
        forward: launcher, writes into outputs that its caller allocated.
        backward: launcher, likewise.
        why_not: the reason against this backend for a spec, telling the user what to change, or
            None. Cheap and pure; its text carries no shapes.
        plan: how the backend would run a spec (variant, tile), for ``explain``.
    """

    name: str
    forward: Callable[..., None]
    backward: Callable[..., None]
    why_not: Callable[[Any], str | None]
    plan: Callable[[Any], str] | None = None


@dataclass(frozen=True, eq=False)
class Op:
    """A public function's name and the backends that can run it.

    Attributes:
        name: of the public function.
        backends: best first, for every device.
        spec: makes the spec of a plain tuple of its fields, where calls are told by such a tuple.
    """

    name: str
    backends: tuple[Backend, ...]
    spec: Callable[..., Any] | None = None

    def order(self, device_type: str) -> tuple[Backend, ...]:
        """Return the backends considered for a device type, best first."""
        by_name = {backend.name: backend for backend in self.backends}
        names = _ORDER.get(device_type, ("reference",))
        return tuple(by_name[name] for name in names if name in by_name)

    def find(self, name: str) -> Backend | None:
        """Return the backend of that name, or None where this op has none."""
        return next((backend for backend in self.backends if backend.name == name), None)


@dataclass(frozen=True)
class Explanation:
    """What would run, and why not something else.

    Attributes:
        op: name of the public function.
        backend: name of the backend that would run, or None where a demand cannot be met.
        plan: how it would run (variant, tile), where the backend has a choice.
        reasons: for every other backend, why it does not run.
    """

    op: str
    backend: str | None
    plan: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the explanation as lines of text."""
        runs = self.backend or "nothing: the demanded backend cannot serve this call"
        lines = [f"{self.op} runs on {runs}" + (f" ({self.plan})" if self.plan else "")]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def check_backend_name(value: object) -> None:
    """Raise ValueError unless ``value`` is None or the name of a backend."""
    if value is not None and value not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)} or None, got {value!r}")


def demanded(backend: str | None) -> str | None:
    """Return the demand in force: the argument, or ``PEFT_KERNELS_BACKEND``, or None."""
    if backend is None:
        backend = os.environ.get("PEFT_KERNELS_BACKEND") or None
        if backend is not None and backend not in NAMES:
            raise ValueError(
                f"PEFT_KERNELS_BACKEND must be one of {', '.join(NAMES)}, got {backend!r}"
            )
    return backend


# os.environ.get raises and catches twice for a name that is not set: more host time than the choice
# itself. The mapping beneath it, where Python has one, is asked first.
_environment: Any = getattr(os.environ, "_data", os.environ)
_DEMAND: Any = "PEFT_KERNELS_BACKEND"
if _environment is not os.environ:
    _DEMAND = os.environ.encodekey(_DEMAND)


def select(op: Op, spec: Any, backend: str | None = None) -> Backend:
    """Return the backend that runs ``op`` for ``spec``.

    Args:
        op: the op.
        spec: what the op's ``why_not`` functions look at, or a plain tuple of its fields: the spec
            is then made only where there is no choice yet, which takes less than making it.
        backend: a demand, or None for the first backend without a reason against it.

    Raises:
        BackendUnavailable: the demand cannot be met, or only the reference could serve a GPU tensor
            under ``PEFT_KERNELS_STRICT=1``.
    """
    demand = backend if _DEMAND not in _environment else demanded(backend)
    chosen = _choose(op, spec, demand)
    if demand is None and chosen.name == "reference":
        spec = _whole(op, spec)
        if spec.device.type == "cuda":
            _fell_back(op, spec)
    return chosen


def _whole(op: Op, spec: Any) -> Any:
    return spec if op.spec is None else op.spec(*spec)


@functools.lru_cache(maxsize=4096)
def _choose(op: Op, spec: Any, demand: str | None) -> Backend:
    spec = _whole(op, spec)
    if demand is not None:
        chosen = op.find(demand)
        if chosen is not None and _reason(chosen, spec) is None:
            return chosen
        raise BackendUnavailable(_refusal(op, spec, demand))
    # The reference has no reason against anything, so there is always one.
    return next(each for each in op.order(spec.device.type) if _reason(each, spec) is None)


def _reason(backend: Backend, spec: Spec) -> str | None:
    device_type = spec.device.type
    served = (*_ORDER.get(device_type, ("reference",)), *_ON_DEMAND.get(device_type, ()))
    if backend.name not in served:
        return f"does not serve {device_type} tensors"
    return backend.why_not(spec)


def _refusal(op: Op, spec: Spec, demand: str) -> str:
    lines = [f"{op.name}: backend {demand!r} was demanded and cannot serve this call."]
    for name in NAMES:
        backend = op.find(name)
        if backend is None:
            reason: str | None = f"{op.name} has no {name} backend in this version"
        else:
            reason = _reason(backend, spec)
        lines.append(f"  {name}: {reason or 'available'}")
    lines.append("Drop backend= (and PEFT_KERNELS_BACKEND) to run the best available one.")
    return "\n".join(lines)


_warned: set[str] = set()


def _fell_back(op: Op, spec: Spec) -> None:
    strict = os.environ.get("PEFT_KERNELS_STRICT", "0") not in ("", "0")
    if not strict and not _new_reason(op, spec):
        return
    reasons = _reasons_before_reference(op, spec)
    text = f"{op.name} runs on the plain PyTorch reference: " + "; ".join(
        f"{name}: {reason}" for name, reason in reasons.items()
    )
    if strict:
        raise BackendUnavailable(text + " (PEFT_KERNELS_STRICT=1 forbids falling back)")
    warnings.warn(text, stacklevel=2)


def _new_reason(op: Op, spec: Spec) -> bool:
    key = f"{op.name}: {_reasons_before_reference(op, spec)}"
    if key in _warned:
        return False
    _warned.add(key)
    return True


@functools.lru_cache(maxsize=4096)
def _cached_reasons(op: Op, spec: Spec) -> tuple[tuple[str, str], ...]:
    pairs = ((each.name, _reason(each, spec)) for each in op.order(spec.device.type))
    return tuple((name, reason) for name, reason in pairs if reason is not None)


def _reasons_before_reference(op: Op, spec: Spec) -> dict[str, str]:
    return dict(_cached_reasons(op, spec))


def forget_choices() -> None:
    """Forget cached choices and warnings given, as after changing the environment or the tiles."""
    _choose.cache_clear()
    _cached_reasons.cache_clear()
    _warned.clear()


# Public function or layer type -> (op, spec, demand) of a call with the same arguments.
_EXPLAINERS: dict[object, Callable[..., tuple[Op, Spec, str | None]]] = {}


def explains(function: object, prepare: Callable[..., tuple[Op, Spec, str | None]]) -> None:
    """Make ``explain(function, ...)`` work: ``prepare`` gives the op, its spec and the demand."""
    _EXPLAINERS[function] = prepare


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend a call would run on, and the reason against each other one.

    Nothing is computed. Arguments are checked as the call itself would check them.

    Args:
        function: a public function (``lora_linear``) or a layer (a ``LoRALinear`` instance).
        *args: what the call would be given.
        **kwargs: likewise.

    Returns:
        The explanation; ``print`` it.

    Raises:
        TypeError: ``function`` is none of this package's that have backends (``lora_embedding`` is
            made of PyTorch's operations), or arguments are missing.
        ValueError: arguments that the call itself would refuse.

    Example:
        >>> import torch, peft_kernels
        >>> x, w = torch.randn(4, 32), torch.randn(16, 32)
        >>> a, b = torch.randn(8, 32), torch.randn(16, 8)
        >>> peft_kernels.explain(peft_kernels.lora_linear, x, w, a, b, backend="reference").backend
        'reference'
    """
    if isinstance(function, torch.nn.Module):
        kinds = (_EXPLAINERS.get(kind) for kind in type(function).__mro__)
        prepare = next((each for each in kinds if each is not None), None)
        args = (function, *args)
    else:
        prepare = _EXPLAINERS.get(function)
    if prepare is None:
        known = ", ".join(sorted(getattr(each, "__name__", str(each)) for each in _EXPLAINERS))
        raise TypeError(f"explain knows {known}; got {function!r}")
    op, spec, backend = prepare(*args, **kwargs)
    return explain_spec(op, spec, demanded(backend))


def explain_spec(op: Op, spec: Spec, demand: str | None = None) -> Explanation:
    """Return the explanation of one op for one spec."""
    try:
        chosen: Backend | None = _choose(op, spec, demand)
    except BackendUnavailable:
        chosen = None
    reasons = {}
    for name in NAMES:
        backend = op.find(name)
        if chosen is not None and name == chosen.name:
            continue
        reason = f"no {name} backend in this version" if backend is None else _reason(backend, spec)
        if reason is None and demand is not None:
            reason = f"backend {demand!r} was demanded"
        elif reason is None:
            reason = _not_first(name, spec.device.type, chosen)
        reasons[name] = reason
    if chosen is None:
        return Explanation(op.name, None, None, reasons)
    plan = chosen.plan(spec) if chosen.plan else None
    return Explanation(op.name, chosen.name, plan, reasons)


def _not_first(name: str, device_type: str, chosen: Backend | None) -> str:
    if name in _ON_DEMAND.get(device_type, ()):
        return f"runs {device_type} tensors only when demanded (it interprets the kernels, slowly)"
    return f"{chosen.name if chosen else 'another backend'} comes first"
