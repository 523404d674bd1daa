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


# Blocks of 32 make 8 of the tokens: all in one part, 3 or 2 in each, one in each.
@pytest.fixture(params=[1, 3, 8])
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
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 8], indirect=True)
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


@pytest.mark.parametrize("kind", ["number", "learned", "channel"])
@pytest.mark.parametrize("p", [0.0, P])
def test_scaled_sums_and_the_gradient_of_the_scale(splits: int, p: float, kind: str) -> None:
    """As an adapter has it: the second product under dropout and scaled, its low side summed."""
    from peft_kernels.core.token_reduction import Factor, Scaling, token_reduction

    v0, low0, v1, low1 = _tensors()
    weight, bias = torch.randn(C1, RANK), torch.randn(C1)
    scale = {"number": 0.5, "learned": torch.tensor([0.5]), "channel": torch.randn(C1)}[kind]
    learned = isinstance(scale, Tensor)
    gradient = _poisoned(scale.numel()) if isinstance(scale, Tensor) else None
    out0, out1, lowsum, colsum = (
        _poisoned(*size) for size in ((C0, RANK), (C1, RANK), (RANK,), (C1,))
    )
    inverse_keep = 1.0 / (1.0 - p)
    token_reduction(
        Factor(v0, low0, out0),
        Factor(v1, low1, out1),
        colsum,
        tiles.reduction_tile(v0.device, v0.dtype, RANK),
        seed=SEED if p else None,
        dropout_p=p,
        precision="ieee",
        dropped=1,
        lowsum=lowsum,
        scaling=Scaling(scale, inverse_keep, gradient, weight, bias),
    )
    kept = (v1 * rng.dropout_mask(SEED, TOKENS, C1, p) if p else v1).double()
    product, sums = kept.t() @ low1.double(), kept.sum(0)
    factor = (scale.double() if isinstance(scale, Tensor) else scale) * inverse_keep
    by_row = factor[:, None] if kind == "channel" else factor
    torch.testing.assert_close(out0, (v0.double().t() @ low0.double()).float())
    torch.testing.assert_close(lowsum, low0.double().sum(0).float())
    torch.testing.assert_close(out1, (product * by_row).float())
    torch.testing.assert_close(colsum, (sums * factor).float())
    if learned:
        shares = ((weight.double() * product).sum(1) + bias.double() * sums) * inverse_keep
        expected = shares if kind == "channel" else shares.sum()[None]
        torch.testing.assert_close(gradient, expected.float(), rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("p", [0.0, P])
def test_sums_by_products_are_sums(splits: int, p: float) -> None:
    """As tiles of Hopper make them, in float16: bfloat16 is wrong in the interpreter."""
    from peft_kernels.core.token_reduction import Factor, token_reduction

    v0, low0, v1, low1 = (each.half() for each in _tensors())
    lowsum, colsum = _poisoned(RANK), _poisoned(C1)
    token_reduction(
        Factor(v0, low0, None),
        Factor(v1, low1, None),
        colsum,
        tiles.ReductionTile(32, 32, 32, 4, 1, product_sums=True),
        seed=SEED if p else None,
        dropout_p=p,
        precision="ieee",
        dropped=1,
        lowsum=lowsum,
    )
    kept = v1 * rng.dropout_mask(SEED, TOKENS, C1, p) if p else v1
    torch.testing.assert_close(lowsum, low0.double().sum(0).float(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(colsum, kept.double().sum(0).float(), rtol=1e-6, atol=1e-4)


def test_ranks_take_the_blocks_that_are_compiled_for_them() -> None:
    tile = tiles.ReductionTile(64, 64, 64, 8, 2)
    narrow = dict.fromkeys((16, 32, 64), tile)
    taken = [tiles.reduction_block(narrow, rank) for rank in (1, 16, 17, 33, 65, 128)]
    assert taken == [16, 16, 32, 64, 64, 64]
    wide = narrow | {128: tile}
    assert [tiles.reduction_block(wide, rank) for rank in (64, 65, 100, 112, 256)] == [
        64, 64, 64, 128, 128,
    ]  # fmt: skip


def test_enough_programs_are_wanted_that_tests_of_lora_split_too() -> None:
    from peft_kernels.core.token_reduction import _splits

    assert _splits(130, 4, 32, torch.device("cpu")) > 1


def test_no_part_is_without_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's loop is told that it runs."""
    from peft_kernels.core import token_reduction

    monkeypatch.setattr(token_reduction.triton_runtime, "multiprocessors", lambda _: 132)
    found = {
        (tokens, tiles): token_reduction._splits(tokens, tiles, 32, torch.device("cuda"))
        for tokens in (*range(1, 400), 4096, 100_000)
        for tiles in (64, 3, 1)
    }
    assert max(found.values()) == 64
    assert all(splits <= -(-tokens // 32) for (tokens, _), splits in found.items())
