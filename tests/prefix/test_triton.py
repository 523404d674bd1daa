"""The Triton kernels in the interpreter: numerics, masks, edges, launches, repeatability."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels import explain, prefix_attention
from peft_kernels.core import triton_runtime
from tests.prefix import problems
from tests.prefix.problems import Problem, check, fused, keep_masks, laid_out, results

pytestmark = [
    pytest.mark.skipif(
        not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
        reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
    ),
    pytest.mark.timeout(120),
]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def problem(**options: Any) -> Problem:
    """Return a problem of few programs, each of which the interpreter runs in some 50 ms."""
    return problems.problem(**({"batch": 1, "heads": 2, "kv_heads": 1} | options))


# Tiles are of 16 rows and 16 keys there: sizes that leave whole blocks, edges and blocks unseen.
LAYOUTS: dict[str, dict[str, Any]] = {
    "everything ragged": {"queries": 21, "keys": 37, "prefix": 5, "size": 20},
    "aligned": {"queries": 16, "keys": 32, "prefix": 16, "size": 16},
    "one of everything": {"batch": 4, "heads": 3, "queries": 1, "keys": 1, "prefix": 1},
    "more pairs than start together": {"batch": 66, "heads": 1, "queries": 3, "keys": 17},
    "multi-head": {"batch": 2, "kv_heads": 2, "queries": 18, "keys": 18, "causal": True},
    "grouped": {"batch": 2, "heads": 4, "kv_heads": 2, "queries": 18, "keys": 18, "causal": True},
    "causal": {"queries": 37, "keys": 37, "causal": True},
    "fewer queries than keys": {"queries": 20, "keys": 50, "causal": True},
    "more queries than keys": {"queries": 40, "keys": 9},
    "queries before all keys": {"queries": 40, "keys": 9, "window": 3, "prefix": 0},
    "decoding": {
        "batch": 2, "heads": 4, "kv_heads": 2, "queries": 1, "keys": 33, "size": 40, "causal": True,
    },
    "decoding by as many heads": {
        "batch": 2, "heads": 4, "kv_heads": 4, "queries": 1, "keys": 33, "size": 40, "causal": True,
    },
    "heads of several tiles": {
        "heads": 14, "kv_heads": 2, "queries": 3, "keys": 40, "causal": True, "prefix": 33,
    },
    "window": {"queries": 40, "keys": 40, "window": 7},
    "wide window": {"queries": 60, "keys": 60, "window": 37},
    "causal window": {"queries": 35, "keys": 70, "window": 9, "causal": True},
    "wide causal window": {
        "queries": 40, "keys": 70, "window": 50, "causal": True,
    },
    "window of one": {"queries": 20, "keys": 20, "window": 1, "causal": True},
    "endless window": {"queries": 9, "keys": 20, "window": 2**31 - 1},
    "left padding": {"batch": 2, "queries": 20, "keys": 20, "padding": "left", "causal": True},
    "right padding": {"batch": 2, "queries": 20, "keys": 35, "padding": "right", "causal": True},
    "random padding and window": {
        "batch": 2, "queries": 20, "keys": 20, "padding": "random", "window": 9,
    },
    "a row without keys": {"batch": 2, "queries": 20, "keys": 20, "padding": "all"},
    "nothing seen": {
        "batch": 2, "queries": 18, "keys": 20, "padding": "all", "prefix": 0, "causal": True,
    },
    "folded padding": {"batch": 2, "queries": 2, "keys": 20, "padding": "right", "causal": True},
    "packed": {"lengths": (7, 1, 40, 10), "causal": True},
    "packed, both ways": {"lengths": (40, 3, 17), "prefix": 0},
    "packed, window": {"lengths": (20, 30), "window": 5, "padding": "random"},
    "one packed sequence": {"lengths": (20,), "causal": True},
    "packed, folded": {"heads": 6, "kv_heads": 2, "lengths": (2, 4, 1), "causal": True},
    "no prefix": {"queries": 18, "keys": 18, "prefix": 0, "causal": True},
    "long prefix": {"queries": 18, "keys": 3, "prefix": 33},
    "prefix alone": {"queries": 18, "keys": 0, "prefix": 33},
    "a prefix for each row": {"batch": 3, "queries": 18, "keys": 18, "shared": False},
    "gated": {"queries": 18, "keys": 18, "causal": True, "gated": True},
    "gated, no prefix": {"queries": 18, "keys": 18, "prefix": 0, "gated": True},
    "gated, folded": {
        "heads": 6, "kv_heads": 2, "queries": 2, "keys": 18, "prefix": 33, "gated": True,
    },
    "gated, padding": {"batch": 2, "queries": 9, "keys": 18, "padding": "all", "gated": True},
    "gated, a prefix for each row": {
        "batch": 2, "queries": 9, "keys": 9, "shared": False, "gated": True,
    },
    "dropout": {"queries": 18, "keys": 35, "causal": True, "dropout_p": 0.3},
    "dropout, folded": {
        "heads": 6, "kv_heads": 2, "queries": 3, "keys": 19, "prefix": 18, "dropout_p": 0.3,
    },
    "dropout, gated": {"queries": 18, "keys": 19, "prefix": 18, "dropout_p": 0.3, "gated": True},
    "head size 40": {"queries": 18, "keys": 18, "size": 40, "causal": True},
    "head size 80": {"queries": 18, "keys": 18, "size": 80, "causal": True},
    "head size 256": {"queries": 5, "keys": 18, "size": 256},
    "negative scale": {"queries": 18, "keys": 18, "scale": -0.3, "causal": True},
    "scale of zero": {"queries": 18, "keys": 18, "scale": 0.0, "causal": True},
    "large scores": {"queries": 18, "keys": 35, "prefix": 20, "scale": 30.0},
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_accurate_as_eager(layout: str, dtype: torch.dtype) -> None:
    check(problem(**LAYOUTS[layout], dtype=dtype), "triton", dtype)


@BOTH
@pytest.mark.parametrize("size", [1e-5, 0.02, 0.3, 3.0])
def test_a_gate_of_any_size(size: float, dtype: torch.dtype) -> None:
    """Rows with no key of their own show the gated prefix alone, however small the gate."""
    given = problem(batch=2, queries=9, keys=18, padding="all", gated=True, dtype=dtype)
    tensors = given.tensors | {"gate": torch.tensor([size, -size])}
    found = check(replace(given, tensors=tensors), "triton", dtype)
    assert found["d gate"].abs().min() > 0


@pytest.mark.parametrize("options", [{}, {"padding": "all"}, {"dropout_p": 0.3}], ids=str)
@BOTH
def test_a_gate_of_zero_is_bit_for_bit_no_prefix(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    given = problem(queries=20, keys=37, prefix=8, causal=True, gated=True, dtype=dtype, **options)
    tensors = given.tensors | {"gate": torch.zeros(2)}
    tensors["value"] = torch.where(tensors["value"] < 0, -0.0, tensors["value"])
    inputs = replace(given, tensors=tensors).inputs()
    out, lse = fused(given, inputs, "triton")
    del inputs["gate"]
    if not given.dropout_p:
        # The columns of the mask start behind the prefix.
        bare = {
            name: t[..., :0, :].detach() if name.startswith("prefix") else t
            for name, t in inputs.items()
        }
        expected, expected_lse = fused(given, bare, "triton")
        integer = torch.int16 if dtype == torch.float16 else torch.int32
        assert torch.equal(out.view(integer), expected.view(integer))
        assert torch.equal(lse, expected_lse)
    inputs["prefix_value"] = inputs["prefix_value"].detach() * 1000
    again, _ = fused(given, inputs | {"gate": torch.zeros(2)}, "triton")
    assert torch.equal(out, again)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("queries", "p"), [(18, 0.1), (3, 0.5), (3, 0.999)])
def test_mask_equals_the_specification_bit_for_bit(queries: int, p: float, gated: bool) -> None:
    """Values that are unit vectors show which probabilities are left."""
    prefix, keys = 21, 18
    given = problem(
        heads=4, kv_heads=2, queries=queries, keys=keys, prefix=prefix, size=64, dropout_p=p,
        gated=gated,
    )  # fmt: skip
    units = torch.eye(64).expand(2, 64, 64)
    tensors = given.tensors | {
        "prefix_value": units[:, :prefix],
        "value": units[None, :, prefix : prefix + keys],
    }
    given = replace(given, tensors=tensors, seed=torch.tensor([-(2**61) + 12345]))
    inputs = given.inputs()
    out, _ = fused(given, inputs, "triton")
    expected = keep_masks(given)
    assert expected is not None
    assert torch.equal(out[..., :prefix] != 0, expected[0])
    assert torch.equal(out[..., prefix : prefix + keys] != 0, expected[1])
    # Backward draws the same: each value's gradient is the sum of what is left of its column.
    dvalue = torch.autograd.grad(out, inputs["value"], torch.ones_like(out))[0]
    left = out[..., prefix : prefix + keys].detach().view(1, 2, -1, keys).sum(2)
    torch.testing.assert_close(dvalue[..., 0], left)


def _run(given: Problem) -> dict[str, Tensor]:
    inputs = given.inputs()
    return results(fused(given, inputs, "triton"), inputs, given.dout, given.dlse)


RICH = {"batch": 2, "queries": 20, "keys": 37, "prefix": 19, "causal": True, "dropout_p": 0.2}


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"padding": "all"}], ids=str)
def test_every_output_element_is_written(
    options: dict[str, Any], poisoned_allocations: None
) -> None:
    check(problem(**(RICH | options)), "triton", torch.float32)


@pytest.mark.parametrize("layout", ["causal", "gated", "dropout, folded", "nothing seen"])
def test_nothing_outside_an_output_is_written(layout: str) -> None:
    """The launchers get views in the middle of a guarded buffer."""
    from peft_kernels.prefix import launch

    given = problem(**LAYOUTS[layout])
    tensors = given.tensors
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    prefix_key, prefix_value = tensors["prefix_key"][None], tensors["prefix_value"][None]
    gate = tensors.get("gate")
    seed = given.seed if given.dropout_p else None
    operands = (query, key, value, prefix_key, prefix_value)
    operands += (given.options.get("key_mask"), None, gate, seed)
    rest = (given.options["causal"], 0.25, None, given.dropout_p)

    def guarded(like: Tensor) -> tuple[Tensor, Tensor]:
        buffer = torch.full((like.numel() + 512,), 77.0)
        return buffer, buffer[256 : 256 + like.numel()].view(like.shape)

    rows = query[..., 0]
    saved = [guarded(like) for like in (query, rows, rows)]
    views = [view for _, view in saved]
    launch.prefix_forward(*operands, *rest, *views[:2], None if gate is None else views[2])
    gradients = [guarded(like) for like in operands[:5] + ((gate,) if gate is not None else ())]
    launch.prefix_backward(
        given.dout, given.dlse, *operands, *views[:2], None if gate is None else views[2], *rest,
        *(view for _, view in gradients), *(() if gate is not None else (None,)),
    )  # fmt: skip
    for buffer, view in (*saved[: 2 if gate is None else 3], *gradients):
        assert (buffer[:256] == 77.0).all() and (buffer[-256:] == 77.0).all()
        assert not (view == 77.0).any()


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"shared": False}], ids=str)
def test_runs_repeat_bit_for_bit(options: dict[str, Any]) -> None:
    given = problem(**(RICH | options))
    first, second = _run(given), _run(given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("splits", [1, 4, 5, 12])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per sample"])
def test_the_prefix_is_summed_over_every_row_once(
    splits: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 tiles of rows, or 4 of each sample's: in equal parts, in unequal ones, one in each."""
    from peft_kernels.prefix import launch

    monkeypatch.setattr(launch, "_splits", lambda tiles, *_: min(splits, tiles))
    given = problem(batch=3, heads=4, kv_heads=2, queries=20, keys=5, prefix=19, shared=shared)
    check(given, "triton", torch.float32)


def test_batches_are_split_in_tests_too() -> None:
    from peft_kernels.prefix.launch import _splits

    assert _splits(8, 4, torch.device("cpu")) > 1


def test_no_part_of_a_prefix_gradient_is_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's loop is told that it runs."""
    from peft_kernels.prefix import launch

    monkeypatch.setattr(launch.triton_runtime, "multiprocessors", lambda _: 132)
    device = torch.device("cuda")
    found = {tiles: launch._splits(tiles, 1, device) for tiles in (*range(1, 400), 4096)}
    assert max(found.values()) == 64
    assert all(splits <= tiles for tiles, splits in found.items())


def test_float32_prefixes_beside_float16_get_float32_gradients() -> None:
    given = problem(
        queries=20, keys=20, prefix=19, gated=True, dtype=torch.float16,
        prefix_dtype=torch.float32,
    )  # fmt: skip
    found = check(given, "triton", torch.float16)
    for name in ("d prefix_key", "d prefix_value", "d gate"):
        assert found[name].dtype == torch.float32
        assert not torch.equal(found[name], found[name].half().float())


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_one_launch_forward_and_three_backward(gated: bool, launches: list[str]) -> None:
    given = problem(**RICH, gated=gated)
    inputs = given.inputs()
    out, lse = fused(given, inputs, "triton")
    assert launches == ["_prefix_forward_kernel"]
    launches.clear()
    torch.autograd.backward([out, lse], [given.dout, given.dlse])
    assert (
        launches
        == [
            "_prefix_query_gradient_kernel",
            "_prefix_key_gradient_kernel",
            "_prefix_gradient_kernel",
        ]
        + ["_gate_gradient_kernel"] * gated
    )


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (["query"], ["_prefix_query_gradient_kernel"]),
        (["value"], ["_prefix_key_gradient_kernel"]),
        (["key"], ["_prefix_query_gradient_kernel", "_prefix_key_gradient_kernel"]),
        (["prefix_value"], ["_prefix_gradient_kernel"]),
        (
            ["prefix_key", "prefix_value"],
            ["_prefix_query_gradient_kernel", "_prefix_gradient_kernel"],
        ),
    ],
    ids=str,
)
def test_what_is_frozen_is_not_launched(
    trained: list[str], expected: list[str], launches: list[str]
) -> None:
    given = problem(**RICH, dtype=torch.float16)
    inputs = given.inputs()
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trained)
    out, _ = fused(given, inputs, "triton")
    launches.clear()
    out.backward(given.dout)
    assert launches == expected


@pytest.mark.parametrize("name", ["query", "key", "value", "prefix_key", "prefix_value", "gate"])
def test_each_gradient_alone_is_the_same_as_among_all(name: str) -> None:
    given = problem(**RICH, gated=True)
    expected = _run(given)[f"d {name}"]
    inputs = {each: t.detach() for each, t in given.inputs().items()}
    inputs[name].requires_grad_()
    found = torch.autograd.grad(
        list(fused(given, inputs, "triton")), [inputs[name]], [given.dout, given.dlse]
    )
    assert torch.equal(found[0], expected)


def test_counters_are_zero_again_after_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer over many launches, as on a GPU stream: a stale counter would show."""
    cases = [problem(**(RICH | {"prefix": prefix}), seed=prefix) for prefix in (19, 3)]
    expected = [_run(given) for given in cases]
    buffer = torch.zeros(4096, dtype=torch.int32)
    monkeypatch.setattr(triton_runtime, "counters", lambda device, size: buffer)
    found = [_run(given) for given in cases]
    assert buffer.count_nonzero() == 0
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", ["heads last", "slices", "expanded", "one row"])
def test_strides_change_no_bit(layout: str) -> None:
    strided, packed = laid_out(problem(**RICH, gated=True), layout)
    assert strided.query.stride() != packed.query.stride()
    found, expected = _run(strided), _run(packed)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("options", [{"size": 20}, {"size": 16, "gated": True}], ids=str)
def test_rows_that_start_anywhere_are_copied_first(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    """As on a GPU: padded to heads of 32, or copied as they are."""
    from peft_kernels.prefix import alignment

    given = problem(**(RICH | options))
    moved = {
        name: torch.cat([t, torch.zeros_like(t[..., :4])], -1)[..., :-4] if t.dim() > 2 else t
        for name, t in given.tensors.items()
    }
    given = replace(given, tensors=moved)
    expected = _run(given)
    launched = list(launches)
    seen: list[int] = []
    kept = alignment.aligned

    def aligned(t: Tensor) -> Tensor:
        seen.append(t.shape[-1])
        return kept(t)

    monkeypatch.setattr(alignment, "matters", lambda device: True)
    monkeypatch.setattr(alignment, "aligned", aligned)
    found = _run(given)
    assert seen and launches == 2 * launched
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_inputs_are_left_as_they_are() -> None:
    given = problem(**RICH, gated=True, padding="random")
    before = {name: t.clone() for name, t in given.tensors.items()}
    mask = given.options["key_mask"].clone()
    _run(given)
    assert all(torch.equal(t, before[name]) for name, t in given.tensors.items())
    assert torch.equal(mask, given.options["key_mask"])


def test_explain_names_the_tiles_and_why_wide_heads_run_elsewhere() -> None:
    for size, runs in ((256, True), (257, False)):
        given = problem(queries=1, keys=1, prefix=1, size=size)
        said = explain(prefix_attention, **given.tensors, backend="triton" if runs else None)
        if runs:
            assert str(said.plan).startswith("forward ")
        else:
            assert "256" in said.reasons["triton"]
