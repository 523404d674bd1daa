"""The variants that the tables choose are those that conditions in code once chose.

A frozen copy of that code, over the tables of today: only what decides between tiles is copied.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from peft_kernels.core import lora_tables, lora_tiles, tiles, triton_runtime
from peft_kernels.core.lora_tables import LoRATile

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# Both sides of every threshold; 4096**2 x 1024 and x 2048 are 2**34 and 2**35 multiply-adds.
TOKENS = (1, 16, 17, 256, 257, 1023, 1024, 2047, 2048, 8192)
RANKS = (1, 8, 12, 16, 17, 24, 32, 33, 40, 256)
FEATURES = ((4096, 4096), (64, 512))


def frozen(
    device: torch.device, dtype: torch.dtype, tokens: int, rank: int, direction: str,
    aligned: bool, work: int, forced: str | None,
) -> LoRATile:  # fmt: skip
    family = tiles.family(device) if device.type == "cuda" else None
    single = dtype == torch.float32
    shape_class = "decode" if tokens <= 16 else "small" if tokens <= 256 else "large"
    if direction == "masked" and shape_class == "decode":
        shape_class = "small"
    if direction != "forward" and shape_class == "large":
        shape_class = direction
    suffix = "+" if rank > 16 else ""
    name = shape_class + suffix
    interpreted = LoRATile("ticket", 32, 32, 32, 4, 1)
    if forced == "ticket_tma" or work >= 1 << (34 if direction in ("dropped", "masked") else 35):
        by_table = forced is None and shape_class not in ("decode", "small")
        wanted = forced == "ticket_tma" or by_table
        if wanted and family is None and forced:
            return replace(interpreted, variant="ticket_tma")
        if wanted and family == "sm_90" and aligned and rank % 8 == 0 and not single:
            return lora_tables.TMA["sm_90"][name.replace("decode", "small")]
    table = lora_tables.LORA_TF32 if single else lora_tables.LORA_16BIT.get(family or "sm_80", {})
    table = table if family else dict.fromkeys(table, interpreted)
    tile = table[name.replace("dropped", "large")]
    if not aligned and family:
        tile = lora_tables.UNALIGNED_TF32 if single else lora_tables.UNALIGNED
    exact = single and family is not None and tiles.precision(dtype, device) == "ieee"
    variant = forced or ("split" if exact else tile.variant)
    if variant == "recompute" and (rank > 32 or direction == "masked"):
        variant = "ticket"
    if variant == "ticket_tma":
        variant = "ticket"
    if variant == "ticket" and tile.variant == "recompute":
        tile = table["small" + suffix]
    return replace(tile, variant=variant)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), None])
@pytest.mark.parametrize("forced", [None, *lora_tables.VARIANTS])
def test_every_choice_is_as_it_was(
    capability: tuple[int, int] | None, forced: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_runtime, "capability", lambda index: capability)
    device = GPU if capability else CPU
    before = torch.backends.cuda.matmul.fp32_precision
    found = set()
    try:
        for precision, dtype in (
            ("ieee", torch.float32), ("tf32", torch.float32), ("ieee", torch.bfloat16)
        ):  # fmt: skip
            torch.backends.cuda.matmul.fp32_precision = precision
            for tokens, rank, direction, aligned, (k, n) in itertools.product(
                TOKENS, RANKS, lora_tables.SHAPE_CLASSES, (True, False), FEATURES
            ):
                given = (device, dtype, tokens, rank, direction, aligned)
                with lora_tiles.forced_variant(forced):
                    tile = lora_tiles.lora_tile(*given, work=tokens * k * n)
                assert tile == frozen(*given, tokens * k * n, forced), given
                found.add(tile.variant)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    if capability == (9, 0) and forced is None:
        assert found == set(lora_tables.VARIANTS)
