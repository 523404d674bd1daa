"""The reference is the maths: float64 gradcheck, and the rules of its index maps."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.prompt.reference import first_kept
from tests.prompt.problems import fused, problem


@pytest.mark.parametrize("position", ["start", "after_padding", 2])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize("trained", ["prompt", "both"])
def test_gradcheck(position: str | int, per_sample: bool, trained: str) -> None:
    given = problem(
        3, 4, 2, 3, dtype=torch.float64, per_sample=per_sample, position=position, vocabulary=5
    )
    prompt, weight = given.leaves()
    weight.requires_grad_(trained == "both")
    assert torch.autograd.gradcheck(
        lambda *leaves: fused(given, list(leaves), "reference").embeddings,
        (prompt, weight),
        nondet_tol=0.0,
    )


def test_first_kept_is_the_end_where_nothing_is_kept() -> None:
    mask = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert first_kept(mask).tolist() == [2, 0, 4]
    assert first_kept(mask[:, :0]).tolist() == [0, 0, 0]


def test_the_gradient_is_summed_in_float32_and_rounded_once() -> None:
    """In bfloat16 or with a second rounding, 256 + 1 + ... + 1 would stay 256."""
    given = problem(130, 1, 1, 4, dtype=torch.bfloat16, padding=None)
    prompt, weight = given.leaves()
    dy = torch.ones_like(given.d_embeddings)
    dy[0] = 256
    embeddings = fused(given, [prompt, weight], "reference").embeddings
    (found,) = torch.autograd.grad(embeddings, [prompt], dy)
    assert found.unique().item() == torch.tensor(256.0 + 129).bfloat16().item() == 384
