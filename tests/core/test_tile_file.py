"""Files of tiles: what is read, what is refused by name, and that launches and explain follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_kernels import explain, lora_linear, prefix_attention
from peft_kernels.core import (
    adapter_tiles,
    lora_tables,
    lora_tiles,
    overrides,
    prefix_tiles,
    tile_file,
    tiles,
    triton_runtime,
)
from peft_kernels.core.lora_tables import LoRATile
from peft_kernels.core.prefix_tiles import PrefixTile
from peft_kernels.core.tiles import ReductionTile

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16
Use = Callable[[dict[str, Any]], Path]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Use]:
    """Make a file the user's, on a machine with a Hopper GPU."""
    monkeypatch.setattr(triton_runtime, "capability", lambda index: (9, 0))

    def write(families: dict[str, Any]) -> Path:
        path = tmp_path / "tiles.json"
        path.write_text(json.dumps({"families": families}))
        monkeypatch.setenv(overrides.VARIABLE, str(path))
        overrides.forget()
        return path

    yield write
    monkeypatch.delenv(overrides.VARIABLE, raising=False)
    overrides.forget()


def test_a_file_overrules_what_it_names_and_nothing_else(use: Use) -> None:
    before = lora_tiles.lora_tile(GPU, BF16, 5000, 64, "forward", tma=False)
    use({
        "sm_90": {
            "lora": {"16bit": {
                "large": "ticket 64x128x64x4x3 group 4", "tma large": "ticket_tma 128x128x64x8x3",
            }},
            "prefix": {"16bit": {"key 128": "32x64x4x2", "query 64 dropout": "32x32x4x2"}},
            "adapter": {"16bit": {"many forward 64": "32x64x4x2"}},
            "reduction": {"16bit": {"64": "32x64x64x8x2"}},
            "adapter reduction": {"16bit": {"16": "32x32x16x4x2 sums"}},
            "limits": {"tma_from": {"large": 1000}, "few_tokens": {"adapter": 100}},
        },
        "sm_80": {"lora": {"16bit": {"large+": "ticket 64x64x64x4x3"}}},
    })  # fmt: skip
    pointers = LoRATile("ticket", 64, 128, 64, 4, 3, 4)
    assert lora_tiles.lora_tile(GPU, BF16, 5000, 16, "forward", tma=False) == pointers
    by_tma = LoRATile("ticket_tma", 128, 128, 64, 8, 3)
    assert lora_tiles.lora_tile(GPU, BF16, 5000, 16, "forward", work=1000) == by_tma
    assert lora_tiles.lora_tile(GPU, BF16, 5000, 16, "forward", work=999) == pointers
    # A dropped forward has an entry of its own, ranks above 16 and another family too.
    assert lora_tiles.lora_tile(GPU, BF16, 5000, 16, "dropped", tma=False) != pointers
    assert lora_tiles.lora_tile(GPU, BF16, 5000, 64, "forward", tma=False) == before
    assert lora_tiles.lora_tile(GPU, torch.float32, 5000, 16, "forward") != pointers

    def prefix(size: int, launch: str, dropout: bool, tma: bool = False) -> PrefixTile:
        return prefix_tiles.prefix_tile(GPU, BF16, size, launch, dropout, tma)

    assert prefix(128, "key", False) == prefix(80, "key", False) == PrefixTile(32, 64, 4, 2)
    assert prefix(128, "key", False, tma=True) == prefix_tiles.tma_tile("sm_90", "key", 128)
    assert prefix(64, "query", True) == PrefixTile(32, 32, 4, 2)
    assert prefix(64, "key", False) == prefix_tiles.family_tile("16bit", "sm_90", "key", 64, False)
    adapted = adapter_tiles.adapter_tile(GPU, BF16, 101, 64, 64, "forward")
    assert (adapted.block_m, adapted.block_d, adapted.ahead) == (32, 64, True)
    assert tiles.reduction_tile(GPU, BF16, 33) == ReductionTile(32, 64, 64, 8, 2)
    assert tiles.reduction_tile(GPU, BF16, 128) == tiles.family_reduction_tiles("sm_90")[128]
    summed = adapter_tiles.reduction_tile(GPU, BF16, 64, 16)
    assert summed == ReductionTile(32, 32, 16, 4, 2, product_sums=True)


def test_split_is_a_tile_and_a_limit(use: Use) -> None:
    use({"sm_90": {
        "lora": {"16bit": {"large": "split"}},
        "limits": {"tma_from": {"large": None}, "split_from": {"queries": 64}},
    }})  # fmt: skip
    tile = lora_tiles.lora_tile(GPU, BF16, 5000, 16, "forward")
    assert tile.variant == "split"
    with lora_tiles.forced_variant("ticket"):
        forced = lora_tiles.lora_tile(GPU, BF16, 5000, 16, "forward")
    assert forced == lora_tables.LORA_16BIT["sm_90"]["large"]
    assert [prefix_tiles.variant(GPU, queries) for queries in (63, 64)] == ["fused", "split"]


def test_prefix_attention_by_tma_has_entries_of_its_own_and_may_have_none(use: Use) -> None:
    use({"sm_90": {"prefix": {"16bit": {"tma key 128": "32x64x4x3/200", "tma query 64": None}}}})

    def tile(launch: str, size: int, tma: bool) -> PrefixTile:
        return prefix_tiles.prefix_tile(GPU, BF16, size, launch, False, tma)

    assert tile("key", 128, True) == PrefixTile(32, 64, 4, 3, True, 200)
    assert tile("key", 128, False) == prefix_tiles.family_tile("16bit", "sm_90", "key", 128, False)
    assert tile("query", 64, True) == tile("query", 64, False) and not tile("query", 64, True).tma
    assert tile("query", 128, True).tma


def test_explain_names_the_file_where_it_has_a_say(use: Use) -> None:
    path = use({"sm_90": {"prefix": {"16bit": {"key 128": "32x64x4x2", "tma key 128": None}}}})
    plan = prefix_tiles.plan(GPU, BF16, 128, False)
    assert f"tiles of {path}" in plan and "dk and dv 32x64, 4 warps, 2 stages" in plan
    assert str(path) not in lora_tiles.lora_plan(GPU, BF16, 5000, 4096, 4096, 16, False)


@pytest.mark.skipif(not triton_runtime.interpreted(), reason="needs TRITON_INTERPRET=1")
def test_interpreted_launches_take_a_file_s_tiles(use: Use) -> None:
    path = use({"interpreted": {
        "lora": {"fp32": {"small": "recompute 16x32x16x4x1"}},
        "prefix": {"fp32": {"forward 64": "32x16x4x1"}},
    }})  # fmt: skip
    x, w = torch.randn(40, 32), torch.randn(48, 32)
    a, b = torch.randn(8, 32), torch.randn(48, 8)
    found = explain(lora_linear, x, w, a, b, backend="triton").plan
    assert found is not None and "forward recompute 16x32x16" in found and str(path) in found
    y = lora_linear(x, w, a, b, backend="triton")
    assert torch.allclose(y, x @ w.t() + x @ a.t() @ b.t(), atol=1e-4)
    q, p = torch.randn(1, 2, 33, 16), torch.randn(2, 3, 16)
    assert "forward 32x16" in str(explain(prefix_attention, q, q, q, p, p, backend="triton"))
    out = prefix_attention(q, q, q, p, p, backend="triton")
    overrides.STATE.file = overrides.Overrides({})
    assert torch.allclose(out, prefix_attention(q, q, q, p, p, backend="triton"), atol=1e-5)


ONE = "lora", "16bit", "large"
TMA = "lora", "16bit", "tma large"
BAD: dict[str, tuple[tuple[str, str, str, str], Any, str]] = {
    "family": (("sm_75", *ONE), "ticket 64x64x64x4x3", "family must be one of sm_80"),
    "table": (("sm_90", "loar", "16bit", "large"), "split", "sm_90: must be one of lora, prefix"),
    "width": (("sm_90", "lora", "8bit", "large"), "split", "sm_90/lora: must be one of 16bit"),
    "name": (("sm_90", "lora", "16bit", "huge"), "split", "lora/16bit: must be one of decode"),
    "variant": (("sm_90", *ONE), "tickets 64x64x64x4x3", "sm_90/lora/16bit/large: tickets 64x64"),
    "sizes": (("sm_90", *ONE), "ticket 64x64x64x4", "is no tile of lora"),
    "a number": (("sm_90", *ONE), 64, "is no tile of lora"),
    "power of two": (("sm_90", *ONE), "ticket 96x64x64x4x3", "no power of two from 16 to 512"),
    "small": (("sm_90", *ONE), "ticket 8x64x64x4x3", "no power of two from 16 to 512"),
    "warps": (("sm_90", *ONE), "ticket 64x64x64x3x3", "number of warps"),
    "stages": (("sm_90", *ONE), "ticket 64x64x64x4x9", "number of stages"),
    "registers": (("sm_90", *ONE), "ticket 256x256x64x4x2", "needs 512 registers a thread"),
    "memory": (("sm_86", *ONE), "ticket 128x256x64x8x4", "144 KiB of shared memory, sm_86 has 99"),
    "tma elsewhere": (("sm_80", *TMA), "ticket_tma 128x128x64x8x3", "Hopper"),
    "tma in 32 bits": (("sm_90", "lora", "fp32", "tma large"), "ticket_tma 64x64x32x4x3", "16-bit"),
    "tma by pointers": (("sm_90", *TMA), "ticket 64x64x64x4x3", "there alone"),
    "pointers by tma": (("sm_90", *ONE), "ticket_tma 64x64x64x4x3", "there alone"),
    "masked": (("sm_90", "lora", "16bit", "masked"), "recompute 16x64x64x4x3", "makes its own s"),
    "keys": (("sm_90", "prefix", "16bit", "key 256"), "32x128x4x2", "needs 512 registers"),
    "bound": (("sm_90", "prefix", "16bit", "key 64"), "64x64x4x2/300", "not 32 to 255"),
    "keys by tma": (("sm_80", "prefix", "16bit", "tma key 64"), "64x64x4x2", "Hopper"),
    "null": (("sm_90", "prefix", "16bit", "key 64"), None, "is no tile of prefix"),
    "ranks": (("sm_90", "reduction", "16bit", "64"), "64x64x128x4x2", "blocks of 128 ranks"),
    "limit": (("sm_90", "limits", "tma_above", "large"), 1, "must be one of tma_from"),
    "limit's name": (("sm_90", "limits", "tma_from", "huge"), 1, "must be one of small"),
    "negative": (("sm_90", "limits", "tma_from", "large"), -1, "not negative, or null"),
    "half": (("sm_90", "limits", "split_from", "queries"), 0.5, "not negative, or null"),
    "never few": (("sm_90", "limits", "few_tokens", "adapter"), None, "number of tokens, got null"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_by_name(case: str, use: Use) -> None:
    (family, table, width, name), value, message = BAD[case]
    path = use({family: {table: {width: {name: value}}}})
    with pytest.raises(ValueError) as raised:
        lora_tiles.lora_tile(GPU, BF16, 5000, 16, "forward")
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"{overrides.VARIABLE}: {path}: ")


@pytest.mark.parametrize("content", ["", "[]", '{"families": 3}', '{"families": {"sm_90": []}}'])
def test_what_is_no_file_of_tiles_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{overrides.VARIABLE}: {path}"):
        tile_file.load(path)
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        tile_file.load(tmp_path / "absent.json")


def present() -> Iterator[tuple[overrides.Key, Any]]:
    """Yield every entry of the tables that a file could name."""
    for family in tiles.FAMILIES:
        for width, dtype in (("16bit", "bf16"), ("fp32", "fp32")):
            for each, kind, name, tile in lora_tiles.lora_cases():
                if (each, kind) == (family, dtype) and not name.startswith("unaligned"):
                    entry = "tma " * (tile.variant == "ticket_tma") + name
                    yield (family, "lora", width, entry), tile
            for launch, block, dropout, tile in prefix_tiles.prefix_cases(family, width):
                entry = "tma " * tile.tma + prefix_tiles.entry_name(launch, block, dropout)
                yield (family, "prefix", width, entry), tile
            for shape, direction, block, tile in adapter_tiles.adapter_cases(family, width):
                yield (family, "adapter", width, f"{shape} {direction} {block}"), tile
            for block, tile in adapter_tiles.reduction_tiles(family, width).items():
                yield (family, "adapter reduction", width, str(block)), tile
        for block, tile in tiles.family_reduction_tiles(family).items():
            yield (family, "reduction", "16bit", str(block)), tile
        for block, tile in tiles.REDUCTION_TILES_32BIT.items():
            yield (family, "reduction", "fp32", str(block)), tile


def test_every_present_tile_can_be_written_and_read(tmp_path: Path) -> None:
    entries = dict(present())
    assert len(entries) > 600
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"families": tile_file.dumped(entries)}))
    read = tile_file.load(path).entries
    assert set(read) == set(entries)
    for key, tile in entries.items():
        known = {name: value for name, value in vars(tile).items() if name != "ahead"}
        assert {name: vars(read[key])[name] for name in known} == known, key


def test_launches_of_one_override_are_not_another_s() -> None:
    from peft_kernels.core.launches import _settings

    one, other = (overrides.Overrides({}) for _ in range(2))
    keys = []
    for each in (None, one, other):
        with overrides.forced(each):
            keys.append(_settings(torch.device("cpu"), False))
    assert len(set(keys)) == 3 and _settings(torch.device("cpu"), False) == keys[0]
