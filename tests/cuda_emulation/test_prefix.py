"""Prefix attention's CUDA kernels on the CPU: numerics, masks, edges, equal bits in every order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels.prefix import cuda
from tests.cuda_emulation import build
from tests.cuda_emulation.emulated import ORDERS
from tests.lora.conftest import poisoned_allocations
from tests.prefix.problems import (
    Problem,
    check,
    check_together,
    finite,
    fused,
    keep_masks,
    laid_out,
    problem,
    results,
)

__all__ = ["poisoned_allocations"]

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
# The two of 16 bits differ in how they are converted and multiplied alone.
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])

# Tiles are of 64 rows and of 64 keys, or 32 of float: sizes that leave whole blocks, edges and
# blocks unseen.
ONE: dict[str, Any] = {"batch": 1, "heads": 2, "kv_heads": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "everything ragged": {"queries": 71, "keys": 67, "prefix": 5, "size": 20},
    "aligned": ONE | {"queries": 64, "keys": 64, "prefix": 64, "size": 64},
    "one of everything": {"batch": 4, "heads": 3, "kv_heads": 1, "queries": 1, "keys": 1,
                          "prefix": 1},
    "multi-head": {"kv_heads": 4, "queries": 18, "keys": 18, "causal": True},
    "grouped, causal": {"queries": 70, "keys": 70, "causal": True},
    "fewer queries than keys": ONE | {"queries": 20, "keys": 150, "causal": True},
    "more queries than keys": ONE | {"queries": 140, "keys": 9},
    "decoding": {"queries": 1, "keys": 133, "size": 40, "causal": True},
    "heads of several tiles": {"heads": 14, "queries": 13, "keys": 40, "causal": True,
                               "prefix": 33},
    "window": ONE | {"queries": 140, "keys": 140, "window": 7},
    "wide window": ONE | {"queries": 140, "keys": 140, "window": 77},
    "causal window": ONE | {"queries": 75, "keys": 170, "window": 9, "causal": True},
    "window of one": ONE | {"queries": 20, "keys": 20, "window": 1, "causal": True},
    "endless window": ONE | {"queries": 9, "keys": 20, "window": 2**31 - 1},
    "left padding": {"queries": 70, "keys": 70, "padding": "left", "causal": True},
    "right padding": {"queries": 20, "keys": 85, "padding": "right", "causal": True},
    "random padding and window": {"queries": 20, "keys": 20, "padding": "random", "window": 9},
    "a row without keys": {"queries": 20, "keys": 20, "padding": "all"},
    "nothing seen": {"queries": 18, "keys": 20, "padding": "all", "prefix": 0, "causal": True},
    "one key in the last tile": ONE | {"queries": 64, "keys": 65, "causal": True},
    "one key in the first tile": ONE | {"queries": 66, "keys": 66, "window": 2, "causal": True},
    "packed": ONE | {"lengths": (7, 1, 90, 40), "causal": True},
    "packed, both ways": ONE | {"lengths": (70, 3, 67), "prefix": 0},
    "packed, window": ONE | {"lengths": (20, 30), "window": 5, "padding": "random"},
    "one packed sequence": ONE | {"lengths": (20,), "causal": True},
    "packed, several heads": {"heads": 6, "lengths": (2, 0, 4, 1), "causal": True},
    "no prefix": {"queries": 18, "keys": 18, "prefix": 0, "causal": True},
    "long prefix": ONE | {"queries": 18, "keys": 3, "prefix": 133},
    "prefix alone": ONE | {"queries": 18, "keys": 0, "prefix": 33},
    "a prefix for each row": {"batch": 3, "queries": 18, "keys": 18, "shared": False},
    "gated": {"queries": 70, "keys": 70, "causal": True, "gated": True},
    "gated, no prefix": {"queries": 18, "keys": 18, "prefix": 0, "gated": True},
    "gated, several heads": {"heads": 6, "queries": 2, "keys": 18, "prefix": 73, "gated": True},
    "gated, padding": {"queries": 9, "keys": 18, "padding": "all", "gated": True},
    "gated, a prefix for each row": {"queries": 9, "keys": 9, "shared": False, "gated": True},
    "dropout": {"queries": 67, "keys": 70, "causal": True, "dropout_p": 0.3},
    "dropout, several heads": {"heads": 6, "queries": 3, "keys": 19, "prefix": 18,
                               "dropout_p": 0.3},
    "dropout, gated": {"queries": 18, "keys": 70, "prefix": 18, "dropout_p": 0.3, "gated": True},
    "head size 1": {"queries": 18, "keys": 18, "size": 1},
    "head size 80": {"queries": 18, "keys": 18, "size": 80, "causal": True},
    "head size 200": ONE | {"queries": 18, "keys": 18, "size": 200},
    "head size 256": ONE | {"queries": 5, "keys": 18, "size": 256},
    "negative scale": ONE | {"queries": 18, "keys": 18, "scale": -0.3, "causal": True},
    "scale of zero": ONE | {"queries": 18, "keys": 18, "scale": 0.0, "causal": True},
    "large scores": ONE | {"queries": 18, "keys": 35, "prefix": 20, "scale": 30.0},
    "large scores, several samples": {"queries": 18, "keys": 35, "prefix": 20, "scale": 30.0},
}  # fmt: skip
# Few numbers, or few that decide: several problems are judged as one.
FEW = ("one of everything", "head size 1", "large scores", "decoding")
# Several tiles of rows, of keys and of the prefix; parts of the prefix's sums.
RICH: dict[str, Any] = {
    "batch": 2, "heads": 2, "kv_heads": 1, "queries": 40, "keys": 90, "prefix": 69, "size": 24,
    "causal": True, "dropout_p": 0.2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def emulated(device: build.Emulation) -> build.Emulation:
    return device


def run(given: Problem) -> dict[str, Tensor]:
    inputs = given.inputs()
    return results(fused(given, inputs, "cuda"), inputs, given.dout, given.dlse)


def same(found: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], other[name]) for name in found)


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_accurate_as_eager(layout: str, dtype: torch.dtype, poisoned_allocations: None) -> None:
    seeds = range(16 if layout in FEW else 1)
    cases = [problem(**LAYOUTS[layout], dtype=dtype, seed=seed) for seed in seeds]
    check_together(cases, "cuda", dtype)


@pytest.mark.parametrize(
    "layout", ["grouped, causal", "gated, padding", "packed, window", "head size 80"]
)
def test_as_accurate_as_eager_in_bfloat16(layout: str, poisoned_allocations: None) -> None:
    check(problem(**LAYOUTS[layout], dtype=torch.bfloat16), "cuda", torch.bfloat16)


@DTYPES
@GATED
def test_the_same_bits_in_every_order(
    emulated: build.Emulation, gated: bool, dtype: torch.dtype
) -> None:
    given = problem(**RICH, gated=gated, padding="left", dtype=dtype)
    found = [check(given, "cuda", dtype)]
    for order in ORDERS[1:]:
        emulated.order(*order)
        found.append(run(given))
    emulated.order(build.ASCENDING)
    for other in found[1:]:
        other["lse"] = finite(other["lse"])  # as check() returns it
        assert same(found[0], other)


@BOTH
def test_several_slices_of_the_head_in_every_order(
    emulated: build.Emulation, dtype: torch.dtype
) -> None:
    given = problem(**ONE, queries=9, keys=70, prefix=5, size=136, causal=True, dtype=dtype)
    found = [check(given, "cuda", dtype)]
    for order in ORDERS[2:]:
        emulated.order(*order)
        found.append(run(given))
    emulated.order(build.ASCENDING)
    assert same(found[0], found[1]) and same(found[0], found[2])


@BOTH
@pytest.mark.parametrize("size", [1e-5, 0.02, 0.3, 3.0])
def test_a_gate_of_any_size(size: float, dtype: torch.dtype) -> None:
    """Rows with no key of their own show the gated prefix alone, however small the gate."""
    given = problem(
        **ONE | {"batch": 2}, queries=9, keys=18, padding="all", gated=True, dtype=dtype
    )
    tensors = given.tensors | {"gate": torch.tensor([size, -size])}
    found = check(replace(given, tensors=tensors), "cuda", dtype)
    assert found["d gate"].abs().min() > 0


@DTYPES
@pytest.mark.parametrize("padding", [None, "all"])
def test_a_gate_of_zero_is_bit_for_bit_no_prefix(padding: str | None, dtype: torch.dtype) -> None:
    given = problem(
        queries=20, keys=37, prefix=8, causal=True, gated=True, dtype=dtype, padding=padding
    )
    tensors = given.tensors | {"gate": torch.zeros(4)}
    tensors["value"] = torch.where(tensors["value"] < 0, -0.0, tensors["value"])
    inputs = replace(given, tensors=tensors).inputs()
    out, lse = fused(given, inputs, "cuda")
    bare = {
        name: t[..., :0, :].detach() if name.startswith("prefix") else t
        for name, t in inputs.items()
        if name != "gate"
    }
    expected, expected_lse = fused(given, bare, "cuda")
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(integer), expected.view(integer))
    assert torch.equal(lse, expected_lse)


@BOTH
@GATED
@pytest.mark.parametrize(("queries", "p"), [(18, 0.1), (3, 0.5), (3, 0.999)])
def test_mask_equals_the_specification_bit_for_bit(
    queries: int, p: float, gated: bool, dtype: torch.dtype
) -> None:
    """Values that are unit vectors show which probabilities are left."""
    prefix, keys = 21, 18
    given = problem(
        heads=4, kv_heads=2, queries=queries, keys=keys, prefix=prefix, size=64, dropout_p=p,
        gated=gated, dtype=dtype,
    )  # fmt: skip
    units = torch.eye(64, dtype=dtype).expand(2, 64, 64)
    tensors = given.tensors | {
        "prefix_value": units[:, :prefix],
        "value": units[None, :, prefix : prefix + keys].expand(2, -1, -1, -1),
    }
    given = replace(given, tensors=tensors, seed=torch.tensor([-(2**61) + 12345]))
    inputs = given.inputs()
    out, _ = fused(given, inputs, "cuda")
    expected = keep_masks(given)
    assert expected is not None
    assert torch.equal(out[..., :prefix] != 0, expected[0])
    assert torch.equal(out[..., prefix : prefix + keys] != 0, expected[1])
    # Backward draws the same: each value's gradient is the sum of what is left of its column.
    dvalue = torch.autograd.grad(out, inputs["value"], torch.ones_like(out))[0]
    left = out[..., prefix : prefix + keys].detach().float().view(2, 2, -1, keys).sum(2)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(dvalue[..., 0].float(), left, rtol=tolerance, atol=tolerance)


@BOTH
@pytest.mark.parametrize("layout", ["heads last", "slices", "one row", "shifted"])
def test_strides_change_no_bit(layout: str, dtype: torch.dtype) -> None:
    strided, packed = laid_out(problem(**RICH, gated=True, dtype=dtype), layout)
    assert same(run(strided), run(packed))


@pytest.mark.parametrize(
    ("gated", "dtype"), [(True, torch.float32), (False, torch.float16)], ids=["gated", "plain"]
)
@pytest.mark.parametrize("name", ["query", "key", "value", "prefix_key", "prefix_value", "gate"])
def test_each_gradient_alone_is_the_same_as_among_all(
    name: str, dtype: torch.dtype, gated: bool, poisoned_allocations: None
) -> None:
    given = problem(**RICH, gated=gated, dtype=dtype)
    if name not in given.tensors:
        return
    expected = run(given)[f"d {name}"]
    inputs = {each: t.detach() for each, t in given.inputs().items()}
    inputs[name].requires_grad_()
    out, lse = fused(given, inputs, "cuda")
    outputs = [each for each in (out, lse) if each.requires_grad]
    found = torch.autograd.grad(outputs, [inputs[name]], [given.dout, given.dlse][: len(outputs)])
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (["query"], ["query_gradient"]),
        (["value"], ["key_gradient"]),
        (["key"], ["query_gradient", "key_gradient"]),
        (["prefix_value"], ["key_gradient", "parts"]),
        (["prefix_key", "prefix_value"], ["query_gradient", "key_gradient", "parts", "parts"]),
        (["gate"], ["query_gradient", "gate_gradient"]),
    ],
    ids=str,
)
def test_what_is_frozen_is_not_launched(
    trained: list[str], expected: list[str], emulated: build.Emulation
) -> None:
    given = problem(**RICH, gated=trained == ["gate"], dtype=torch.float16)
    inputs = given.inputs()
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trained)
    emulated.launched()
    out, _ = fused(given, inputs, "cuda")
    assert emulated.launched() == ["prefix_forward_kernel"]
    out.backward(given.dout)
    assert emulated.launched() == [f"prefix_{each}_kernel" for each in expected]


@pytest.mark.parametrize("splits", [1, 2, 16])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per sample"])
def test_the_prefix_is_summed_over_every_row_once(
    splits: int, shared: bool, monkeypatch: pytest.MonkeyPatch, poisoned_allocations: None
) -> None:
    """16 parts of fewer tiles of rows: some have none."""
    monkeypatch.setattr(cuda, "_splits", lambda *_: splits)
    check(problem(batch=3, queries=40, keys=5, prefix=69, shared=shared), "cuda", torch.float32)


def test_float32_prefixes_beside_float16_get_float32_gradients() -> None:
    given = problem(
        queries=20, keys=20, prefix=19, gated=True, dtype=torch.float16,
        prefix_dtype=torch.float32,
    )  # fmt: skip
    found = check(given, "cuda", torch.float16)
    for name in ("d prefix_key", "d prefix_value", "d gate"):
        assert found[name].dtype == torch.float32
        assert not torch.equal(found[name], found[name].half().float())


def test_a_softmax_over_more_keys_than_the_call_has_is_refused() -> None:
    with pytest.raises(ValueError, match="partial=True is not served"):
        cuda.backward(*[torch.empty(0)] * 24, partial=True)  # type: ignore[arg-type]


@BOTH
@pytest.mark.parametrize("layout", ["grouped, causal", "gated", "dropout, several heads"])
def test_nothing_outside_an_output_is_written(layout: str, dtype: torch.dtype) -> None:
    """The launchers get views in the middle of a guarded buffer."""
    given = problem(**LAYOUTS[layout], dtype=dtype)
    tensors = given.tensors
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    prefix_key, prefix_value = tensors["prefix_key"][None], tensors["prefix_value"][None]
    gate = tensors["gate"].float() if "gate" in tensors else None
    seed = given.seed if given.dropout_p else None
    operands = (query, key, value, prefix_key, prefix_value, None, None, gate, seed)
    rest = (given.options["causal"], 0.25, None, given.dropout_p)

    def guarded(like: Tensor) -> tuple[Tensor, Tensor]:
        buffer = torch.full((like.numel() + 512,), 77.0, dtype=like.dtype)
        return buffer, buffer[256 : 256 + like.numel()].view(like.shape)

    rows = query[..., 0].float()
    saved = [guarded(like) for like in (query, rows, rows)]
    views = [view for _, view in saved]
    cuda.forward(*operands, *rest, *views[:2], None if gate is None else views[2])
    gradients = [guarded(like) for like in operands[:5]]
    gradients += [] if gate is None else [guarded(gate)]
    cuda.backward(
        given.dout, given.dlse, *operands, *views[:2], None if gate is None else views[2], *rest,
        *(view for _, view in gradients), *(() if gate is not None else (None,)),
    )  # fmt: skip
    for buffer, view in (*saved[: 2 if gate is None else 3], *gradients):
        assert (buffer[:256] == 77.0).all() and (buffer[-256:] == 77.0).all()
        assert not (view == 77.0).any()
