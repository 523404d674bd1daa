"""What a call stores, allocates and launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], exclude: Iterable[Tensor]) -> int:
    """Return the bytes that ``forward`` keeps for its backward.

    Counted once per storage, whole (a view keeps all of it alive), without the storages of
    ``exclude``: parameters live anyway, and so does x, which the layer before or after holds.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    # The tensors stay referenced while counting, so that no address is used twice.
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del outputs
    return total


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most device memory that ``call`` holds beyond what was held; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def count_launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the number of kernels that ``call`` launches; None on a CPU.

    Copies and fills done by the driver (memcpy, memset) are launches too and count.
    """
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize(device)
    on_device = torch.autograd.DeviceType.CUDA
    return sum(1 for event in profiler.events() if event.device_type == on_device)
