"""Which tile a prefix attention launch takes on a GPU; no GPU needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from peft_kernels.core import prefix_tiles, tiles, triton_runtime

pytest.importorskip("triton")

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_runtime, "capability", lambda index: (9, 0))
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("launch", prefix_tiles.LAUNCHES)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("size", [1, 16, 64, 80, 128, 129, 256])
def test_every_head_size_takes_a_tile_that_is_compiled_for_it(
    size: int, dropout: bool, launch: str
) -> None:
    block = next(block for block in (64, 128, 256) if size <= block)
    compiled = {
        tile
        for each, widest, masked, tile in prefix_tiles.prefix_cases("sm_90", "16bit")
        if (each, widest, masked) == (launch, block, dropout)
    }
    taken = {
        prefix_tiles.prefix_tile(GPU, torch.bfloat16, size, launch, dropout, tma)
        for tma in (False, True)
    }
    assert compiled == taken
    assert len(taken) == (1 if dropout or size > 128 else 2)


def test_aligned_means_rows_at_multiples_of_16_elements() -> None:
    from peft_kernels.prefix.alignment import aligned, is_aligned

    def rows(size: int, width: int | None = None, start: int = 0) -> torch.Tensor:
        width = width or size
        flat = torch.arange(float(start + 2 * 3 * 5 * width))[start:]
        return flat.view(2, 3, 5, width)[..., :size]

    good = (rows(64), rows(80), rows(16, 48), rows(16)[:1].expand(2, -1, -1, -1))
    bad = (rows(16, 24), rows(16, start=1), rows(40), rows(1))
    assert all(is_aligned(t) and aligned(t) is t for t in good)
    for t in bad:
        assert not is_aligned(t)
        copied = aligned(t)
        assert is_aligned(copied)
        assert torch.equal(copied[..., : t.shape[-1]], t)
        assert copied.shape[-1] % 16 == 0 and not copied[..., t.shape[-1] :].any()


def test_some_float32_is_the_librarys_and_explain_says_so() -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    exact = prefix_tiles.prefix_tile(GPU, torch.float32, 64, "forward", False)
    assert exact == prefix_tiles.LIBRARY
    assert "library" in prefix_tiles.plan(GPU, torch.float32, 64, False)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for size, library in ((64, False), (128, False), (129, True)):
        tile = prefix_tiles.prefix_tile(GPU, torch.float32, size, "query", True)
        assert (tile == prefix_tiles.LIBRARY) == library
    assert prefix_tiles.plan(GPU, torch.float32, 64, False).startswith("forward ")


def test_a_prefix_takes_no_wider_block_than_it_fills() -> None:
    tile = prefix_tiles.PrefixTile(128, 64, 8, 2)
    blocks = [prefix_tiles.prefix_block(prefix, tile) for prefix in (0, 1, 16, 17, 64, 65, 1000)]
    assert blocks == [0, 16, 16, 32, 64, 64, 64]


def test_every_family_has_tiles() -> None:
    for name in tiles.FAMILIES:
        for table in ("16bit", "fp32"):
            found = list(prefix_tiles.prefix_cases(name, table))
            pointers = [tile for *_, tile in found if not tile.tma]
            assert len(pointers) == 4 * 2 * (2 if "fp32" in table else 3)
            assert len(found) - len(pointers) == 8 * ((name, table) == ("sm_90", "16bit"))
            assert all(tile.block_m >= 16 and tile.block_n >= 16 for *_, tile in found)


def test_tma_is_taken_on_hopper_where_nothing_is_dropped() -> None:
    def tile(**changed: object) -> prefix_tiles.PrefixTile:
        given = {"dtype": torch.bfloat16, "head_size": 128, "launch": "key", "dropout": False}
        return prefix_tiles.prefix_tile(GPU, **(given | changed))  # type: ignore[arg-type]

    assert tile().tma and tile(dtype=torch.float16, launch="forward").tma
    assert not tile(tma=False).tma and not tile(dropout=True).tma and not tile(head_size=160).tma
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert not tile(dtype=torch.float32).tma
    with prefix_tiles.forced_variant("pointers"):
        assert not tile().tma
    assert str(tile(head_size=64)) == "64x64 by TMA, 4 warps, 2 stages, 168 registers"


def test_other_families_take_no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(triton_runtime, "capability", lambda index, found=capability: found)
        for launch in prefix_tiles.LAUNCHES:
            assert not prefix_tiles.prefix_tile(GPU, torch.bfloat16, 128, launch, False).tma
