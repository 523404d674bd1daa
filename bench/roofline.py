"""The least time a case can take: counted work over peaks measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.cases import LoRACase
from bench.measure import device_times, wall_times


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes if each input is read and each output written once."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        """Return the work of both."""
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Peaks:
    """What the device reached in this run: the library's matrix product and a large copy."""

    dtype: str
    tflops: float
    gigabytes_per_s: float

    def best(self, other: Peaks) -> Peaks:
        """Return the higher of each peak."""
        return Peaks(
            self.dtype,
            max(self.tflops, other.tflops),
            max(self.gigabytes_per_s, other.gigabytes_per_s),
        )

    def least_ms(self, work: Work) -> float:
        """Return the roofline's time for ``work``."""
        return max(work.flops / (self.tflops * 1e9), work.bytes / (self.gigabytes_per_s * 1e6))


def forward_work(case: LoRACase) -> Work:
    """Return what the forward must do: y and s from x, W, A, B and the bias."""
    m, k, n, r = case.tokens, case.in_features, case.out_features, case.rank
    flops = 2 * m * k * n + 2 * m * k * r + 2 * m * r * n
    elements = m * k + n * k + r * k + n * r + m * n + m * r + (n if case.bias else 0)
    return Work(flops, elements * case.torch_dtype.itemsize)


def backward_work(case: LoRACase) -> Work:
    """Return what the backward must do: ds, dx, dA and dB; the base layer is frozen.

    x and dY are read once: nothing forbids computing all gradients in one pass over them. With a
    rank of 0, the frozen layer, x is not read.
    """
    m, k, n, r = case.tokens, case.in_features, case.out_features, case.rank
    flops = 2 * m * k * n + 4 * m * n * r + 4 * m * k * r
    elements = m * n + n * k + m * r + r * k + n * r + (m * k if r else 0)  # read
    elements += m * k + r * k + n * r  # written
    return Work(flops, elements * case.torch_dtype.itemsize)


def work(case: LoRACase, direction: str) -> Work:
    """Return the work of "forward" or of "forward+backward"."""
    if direction == "forward":
        return forward_work(case)
    return forward_work(case) + backward_work(case)


def measure_peaks(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Peaks:
    """Measure a large copy (bytes read plus written) and a large square product, on random data."""
    on_gpu = device.type == "cuda"
    size = 128 if tiny else 8192 if on_gpu else 2048
    count = 1 << (20 if tiny else 28 if on_gpu else 26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    # The copy passes through far more than any cache, so that a cold one changes nothing there.
    timing = device_times(calls, 0.1) if on_gpu else wall_times(calls, 0.5, rounds=(2, 10))
    return Peaks(
        str(dtype).removeprefix("torch."),
        2 * size**3 / (timing["product"].min_ms * 1e9),
        2 * source.numel() * source.element_size() / (timing["copy"].min_ms * 1e6),
    )
