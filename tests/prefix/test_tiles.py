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
    assert compiled == {prefix_tiles.prefix_tile(GPU, torch.bfloat16, size, launch, dropout)}


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
            assert len(found) == 4 * 2 * (2 if "fp32" in table else 3)
            assert all(tile.block_m >= 16 and tile.block_n >= 16 for *_, tile in found)
