"""Named GPUs: public peak numbers, from the makers' data sheets and architecture papers.

Tensor-core rates are dense, with sums in float32; bandwidths are the data sheet's, clocks the boost
clocks that it or ``nvidia-smi`` lists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """One GPU's peaks.

    Attributes:
        name: a word or two of what CUDA calls it.
        family: which tile tables it takes.
        multiprocessors: of the model that is sold.
        tflops: dense tensor-core rate by width: "16bit" (float16, bfloat16) and "fp32" (tf32).
        gigabytes_per_s: of its memory.
        l2_mib: last-level cache.
        ghz: boost clock.
    """

    name: str
    family: str
    multiprocessors: int
    tflops: dict[str, float]
    gigabytes_per_s: float
    l2_mib: float
    ghz: float


def _gpu(
    name: str, family: str, sms: int, half: float, tf32: float, bandwidth: float, l2: float,
    ghz: float,
) -> Gpu:  # fmt: skip
    return Gpu(name, family, sms, {"16bit": half, "fp32": tf32}, bandwidth, l2, ghz)


GPUS = (
    # NVIDIA A100 data sheet, 80 GB SXM.
    _gpu("A100", "sm_80", 108, 312, 156, 2039, 40, 1.41),
    # NVIDIA A10 data sheet.
    _gpu("A10", "sm_86", 72, 125, 62.5, 600, 6, 1.695),
    # NVIDIA Ampere GA102 architecture paper, float32 sums: half the rate of float16 ones.
    _gpu("RTX 3090", "sm_86", 82, 71, 35.6, 936, 6, 1.695),
    # NVIDIA L4 data sheet, half of its rate with sparsity.
    _gpu("L4", "sm_89", 58, 121, 60, 300, 48, 2.04),
    # NVIDIA Ada GPU architecture paper, RTX 4090.
    _gpu("RTX 4090", "sm_89", 128, 165.2, 82.6, 1008, 72, 2.52),
    # NVIDIA H200 data sheet, SXM, half of its rates with sparsity.
    _gpu("H200", "sm_90", 132, 989.5, 494.7, 4800, 50, 1.83),
    # NVIDIA H100 data sheet, SXM.
    _gpu("H100", "sm_90", 132, 989.5, 494.7, 3350, 50, 1.83),
    # NVIDIA DGX B200 data sheet: an eighth of the system's, half of its rates with sparsity.
    _gpu("B200", "sm_100", 148, 2250, 1125, 8000, 126, 1.85),
    # NVIDIA RTX Blackwell GPU architecture paper, RTX 5090, float32 sums.
    _gpu("RTX 5090", "sm_120", 170, 209.5, 104.8, 1792, 96, 2.41),
)


def part_of(asked: str) -> Gpu | None:
    """Return the GPU that ``asked`` names in either case, or by a part that is in no other name."""
    wanted = asked.casefold()
    found = [gpu for gpu in GPUS if wanted in gpu.name.casefold()]
    whole = [gpu for gpu in found if wanted == gpu.name.casefold()]
    return (whole or found)[0] if len(whole or found) == 1 else None


def find(name: str | None = None) -> Gpu | None:
    """Return the GPU of that name, or of what CUDA calls it; None: one that is not known.

    Args:
        name: None takes the current device's.
    """
    if name is None:
        if not torch.cuda.is_available():
            return None
        name = torch.cuda.get_device_name()
    if "Laptop" in name:  # fewer multiprocessors and watts under the same name
        return None
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.name}\b", name)), None)
