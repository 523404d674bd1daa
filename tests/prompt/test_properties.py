"""Any sizes, paddings, positions, dtypes and layouts, on every backend that runs here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels import PromptOutput, explain, prompt_embedding
from tests.prompt.problems import Problem, assert_same, eager, fused, gradients, problem

_DTYPES = {
    "reference": [torch.float64, torch.float32, torch.float16, torch.bfloat16],
    "cpp": [torch.float64, torch.float32, torch.float16, torch.bfloat16],
    "triton": [torch.float32, torch.float16],
}


@st.composite
def _problems(draw: st.DrawFn, dtypes: list[torch.dtype]) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    tokens = draw(st.integers(0, 20))
    vocabulary = draw(st.integers(1, 30))
    given = problem(
        draw(st.one_of(st.integers(0, 6), st.sampled_from([16, 17, 40]))),
        tokens,
        draw(st.integers(0, 9)),
        draw(st.one_of(st.integers(1, 40), st.sampled_from([127, 130]))),
        vocabulary=vocabulary,
        dtype=dtype,
        prompt_dtype=draw(st.sampled_from([dtype, torch.promote_types(dtype, torch.float32)])),
        per_sample=draw(st.booleans()),
        padding=draw(st.sampled_from(["left", "right", "holes", None])),
        mask_dtype=draw(st.sampled_from([torch.bool, torch.int64, torch.float32])),
        labels=draw(st.booleans()),
        position=draw(st.sampled_from(["start", "after_padding", draw(st.integers(0, tokens))])),
        padding_idx=draw(st.sampled_from([None, draw(st.integers(0, vocabulary - 1))])),
        seed=draw(st.integers(0, 2**16)),
    )
    return _with_layout(given, draw(st.sampled_from(["packed", "sliced", "transposed"])))


def _with_layout(given: Problem, layout: str) -> Problem:
    def change(t: Tensor) -> Tensor:
        if layout == "sliced":
            return torch.cat([t, torch.full_like(t, 1)], -1)[..., : t.shape[-1]]
        if layout == "transposed":
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        return t

    return replace(
        given,
        input_ids=change(given.input_ids),
        weight=change(given.weight),
        prompt=change(given.prompt),
        mask=None if given.mask is None else change(given.mask),
        labels=None if given.labels is None else change(given.labels),
        d_embeddings=change(given.d_embeddings),
    )


def _check(given: Problem, backend: str, trained: tuple[bool, bool]) -> None:
    leaves, wide = given.leaves(), given.leaves(torch.float64)
    positive = [t.detach().abs().requires_grad_() for t in wide]
    for each in (leaves, wide, positive):
        for leaf, needed in zip(each, trained, strict=True):
            leaf.requires_grad_(needed)
    output, expected = fused(given, leaves, backend), eager(given, leaves)
    for name in PromptOutput._fields:
        assert_same(getattr(output, name), getattr(expected, name), name)
    if not any(trained):
        return
    found, exact = gradients(given, output, leaves), gradients(given, eager(given, wide), wide)
    magnitudes = replace(given, d_embeddings=given.d_embeddings.abs())
    magnitude = gradients(magnitudes, eager(given, positive), positive)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.dtype == leaves[name == "weight"].dtype
        # One rounding of the result, and of a float32 sum a few.
        unit = torch.finfo(value.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
        assert ((value.double() - exact[name]).abs() <= unit * magnitude[name]).all(), name


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_any_call_agrees_with_eager(backend: str) -> None:
    one = problem(1, 1, 1, 1)
    arguments = (one.input_ids, one.weight, one.prompt)
    if explain(prompt_embedding, *arguments, backend=backend).backend != backend:
        pytest.skip(f"the {backend} backend does not run here: see python -m peft_kernels env")

    @settings(max_examples=30 if backend == "triton" else 200, deadline=None, derandomize=True)
    @drawn(_problems(_DTYPES[backend]), st.tuples(st.booleans(), st.booleans()))
    def run(given: Problem, trained: tuple[bool, bool]) -> None:
        _check(given, backend, trained)

    run()
