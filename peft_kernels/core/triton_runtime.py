"""What the Triton backend needs to know of its surroundings; imports Triton only when asked."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def import_problem() -> str | None:
    """Return why Triton cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux), or use another backend"
    try:
        import triton  # noqa: F401
    except Exception as error:  # A broken install raises anything; the reason must reach the user.
        return f"Triton fails to import ({type(error).__name__}: {error}): reinstall triton"
    return None


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Return the compute capability of CUDA device ``index``."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def multiprocessors(index: int) -> int:
    """Return the number of multiprocessors of CUDA device ``index``."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason against Triton for tensors of this device and dtype, or None."""
    problem = import_problem()
    if problem:
        return problem
    if dtype == torch.float64:
        return "float64 has no tensor-core kernel: use float32 or a 16-bit dtype"
    if device.type == "cpu":
        if not interpreted():
            return "CPU tensors need TRITON_INTERPRET=1, set before Triton is imported"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly: use float16 or float32 there"
        return None
    if torch.version.hip:
        return "the tile tables know NVIDIA GPUs only"
    if interpreted():
        return "TRITON_INTERPRET=1 is set: unset it to run compiled kernels on the GPU"
    if capability(device.index or 0) < (8, 0):
        return "needs compute capability 8.0 (Ampere) or later"
    return None


# The address of a device's current stream; torch.cuda.current_stream makes an object of it first.
_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_workspaces: dict[tuple[int, int], Tensor] = {}


def counters(device: torch.device, size: int) -> Tensor:
    """Return at least ``size`` int32 zeros for tickets and flags that a kernel sets back to zero.

    One buffer per device and stream: launches of one stream follow each other, and each leaves the
    buffer zero, so nothing has to be cleared before a launch. While a CUDA graph is captured the
    buffer is fresh and its clearing becomes part of the graph, because two graphs captured on one
    stream may replay on two.
    """
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    index = device.index or 0
    key = (index, _stream(index))
    buffer = _workspaces.get(key)
    if buffer is None or buffer.numel() < size:
        buffer = torch.zeros(max(4096, 2 * size), dtype=torch.int32, device=device)
        _workspaces[key] = buffer
    return buffer
