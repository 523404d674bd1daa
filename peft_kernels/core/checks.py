"""Argument checks that every public function shares.

Each error names the argument, what was given and what is allowed, and is raised before anything
ran: an error from a kernel or from compiled code would reach the user without its text.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def describe(value: object) -> str:
    """Return ``value`` as an error message shows it: a tensor by shape, dtype and device."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_tensor(name: str, value: object) -> Tensor:
    """Check that ``value`` is a plain floating-point tensor that a kernel can read.

    Raises:
        TypeError: not a tensor, a sharded (DTensor), quantised, sparse, nested or integer tensor.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    # Exact types first: this line is all that the common case pays.
    if type(value) not in _PLAIN and not torch.compiler.is_compiling():
        _refuse_wrapped(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float64, float32, float16 or bfloat16, got {value.dtype}. A quantised "
            f"weight has no fused kernel here: dequantise it first (.to(torch.bfloat16))"
        )
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one; convert it first")
    return value


def check_integers(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Check that ``value`` is a plain dense tensor of one of the integer ``dtypes``.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of {_named(dtypes)}, got {describe(value)}")
    if type(value) not in _PLAIN and not torch.compiler.is_compiling():
        _refuse_wrapped(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {_named(dtypes)}, got {value.dtype}; cast it with .long()")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor; convert it first")
    return value


def _named(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


_PLAIN = (Tensor, torch.nn.Parameter)


def uniform(x: object, *others: Tensor | None) -> bool:
    """Return whether all are plain dense tensors of one float dtype on one device.

    The common call, told by the fewest attribute reads: ``check_tensor``, ``check_same_device`` and
    ``compute_dtype`` without autocast have nothing to find then.
    """
    if type(x) not in _PLAIN:
        return False
    dtype, device, strided = x.dtype, x.device, torch.strided  # type: ignore[attr-defined]
    if dtype not in FLOAT_DTYPES or x.layout is not strided or x.is_nested:  # type: ignore[attr-defined]
        return False
    for each in others:
        if each is not None and (
            type(each) not in _PLAIN
            or each.dtype is not dtype
            or each.device != device
            or each.layout is not strided
            or each.is_nested
        ):
            return False
    return True


def _refuse_wrapped(name: str, value: Tensor) -> None:
    kind = type(value)
    if kind.__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor (a sharded parameter). Under FSDP2 call the layer through its "
            f"forward so that it is gathered first; for tensor parallelism give parallelize_module "
            f"the styles LoRAColwiseParallel and LoRARowwiseParallel, or pass {name}.to_local()"
        )
    if kind.__name__ == "AsyncCollectiveTensor":
        raise TypeError(
            f"{name} is the result of a collective that is still under way (torch's styles "
            f"return such): pass {name}.clone(), which waits for it"
        )
    if (
        hasattr(kind, "__torch_dispatch__")
        and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    ):
        # FakeTensor and functional tensors stand in for plain ones while tracing.
        if kind.__module__.startswith("torch._subclasses"):
            return
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__name__}, a quantised or wrapped tensor whose "
            f"storage the kernels cannot read; dequantise or unwrap it first"
        )
    if kind.__name__ in ("Params4bit", "Int8Params"):
        raise TypeError(
            f"{name} is a {kind.__name__} (bitsandbytes quantised weight); dequantise it first"
        )


def check_ndim(name: str, value: Tensor, ndim: int, layout: str) -> None:
    """Raise ValueError unless ``value`` has ``ndim`` dimensions, described by ``layout``."""
    if value.dim() != ndim:
        raise ValueError(f"{name} must have shape {layout}, got {list(value.shape)}")


def check_probability(name: str, value: object) -> float:
    """Return ``value`` as a float in [0, 1).

    Raises:
        TypeError: not a number.
        ValueError: outside [0, 1), or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {describe(value)}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return float(value)


def check_scale(name: str, value: object) -> float:
    """Return ``value`` as a finite float."""
    if type(value) is float and not torch.compiler.is_compiling() and math.isfinite(value):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number (alpha / r), got {describe(value)}")
    if not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_run_time_scale(name: str, value: object, like: Tensor) -> float | Tensor:
    """Return ``value`` as a finite float, or as it is where it is a tensor beside ``like``.

    Raises:
        TypeError: neither a number nor a float32 tensor.
        ValueError: not finite; a tensor of several elements, on another device, or with a gradient.
    """
    if not isinstance(value, Tensor):
        return check_scale(name, value)
    if value.dtype != torch.float32:
        raise TypeError(
            f"{name} must be a number (alpha / r) or a float32 tensor, got {describe(value)}"
        )
    if value.numel() != 1 or value.device != like.device or value.requires_grad:
        gradient = ", that requires a gradient" if value.requires_grad else ""
        raise ValueError(
            f"{name} must be a number (alpha / r) or a tensor of one element on {like.device} that "
            f"gets no gradient, got {describe(value)}{gradient}"
        )
    return value if value.dim() < 2 else value.reshape(())


def check_seed(value: object, device: torch.device, name: str = "seed") -> Tensor:
    """Return ``value`` checked as a dropout seed: an int64 tensor of one element on ``device``."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be an int64 tensor of one element on {device}, got {describe(value)}; "
            f"write torch.tensor([{value!r}], device={str(device)!r})"
        )
    if value.dtype != torch.int64 or value.numel() != 1 or value.device != device:
        raise ValueError(
            f"{name} must be an int64 tensor of one element on {device}, got {describe(value)}"
        )
    return value


def check_same_device(
    names_and_tensors: dict[str, Tensor | None], device: torch.device, of: str = "x"
) -> None:
    """Raise ValueError naming the first tensor that is not on ``device``, where ``of`` is."""
    for name, value in names_and_tensors.items():
        if value is not None and value.device != device:
            raise ValueError(
                f"{name} is on {value.device} while {of} is on {device}; "
                f"move one of them with .to()"
            )


autocast_anywhere = torch._C._is_any_autocast_enabled


def autocast_enabled(device: torch.device) -> bool:
    """Return whether autocast is on for a device; never for one that has no autocast."""
    # Whether it is on anywhere is the shorter question.
    if not torch.compiler.is_compiling() and not autocast_anywhere():
        return False
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autocast is off for a device, also for one that has none."""
    if autocast_enabled(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def outside_autocast(function: Callable[..., None]) -> Callable[..., None]:
    """Return ``function``, whose first argument is a tensor, made to run without autocast.

    For what PyTorch's operations make in backward, which is called under autocast or not, whatever
    was on in forward.
    """

    @functools.wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> None:
        with without_autocast(first.device):
            function(first, *args, **kwargs)

    return run


def compute_dtype(
    x: Tensor, named: dict[str, Tensor | None], exact: tuple[str, ...], of: str = "x"
) -> torch.dtype:
    """Return the dtype to compute in: autocast's where it is on, else that of x, named ``of``.

    Without autocast the tensors named in ``exact`` must have x's dtype, as ``F.linear`` demands;
    the others, small parameters that are cast for the product, may be wider or narrower but must
    not force x itself up (float16 and bfloat16 do not mix).

    Raises:
        TypeError: dtypes that cannot mix, with the way out.
    """
    device_type, dtype = x.device.type, x.dtype
    if autocast_enabled(x.device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    for name, value in named.items():
        if value is None or value.dtype == dtype:
            continue
        if name in exact:
            other = f"or run under torch.autocast({device_type!r})"
            if dtype == torch.float64:
                other = "autocast leaves float64 alone"
            raise TypeError(
                f"{name} is {value.dtype} and {of} is {dtype}: cast one of them, {other}"
            )
        if torch.promote_types(value.dtype, dtype) not in (value.dtype, dtype):
            raise TypeError(
                f"{name} is {value.dtype} and {of} is {dtype}, which do not mix: cast {name} to "
                f"{dtype} or float32"
            )
    return dtype
