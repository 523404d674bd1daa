"""The token-split reduction in Triton's interpreter: any number of parts, any of the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels.core import rng, tiles, triton_runtime

pytestmark = [
    pytest.mark.skipif(
        not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
        reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
    ),
    pytest.mark.timeout(120),
]

TOKENS, C0, C1, RANK = 230, 40, 70, 21
SEED, P = torch.tensor([77]), 0.25


@pytest.fixture(params=[1, 2, 8, 64])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    from peft_kernels.core import token_reduction

    monkeypatch.setattr(token_reduction, "_splits", lambda *_: request.param)
    return int(request.param)


def _tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = ((TOKENS, C0), (TOKENS, RANK), (TOKENS, C1), (TOKENS, RANK))
    v0, low0, v1, low1 = (torch.randn(size) for size in sizes)
    return v0, low0, v1, low1


def _reduce(tensors: tuple[Tensor, ...], outputs: tuple[Tensor | None, ...], p: float) -> None:
    from peft_kernels.core.token_reduction import Factor, token_reduction

    v0, low0, v1, low1 = tensors
    out0, out1, colsum = outputs
    token_reduction(
        Factor(v0, low0, out0),
        Factor(v1, low1, out1),
        colsum,
        tiles.reduction_tile(v0.device, v0.dtype, RANK),
        seed=SEED if p else None,
        dropout_p=p,
        precision="ieee",
    )


def _poisoned(*size: int) -> Tensor:
    return torch.full(size, float("nan"))


@pytest.mark.parametrize("p", [0.0, P])
def test_sums_over_every_token_once(splits: int, p: float) -> None:
    """64 parts of 230 tokens: most of them have no token at all."""
    tensors = v0, low0, v1, low1 = _tensors()
    out0, out1, colsum = _poisoned(RANK, C0), _poisoned(C1, RANK), _poisoned(C1)
    _reduce(tensors, (out0.t(), out1, colsum), p)
    kept = v0 * rng.dropout_mask(SEED, TOKENS, C0, p) if p else v0
    torch.testing.assert_close(out0, (low0.double().t() @ kept.double()).float())
    torch.testing.assert_close(out1, (v1.double().t() @ low1.double()).float())
    torch.testing.assert_close(colsum, v1.double().sum(0).float())


@pytest.mark.parametrize("wanted", ["out0", "out1", "colsum"])
def test_one_output_alone_is_what_it_is_among_all(splits: int, wanted: str) -> None:
    tensors = _tensors()
    every = {
        "out0": _poisoned(C0, RANK),
        "out1": _poisoned(C1, RANK),
        "colsum": _poisoned(C1),
    }
    _reduce(tensors, tuple(every.values()), P)
    alone = {name: torch.full_like(t, float("nan")) for name, t in every.items()}
    _reduce(tensors, tuple(t if name == wanted else None for name, t in alone.items()), P)
    assert torch.equal(alone[wanted], every[wanted])
    assert all(t.isnan().all() for name, t in alone.items() if name != wanted)


def test_enough_programs_are_wanted_that_tests_of_lora_split_too() -> None:
    from peft_kernels.core.token_reduction import _splits

    assert _splits(130, 4, 32, torch.device("cpu")) > 1
