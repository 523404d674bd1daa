"""The emulated device itself: orders, barriers, copies, products, and what it reports."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from peft_kernels.core import rng
from tests.cuda_emulation import build

ORDERS = [(build.ASCENDING, 0), (build.DESCENDING, 0), (build.RANDOM, 1), (build.RANDOM, 2)]


@pytest.fixture(scope="module")
def tiny() -> build.Emulation:
    return build.Emulation(build.library([build.HERE / "tiny.cpp"]))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def reverse(
    tiny: build.Emulation,
    blocks: int = 5,
    missing: int = 0,
    barrier: bool = True,
    release: bool = True,
) -> tuple[int, bool]:
    """Return the status, and whether the result is right."""
    given, turn = torch.randn(blocks, 64), torch.zeros(1, dtype=torch.int32)
    out = torch.full_like(given, float("nan"))
    status = tiny.library.tiny_reverse(
        pointer(given), pointer(out), pointer(turn), blocks, 64, missing, barrier, release
    )
    return status, torch.equal(out, given.flip(1))


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_blocks_that_wait_for_each_other_end_in_every_order(
    tiny: build.Emulation, order: int, seed: int
) -> None:
    tiny.order(order, seed)
    tiny.resident(5)
    tiny.launched()
    assert reverse(tiny) == (0, True)
    assert tiny.launched() == ["reverse"]


@pytest.mark.parametrize("order", [build.ASCENDING, build.RANDOM])
def test_a_missing_barrier_shows(tiny: build.Emulation, order: int) -> None:
    tiny.order(order, 3)
    assert reverse(tiny, barrier=False) == (0, False)


def test_a_wait_without_end_is_reported_with_its_lines(tiny: build.Emulation) -> None:
    tiny.order(build.ASCENDING)
    status, _ = reverse(tiny, release=False)
    assert status != 0
    text = tiny.last_error()
    assert text.startswith("reverse: deadlock") and "tiny.cpp:" in text
    assert "waiting for the block" in text
    assert reverse(tiny) == (0, True)


def test_too_little_shared_memory_is_reported(tiny: build.Emulation) -> None:
    status, _ = reverse(tiny, missing=16)
    assert status != 0 and "shared memory is too small" in tiny.last_error()


def test_an_impossible_launch_is_refused_with_the_kernels_name(tiny: build.Emulation) -> None:
    status, _ = reverse(tiny, blocks=0)
    assert status != 0 and tiny.last_error() == "reverse: invalid configuration argument"


@pytest.mark.parametrize("how", [0, 1, 2], ids=["ldmatrix", "transposed", "shuffles"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_products_of_a_warp(
    tiny: build.Emulation, dtype: torch.dtype, how: int, order: int, seed: int
) -> None:
    tiny.order(order, seed)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    d = torch.full((16, 8), float("nan"))
    half = dtype == torch.bfloat16
    assert tiny.library.tiny_product(half, pointer(a), pointer(b), pointer(d), how) == 0
    torch.testing.assert_close(d, a.float() @ b.float().t(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_round_as_torch_does(tiny: build.Emulation, dtype: torch.dtype) -> None:
    tiny.order(build.ASCENDING)
    wide = torch.randn(4096) * torch.logspace(-12, 6, 4096)
    ties = torch.randint(0, 1 << 16, (4096,), dtype=torch.int32).to(torch.int16).view(dtype).float()
    given = torch.cat([wide, ties * (1 + 2**-11), torch.tensor([float("inf"), float("-inf"), 7e4])])
    given = torch.cat([given[given.isfinite() | given.isinf()], torch.tensor([float("nan")])])
    out, back = torch.empty_like(given, dtype=dtype), torch.empty_like(given)
    tiny.library.tiny_round(
        dtype == torch.bfloat16, pointer(given), pointer(out), pointer(back), given.numel()
    )
    assert torch.equal(out[:-1], given[:-1].to(dtype)) and out[-1].isnan()
    assert torch.equal(back[:-1], given[:-1].to(dtype).float()) and back[-1].isnan()


@pytest.mark.parametrize("columns", [1, 4, 19])
def test_the_mask_is_the_specified_one(tiny: build.Emulation, columns: int) -> None:
    seed = torch.tensor([-(2**61) + 12345])
    keep = torch.full((37, columns), 7, dtype=torch.uint8)
    threshold = rng.drop_threshold(0.3)
    tiny.library.tiny_mask(pointer(seed), ctypes.c_uint32(threshold), 37, columns, pointer(keep))
    assert torch.equal(keep.bool(), rng.dropout_mask(seed, 37, columns, 0.3)) and keep.max() == 1
