"""Kernels that are wrong on purpose: what compute-sanitizer must find, or it is blind here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_RACE = """
extern "C" __global__ void _planted_race_kernel(int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = out[threadIdx.x];
  out[threadIdx.x] = shared[(threadIdx.x + 33) % 64];
}
"""


@triton.jit
def _planted_global_kernel(x_ptr, N):  # type: ignore[no-untyped-def]
    tl.store(x_ptr + N + tl.arange(0, 128), 1.0)


def write_behind_the_end(device: torch.device) -> None:
    """Write behind the end of a tensor, for memcheck."""
    x = torch.zeros(128, device=device)
    _planted_global_kernel[(1,)](x, x.numel())
    torch.cuda.synchronize()


def race(device: torch.device) -> None:
    """Read what another warp writes to shared memory, without a barrier, for racecheck."""
    kernel = torch.cuda._compile_kernel(_RACE, "_planted_race_kernel")
    kernel((1, 1, 1), (64, 1, 1), (torch.zeros(64, dtype=torch.int32, device=device),))
    torch.cuda.synchronize()
