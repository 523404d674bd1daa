"""The C++ CPU backend: numerics in float32 and bfloat16, layouts, edges, repeatability."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels import explain, prefix_attention
from peft_kernels.core import extension
from peft_kernels.prefix import cpp
from peft_kernels.prefix.dispatch import PREFIX_ATTENTION
from tests.prefix.problems import Problem, check, check_together, fused, problem, results

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

# Enough numbers in each gradient that eager's worst of them is no luck. Sizes lie
# below, at and above a block of rows (128), a block of keys (128) and a segment of keys (512).
CALLS: dict[str, dict[str, Any]] = {
    # Many samples: eager's worst error over the sixteen numbers of one is luck.
    "one of everything but samples": dict(
        batch=40, heads=1, kv_heads=1, queries=1, keys=1, prefix=1, shared=False
    ),
    "small": dict(causal=True),
    "aligned": dict(queries=64, keys=64, prefix=32, size=64, causal=True),
    "ragged": dict(queries=37, keys=61, prefix=13, size=24, causal=True),
    "not causal": dict(queries=70, keys=50, prefix=5, size=32),
    "head size 80": dict(queries=33, keys=33, prefix=7, size=80, causal=True),
    "head size 96": dict(queries=33, keys=33, prefix=7, size=96),
    "head size 256": dict(queries=19, keys=35, prefix=7, size=256, causal=True),
    "odd head size": dict(queries=9, keys=12, prefix=3, size=21, causal=True),
    "several blocks": dict(batch=1, queries=150, keys=150, prefix=140, causal=True),
    "several segments": dict(batch=1, heads=2, queries=70, keys=600, prefix=530, causal=True),
    "chunks of queries": dict(
        batch=1, heads=8, kv_heads=1, queries=300, keys=300, prefix=6, causal=True
    ),
    "heads beyond a block": dict(batch=1, heads=131, kv_heads=1, queries=3, keys=4, causal=True),
    "multi-query": dict(heads=6, kv_heads=1, queries=20, keys=30, prefix=9, causal=True),
    "multi-head": dict(heads=7, kv_heads=7, queries=80, keys=90, prefix=9, causal=True),
    "chunks of samples": dict(
        batch=35, heads=2, kv_heads=1, queries=3, keys=4, prefix=5, causal=True
    ),
    "prefix of each sample": dict(
        batch=6, queries=30, keys=40, prefix=18, shared=False, causal=True
    ),
    "prefix of each sample, chunks of queries": dict(
        heads=8, kv_heads=1, queries=200, keys=200, prefix=18, shared=False, causal=True
    ),
    "decoding": dict(batch=8, heads=8, queries=1, keys=200, prefix=20, size=32, causal=True),
    "no prefix": dict(queries=30, keys=40, prefix=0, causal=True),
    "prefix alone": dict(batch=4, heads=8, queries=30, keys=0, prefix=20),
    "window": dict(queries=80, keys=200, prefix=20, window=30),
    "causal window": dict(queries=80, keys=200, prefix=20, window=30, causal=True),
    "window of one, no prefix": dict(queries=40, keys=30, prefix=0, window=1),
    "left padding": dict(queries=40, keys=40, prefix=20, padding="left", causal=True),
    "right padding": dict(queries=40, keys=40, prefix=20, padding="right", causal=True),
    "random mask": dict(queries=140, keys=150, prefix=20, padding="random"),
    "nothing kept": dict(queries=40, keys=40, prefix=20, padding="all"),
    "nothing seen": dict(queries=40, keys=40, prefix=0, padding="all", causal=True),
    "packed": dict(lengths=(30, 0, 1, 70, 40), prefix=20, causal=True),
    "packed, not causal, window": dict(lengths=(150, 33), prefix=20, window=20),
    "scale": dict(queries=40, keys=40, prefix=20, scale=0.7),
    "negative scale": dict(queries=40, keys=40, prefix=20, scale=-0.4, causal=True),
}
EVERY_CALL = pytest.mark.parametrize("call", CALLS)


@pytest.fixture(autouse=True)
def built() -> None:
    """Fail, not skip, without the extension: ``make test`` builds it."""
    assert extension.why_not() is None


@pytest.fixture
def portable() -> Iterator[None]:
    """Turn off what is written for one CPU family, as on a CPU that lacks it."""
    assert not extension.load().use_native(False)
    yield
    extension.load().use_native(True)


@DTYPES
@EVERY_CALL
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_as_accurate_as_eager(
    call: str, gated: bool, dropout_p: float, dtype: torch.dtype, poisoned_allocations: None
) -> None:
    check(problem(**CALLS[call], gated=gated, dropout_p=dropout_p, dtype=dtype), "cpp", dtype)


@DTYPES
@EVERY_CALL
def test_portable_path_is_as_accurate_as_eager(
    call: str, dtype: torch.dtype, portable: None, poisoned_allocations: None
) -> None:
    given = problem(**CALLS[call], gated="small" in call, dropout_p=0.1, dtype=dtype)
    check(given, "cpp", dtype)


def test_one_query_is_summed_as_accurately_as_by_a_library() -> None:
    """Which sums a single row's product in lanes, not in one chain over the head."""
    given = [problem(queries=1, keys=133, size=40, causal=True, seed=seed) for seed in range(16)]
    check_together(given, "cpp", torch.float32)


def test_one_query_is_summed_as_accurately_on_the_portable_path(portable: None) -> None:
    test_one_query_is_summed_as_accurately_as_by_a_library()


def _results(given: Problem, **options: Any) -> dict[str, Tensor]:
    inputs = given.inputs()
    given = replace(given, options=given.options | options)
    return results(fused(given, inputs, "cpp"), inputs, given.dout, given.dlse)


def _same(found: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], other[name]) for name in found)


MIXED = dict(batch=3, heads=4, kv_heads=2, queries=70, keys=90, prefix=33, size=40, causal=True)
MANY_ROWS = dict(batch=1, heads=8, kv_heads=1, queries=300, keys=300, prefix=20, causal=True)


@DTYPES
@pytest.mark.parametrize("sizes", [MIXED, MANY_ROWS], ids=["samples", "chunks of queries"])
@pytest.mark.parametrize("gated", [False, True])
def test_no_bit_depends_on_the_number_of_threads_or_the_run(
    sizes: dict[str, Any], gated: bool, dtype: torch.dtype
) -> None:
    given = problem(**sizes, gated=gated, dropout_p=0.1, dtype=dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(_results(given))
    finally:
        torch.set_num_threads(threads)
    assert all(_same(found[0], other) for other in found[1:])


@DTYPES
def test_a_closed_gate_gives_the_attention_without_a_prefix_bit_for_bit(
    dtype: torch.dtype,
) -> None:
    given = problem(**MIXED, gated=True, dtype=dtype)
    closed = given.tensors | {"gate": torch.zeros(4, dtype=dtype)}
    empty = {
        name: t[:, :0] if "prefix" in name else t
        for name, t in given.tensors.items()
        if name != "gate"
    }
    for one, other in zip(fused(given, closed, "cpp"), fused(given, empty, "cpp"), strict=True):
        assert torch.equal(one, other)


@DTYPES
@pytest.mark.parametrize("layout", ["tokens first", "columns of more", "expanded"])
def test_strides_change_no_bit(layout: str, dtype: torch.dtype) -> None:
    given = problem(**MIXED, dtype=dtype)

    def laid(t: Tensor) -> Tensor:
        if layout == "tokens first":
            return t.transpose(-2, -3).contiguous().transpose(-2, -3)
        if layout == "columns of more":
            nan = torch.full_like(t, torch.nan)
            return torch.cat([nan, t, nan], -1)[..., t.shape[-1] : 2 * t.shape[-1]]
        return t[..., :1, :].expand(t.shape)  # one row, again and again

    changed = replace(
        given,
        tensors={name: laid(t) for name, t in given.tensors.items()},
        dout=laid(given.dout),
    )
    assert changed.query.stride() != given.query.stride()
    packed = replace(
        changed,
        tensors={name: t.contiguous() for name, t in changed.tensors.items()},
        dout=changed.dout.contiguous(),
    )
    assert _same(_results(changed), _results(packed))


@DTYPES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("only", ["query", "key", "value", "prefix_key", "prefix_value", "gate"])
def test_what_is_frozen_changes_no_other_gradient(
    only: str, gated: bool, dtype: torch.dtype
) -> None:
    if only == "gate" and not gated:
        return
    given = problem(**MIXED, gated=gated, dropout_p=0.2, dtype=dtype)
    expected = _results(given)
    tensors = given.tensors | {only: given.tensors[only].detach().requires_grad_()}
    out, lse = fused(given, tensors, "cpp")
    differentiable = [lse] if lse.requires_grad else []
    torch.autograd.backward(
        [out, *differentiable], [given.dout, *[given.dlse] * len(differentiable)]
    )
    assert torch.equal(tensors[only].grad, expected[f"d {only}"])


@DTYPES
def test_nothing_is_written_beside_the_outputs_or_into_the_inputs(dtype: torch.dtype) -> None:
    """Outputs lie between guard bands; everything within is written."""
    sizes = {"queries": 37, "keys": 45, "prefix": 13, "size": 24}
    given = problem(**sizes, dtype=dtype)  # type: ignore[arg-type]
    t = given.tensors
    guard, buffers = 64, []

    def guarded(like: Tensor) -> Tensor:
        buffers.append(torch.full((like.numel() + 2 * guard,), torch.nan, dtype=like.dtype))
        return buffers[-1][guard:-guard].view(like.shape)

    before = {name: value.clone() for name, value in t.items()}
    prefix = t["prefix_key"][None], t["prefix_value"][None]
    operands = (t["query"], t["key"], t["value"], *prefix, None, None, None, None)
    out, lse = guarded(t["query"]), guarded(given.dlse)
    cpp.forward(*operands, True, 0.2, 20, 0.0, out, lse, None)
    written = [guarded(each) for each in operands[:5]]
    cpp.backward(
        given.dout, given.dlse, *operands, out, lse, None, True, 0.2, 20, 0.0, *written, None
    )
    assert len(buffers) == 7
    for buffer in buffers:
        assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all()
        assert buffer[guard:-guard].isfinite().all()
    assert all(torch.equal(before[name], t[name]) for name in t)


@DTYPES
def test_what_the_key_mask_hides_is_not_read(dtype: torch.dtype) -> None:
    """Slots of a cache that were never written may hold anything, NaN too."""
    given = problem(**MIXED, padding="left", dtype=dtype)
    hidden = ~given.options["key_mask"][:, None, :, None]
    assert hidden.any()
    loud = {
        name: t.masked_fill(hidden, torch.nan) if name in ("key", "value") else t
        for name, t in given.tensors.items()
    }
    assert _same(_results(replace(given, tensors=loud)), _results(given))


@DTYPES
def test_a_nan_spoils_the_queries_that_see_it_and_no_sample_beside(dtype: torch.dtype) -> None:
    given = problem(**MIXED, dtype=dtype)
    key = given.tensors["key"].clone()
    key[1, 0, 50] = torch.nan
    out, lse = fused(given, given.tensors | {"key": key}, "cpp")
    first = 50 + 70 - 90  # query that stands at key 50
    assert out[1, :2, first:].isnan().all() and lse[1, :2, first:].isnan().all()
    assert out[[0, 2]].isfinite().all() and out[1, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_refused_with_the_reason(dtype: torch.dtype) -> None:
    given = problem(dtype=dtype)
    found = explain(prefix_attention, **given.tensors)
    assert found.backend == "reference"
    assert "float32 and bfloat16" in found.reasons["cpp"]


def test_a_cpu_call_runs_here_unless_told_otherwise() -> None:
    assert explain(prefix_attention, **problem().tensors).backend == "cpp"
    assert [each.name for each in PREFIX_ATTENTION.order("cpu")] == ["cpp", "reference"]
