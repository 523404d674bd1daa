"""Which tile a LoRA launch takes on a GPU; no GPU needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from peft_kernels.core import lora_tables, lora_tiles, projections_tiles, tiles, triton_runtime

pytest.importorskip("triton")

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_runtime, "capability", lambda index: (9, 0))
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("tokens", [1, 100, 5000])
@pytest.mark.parametrize("direction", ["forward", "backward", "masked"])
def test_unaligned_operands_take_the_tile_that_is_compiled_for_them(
    tokens: int, direction: str
) -> None:
    aligned = lora_tiles.lora_tile(GPU, torch.bfloat16, tokens, 16, direction)
    unaligned = lora_tiles.lora_tile(GPU, torch.bfloat16, tokens, 16, direction, aligned=False)
    compiled = {
        tile for _, _, name, tile in lora_tiles.lora_cases() if name.startswith("unaligned")
    }
    assert unaligned in compiled
    assert aligned not in compiled


def test_aligned_means_unmasked_copies_of_16_bytes() -> None:
    from peft_kernels.lora.launch import _aligned

    def operands(
        *, depth: int = 128, columns: int = 48, width: int = 256
    ) -> tuple[torch.Tensor, ...]:
        return torch.empty(8, width, dtype=torch.bfloat16)[:, :depth], torch.empty(
            columns, depth, dtype=torch.bfloat16
        )

    x, w = operands()
    assert _aligned(x, w)
    assert _aligned(x, w.t().contiguous().t())
    assert not _aligned(*operands(depth=80)), "the last step over K is masked"
    assert not _aligned(*operands(columns=40))
    assert not _aligned(*operands(width=200)), "rows of x start anywhere"
    shifted = torch.empty(8, 129, dtype=torch.bfloat16).flatten()[1 : 1 + 8 * 128].view(8, 128)
    assert not _aligned(shifted, w), "the first row starts anywhere"


def test_exact_float32_takes_the_library_and_tiles_of_its_own() -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert lora_tiles.lora_tile(GPU, torch.float32, 5000, 16, "forward").variant == "split"
    assert lora_tiles.low_rank_tile(GPU, torch.float32) is lora_tiles.LOW_RANK_TILE_EXACT
    assert tiles.reduction_tile(GPU, torch.float32, 16) is tiles.REDUCTION_TILES_EXACT[16]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert lora_tiles.lora_tile(GPU, torch.float32, 5000, 16, "forward").variant == "ticket"
    assert lora_tiles.low_rank_tile(GPU, torch.float32) is lora_tiles.LOW_RANK_TILE_32BIT
    assert tiles.reduction_tile(GPU, torch.float32, 16) is tiles.REDUCTION_TILES_32BIT[16]


def test_tma_is_taken_on_hopper_by_aligned_16_bit_operands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def taken(
        dtype: torch.dtype = torch.bfloat16,
        *,
        aligned: bool = True,
        tokens: int = 5000,
        rank: int = 16,
    ) -> str:
        return lora_tiles.lora_tile(GPU, dtype, tokens, rank, "forward", aligned).variant

    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with lora_tiles.forced_variant("ticket_tma"):
        assert taken() == taken(tokens=5) == taken(rank=64) == taken(rank=8) == "ticket_tma"
        assert taken(torch.float32) == taken(aligned=False) == taken(rank=12) == "ticket"
        # The pointer form then takes the tiles that are compiled for it.
        found = lora_tiles.lora_tile(GPU, torch.bfloat16, 5000, 12, "forward")
        with lora_tiles.forced_variant(None):
            assert found == lora_tiles.lora_tile(GPU, torch.bfloat16, 5000, 12, "forward")
        monkeypatch.setattr(triton_runtime, "capability", lambda index: (8, 0))
        assert taken() == "ticket"


def test_tma_can_be_chosen_by_shape_class(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (GPU, torch.bfloat16, 5000, 16)
    monkeypatch.setitem(lora_tables.TMA_FROM, "sm_90", {"large": 100, "backward": None})
    assert lora_tiles.lora_tile(*given, "forward").variant == "ticket_tma"
    assert lora_tiles.lora_tile(*given, "forward", work=100).variant == "ticket_tma"
    assert lora_tiles.lora_tile(*given, "forward", work=99).variant == "ticket"
    assert lora_tiles.lora_tile(*given, "backward").variant == "ticket"
    assert lora_tiles.lora_tile(*given, "forward", tma=False).variant == "ticket"
    with lora_tiles.forced_variant("ticket"):
        assert lora_tiles.lora_tile(*given, "forward").variant == "ticket"


def test_tma_is_for_products_that_take_the_device_longer_than_the_host() -> None:
    def plan(tokens: int, out_features: int) -> str:
        return lora_tiles.lora_plan(GPU, torch.bfloat16, tokens, 4096, out_features, 16, False)

    assert "tma" not in plan(512, 14336)
    assert plan(4096, 4096).count("ticket_tma") == 2
    with lora_tiles.forced_variant("ticket_tma"):
        assert plan(512, 1024).count("ticket_tma") == 2
    # Of several, the work of all counts: that is what one launch would do.
    several = (GPU, torch.bfloat16, 2048, 4096)
    wide = projections_tiles.projections_plan(*several, (4096, 1024), (16, 16), (False,) * 2, True)
    narrow = projections_tiles.projections_plan(
        *several, (1024,) * 3, (16,) * 3, (False,) * 3, True
    )
    assert "forward one by one: TMA" in wide and "forward ticket" in narrow


def test_several_that_drop_are_quicker_one_by_one_where_tma_serves_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not projections_tiles.pays_dropped(GPU, torch.bfloat16, 8192, 4096, 6144)
    assert projections_tiles.pays_dropped(GPU, torch.bfloat16, 512, 4096, 6144)
    assert projections_tiles.pays_dropped(GPU, torch.float32, 8192, 4096, 6144)
    monkeypatch.setattr(triton_runtime, "capability", lambda index: (8, 0))
    assert projections_tiles.pays_dropped(GPU, torch.bfloat16, 8192, 4096, 6144)
    assert projections_tiles.serves(GPU) and not projections_tiles.serves(torch.device("cpu"))


def test_tma_names_rows_of_16_bytes_that_do_not_overlap() -> None:
    from peft_kernels.lora.launch import _describable

    def rows(count: int, width: int) -> torch.Tensor:
        return torch.empty(count, width, dtype=torch.bfloat16)

    good = rows(8, 48)
    assert _describable(good, good.t(), rows(8, 96)[:, :41])
    assert not _describable(good, rows(8, 41)), "rows of 82 bytes"
    assert not _describable(good, rows(8, 64)[:, 1:49]), "an address between two"
    assert not _describable(good, rows(1, 48).expand(8, 48)), "one row eight times"
    assert not _describable(good, rows(8, 96)[:, ::2]), "no stride of 1"


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), False), ((9, 0), True), ((10, 0), False)]
)
def test_products_of_hopper_alone_are_those_of_warp_groups(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_runtime, "capability", lambda index: capability)
    assert tiles.wgmma(torch.device("cuda")) is expected
    assert not tiles.wgmma(torch.device("cpu"))
