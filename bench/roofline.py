"""The least time a case can take: counted work over peaks measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
