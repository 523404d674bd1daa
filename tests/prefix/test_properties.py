"""Any layout and option, on every backend that runs here, against float64 and a dense mask.

A backend joins by being in ``PREFIX_ATTENTION``; the 1.5x rule judges values and all gradients.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels import BackendUnavailable, explain, prefix_attention
from peft_kernels.prefix.dispatch import PREFIX_ATTENTION
from tests.prefix.problems import Problem, check, problem

BACKENDS = [backend.name for backend in PREFIX_ATTENTION.backends]
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Triton's interpreter is slow; sizes beyond a tile of its own are in the backends' own tests.
_MOST = {"triton": 20}
_EXAMPLES = {"triton": 12, "cuda": 12}


def _serves(backend: str, given: Problem) -> bool:
    arguments = given.tensors | given.options
    try:
        found = explain(prefix_attention, **arguments, dropout_p=given.dropout_p, backend=backend)
    except BackendUnavailable:
        return False
    return found.backend == backend


@st.composite
def _problems(draw: st.DrawFn, dtypes: list[torch.dtype], most: int) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    length = st.integers(1, most)
    kv_heads = draw(st.integers(1, 3))
    causal, packed = draw(st.booleans()), draw(st.booleans())
    keys = draw(length)
    queries = draw(st.one_of(st.just(1), st.integers(1, keys if causal else most)))
    lengths = tuple(draw(st.lists(st.integers(0, most // 2), min_size=1, max_size=3)))
    assume(not packed or sum(lengths) > 0)
    given = problem(
        draw(st.integers(1, 3)),
        kv_heads * draw(st.sampled_from([1, 2, 3])),
        kv_heads,
        queries,
        keys,
        draw(st.one_of(st.integers(0, 9), st.integers(0, most))),
        draw(st.sampled_from([16, 24, 32, 40])),
        dtype=dtype,
        prefix_dtype=draw(st.sampled_from([dtype, torch.float32])) if dtype.itemsize == 2 else None,
        shared=draw(st.booleans()),
        causal=causal,
        window=draw(st.one_of(st.none(), st.integers(1, most))),
        padding=draw(st.sampled_from([None, "left", "right", "random", "all"])),
        lengths=lengths if packed else None,
        gated=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.1, 0.6])),
        scale=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 2**16)),
    )
    return _with_layout(given, draw(st.sampled_from(["packed", "tokens first", "step"])))


def _with_layout(given: Problem, layout: str) -> Problem:
    def tokens_first(t: Tensor) -> Tensor:
        return t.transpose(-2, -3).contiguous().transpose(-2, -3) if t.dim() > 2 else t

    def step(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]

    change = {"packed": lambda t: t, "tokens first": tokens_first, "step": step}[layout]
    tensors = {name: change(t) for name, t in given.tensors.items()}
    return replace(given, tensors=tensors, dout=change(given.dout))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_call_is_as_accurate_as_eager(backend: str) -> None:
    dtypes = [dtype for dtype in _DTYPES if _serves(backend, problem(dtype=dtype))]
    if not dtypes:
        pytest.skip(f"the {backend} backend does not run here: see python -m peft_kernels env")

    @settings(max_examples=_EXAMPLES.get(backend, 60), deadline=None, derandomize=True)
    @drawn(_problems(dtypes, _MOST.get(backend, 40)))
    def run(given: Problem) -> None:
        assume(_serves(backend, given))
        check(given, backend, given.query.dtype)

    run()
