"""The dropout mask: known answers, statistics, seeds from torch's generator."""

from __future__ import annotations

import math

import pytest
import torch

from peft_kernels.core import rng


def _words(counter: tuple[int, int], key: tuple[int, int]) -> list[int]:
    seed = torch.tensor([key[0] | (key[1] << 32) if key[1] < 2**31 else _signed(key)])
    counters = torch.tensor([_signed(counter)])
    return [int(word) for word in rng.philox_words(seed, counters)]


def _signed(halves: tuple[int, int]) -> int:
    value = halves[0] | (halves[1] << 32)
    return value - 2**64 if value >= 2**63 else value


def test_philox_matches_the_published_known_answer_of_zeros() -> None:
    """Random123's kat_vectors: philox4x32-10, counter 0, key 0."""
    assert _words((0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("counter", [(0, 0), (5, 0), (2**32 - 1, 7), (3, 2**31 + 9)])
@pytest.mark.parametrize("key", [(0, 0), (123, 456), (2**32 - 1, 2**32 - 1)])
def test_philox_matches_arithmetic_in_unbounded_integers(
    counter: tuple[int, int], key: tuple[int, int]
) -> None:
    c, k, low = [*counter, 0, 0], list(key), 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & low, (p0 >> 32) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    assert _words(counter, key) == c


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_share_of_kept_elements_is_one_minus_p(p: float) -> None:
    rows, cols = 512, 1023
    kept = rng.dropout_mask(torch.tensor([42]), rows, cols, p).double()
    deviation = math.sqrt(p * (1 - p) / (rows * cols))
    assert abs(kept.mean().item() - (1 - p)) < 5 * deviation
    # No row and no column is favoured.
    assert (kept.mean(0) - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / rows)
    assert (kept.mean(1) - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / cols)


def test_neighbours_and_seeds_are_uncorrelated() -> None:
    first = rng.dropout_mask(torch.tensor([1]), 256, 1024, 0.5).double() - 0.5
    second = rng.dropout_mask(torch.tensor([2]), 256, 1024, 0.5).double() - 0.5
    bound = 5 * 0.25 / math.sqrt(first.numel())
    assert (first * second).mean().abs() < bound
    assert (first[:, 1:] * first[:, :-1]).mean().abs() < bound
    assert (first[1:] * first[:-1]).mean().abs() < bound


def test_mask_of_a_taller_matrix_begins_with_the_mask_of_a_shorter_one() -> None:
    """Rows are drawn in chunks: the chunking must not show."""
    seed, cols = torch.tensor([7]), 5
    tall = rng.dropout_mask(seed, 600_000, cols, 0.3)
    assert torch.equal(tall[:100], rng.dropout_mask(seed, 100, cols, 0.3))
    assert 0.69 < tall[-1000:].double().mean() < 0.75


@pytest.mark.parametrize(
    ("p", "threshold"), [(0.0, 0), (0.5, 2**31), (1 - 2**-53, 2**32 - 1), (0.25, 2**30)]
)
def test_threshold(p: float, threshold: int) -> None:
    assert rng.drop_threshold(p) == threshold


def test_seeds_follow_manual_seed() -> None:
    torch.manual_seed(3)
    first = [int(rng.draw_seed(torch.device("cpu"))) for _ in range(2)]
    torch.manual_seed(3)
    assert first == [int(rng.draw_seed(torch.device("cpu"))) for _ in range(2)]
    assert first[0] != first[1]
