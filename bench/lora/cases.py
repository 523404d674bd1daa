"""The named cases that are measured, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from bench.method import CPU, DRY, GPU, HOST, MEMORY, SHORT, Case


@dataclass(frozen=True)
class LoRACase(Case):
    """One LoRA linear: x [tokens, in_features] to y [tokens, out_features].

    Attributes:
        name: as in ``Case``, like suite and reported.
        dtype: of every tensor.
        rank: r.
        dropout_p: drop probability on the input of A.
        bias: whether the base layer has one.
    """

    op: ClassVar[str] = "lora"
    name: str
    suite: str
    tokens: int
    in_features: int
    out_features: int
    rank: int = 16
    dropout_p: float = 0.0
    dtype: str = "bfloat16"
    bias: bool = False
    reported: bool = False


def _cpu_cases() -> list[LoRACase]:
    shapes = ((2048, 2048, 2048), (1024, 4096, 4096))
    return [
        LoRACase(f"{m}x{k}x{n} {SHORT[dtype]} p{p:g}", CPU, m, k, n, 16, p, dtype)
        for m, k, n in shapes
        for dtype in ("float32", "bfloat16")
        for p in (0.0, 0.1)
    ]


# Model, projection, in_features, out_features, bias of the base layer.
_PROJECTIONS = (
    ("llama3-8b", "q", 4096, 4096, False),
    ("llama3-8b", "kv", 4096, 1024, False),
    ("llama3-8b", "gate", 4096, 14336, False),
    ("llama3-8b", "down", 14336, 4096, False),
    ("llama3-70b", "q", 8192, 8192, False),
    ("llama3-70b", "kv", 8192, 1024, False),
    ("llama3-70b", "gate", 8192, 28672, False),
    ("llama3-70b", "down", 28672, 8192, False),
    ("qwen2.5-7b", "q", 3584, 3584, True),
    ("qwen2.5-7b", "kv", 3584, 512, True),
    ("qwen2.5-7b", "gate", 3584, 18944, False),
    ("qwen2.5-7b", "down", 18944, 3584, False),
)
_TOKENS = (1, 16, 256, 2048, 4096, 8192, 16384)
_RANKS = (4, 8, 64, 128, 256)

# Projection, tokens, rank, dropout: square and skewed, decode to 8192 tokens, rank 8 to 256.
_REPORTED = {
    ("llama3-8b.q", 8192, 16, 0.0),
    ("llama3-8b.q", 8192, 16, 0.1),
    ("llama3-8b.gate", 4096, 16, 0.1),
    ("llama3-8b.down", 4096, 64, 0.0),
    ("llama3-8b.kv", 2048, 8, 0.0),
    ("qwen2.5-7b.q", 2048, 16, 0.1),
    ("llama3-70b.q", 4096, 256, 0.0),
    ("llama3-8b.q", 16, 16, 0.0),
}


def _gpu_cases() -> list[LoRACase]:
    cases = []
    for model, projection, k, n, bias in _PROJECTIONS:
        place = f"{model}.{projection}"
        grid = [(tokens, 16) for tokens in _TOKENS]
        if model == "llama3-8b" or place == "llama3-70b.q":
            grid += [(tokens, rank) for tokens in (2048, 4096, 8192) for rank in _RANKS]
        for tokens, rank in grid:
            for p in (0.0, 0.1):
                cases.append(
                    LoRACase(
                        f"{place} M{tokens} r{rank} p{p:g}",
                        GPU, tokens, k, n, rank, p, "bfloat16", bias,
                        (place, tokens, rank, p) in _REPORTED,
                    )
                )  # fmt: skip
    return cases


HOST_CASES = (
    LoRACase("host 1x64x64 fp32 p0", HOST, 1, 64, 64, 8, 0.0, "float32"),
    LoRACase("host 1x64x64 fp32 p0.1", HOST, 1, 64, 64, 8, 0.1, "float32"),
)
MEMORY_CASE = LoRACase("saved 8192x4096x4096 bf16 p0.1", MEMORY, 8192, 4096, 4096, 16, 0.1)
# float32, because Triton's interpreter computes bfloat16 wrongly.
DRY_CASES = (
    LoRACase("dry 40x48x56 r8 p0", DRY, 40, 48, 56, 8, 0.0, "float32", True, True),
    LoRACase("dry 33x40x28 r5 p0.1", DRY, 33, 40, 28, 5, 0.1, "float32", False, True),
)
CPU_CASES = tuple(_cpu_cases())
GPU_CASES = tuple(_gpu_cases())
REPORT_CASES = tuple(case for case in GPU_CASES if case.reported)
ALL_CASES = (*CPU_CASES, *HOST_CASES, MEMORY_CASE, *GPU_CASES, *DRY_CASES)


def quick(case: LoRACase) -> LoRACase:
    """Return ``case`` cut to a size that proves the code runs and measures nothing."""
    return replace(
        case,
        name=f"quick {case.name}",
        tokens=min(case.tokens, 24),
        in_features=min(case.in_features, 40),
        out_features=min(case.out_features, 56),
        rank=min(case.rank, 8),
    )
