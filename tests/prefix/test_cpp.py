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
from tests.prefix.problems import Problem, check, fused, problem, results

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

# Below, at and above a block of rows (128), a block of keys (128) and a segment of keys (512).
CALLS: dict[str, dict[str, Any]] = {
    "one of everything": dict(batch=1, heads=1, kv_heads=1, queries=1, keys=1, prefix=1),
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
    "multi-head": dict(heads=3, kv_heads=3, queries=80, keys=90, prefix=9, causal=True),
    "chunks of samples": dict(
        batch=35, heads=2, kv_heads=1, queries=3, keys=4, prefix=5, causal=True
    ),
    "prefix of each sample": dict(queries=30, keys=40, prefix=18, shared=False, causal=True),
    "prefix of each sample, chunks of queries": dict(
        heads=8, kv_heads=1, queries=200, keys=200, prefix=18, shared=False, causal=True
    ),
    "decoding": dict(queries=1, keys=200, prefix=20, causal=True),
    "no prefix": dict(queries=30, keys=40, prefix=0, causal=True),
    "prefix alone": dict(queries=30, keys=0, prefix=20),
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
