"""What a training step stores and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# The first steps allocate, load kernels and fill caches.
WARM_UP_STEPS = 3


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that ``forward`` keeps for its backward.

    Each storage counts once and whole (a view keeps all of it alive); the model's own parameters
    do not count, as they live anyway.

    Args:
        model: whose parameters are excluded.
        forward: runs the model and returns its loss.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # The tensors stay referenced while counting, so that no address is used twice.
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del loss
    return total


def timed_ms(step: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Run ``step`` and return its result and its wall time, the device's work included."""
    _synchronize(device)
    start = time.perf_counter()
    result = step()
    _synchronize(device)
    return result, (time.perf_counter() - start) * 1e3


def median_ms(times_ms: Sequence[float]) -> float:
    """Return the median of the steps after warming up."""
    return statistics.median(times_ms[WARM_UP_STEPS:] or times_ms)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
