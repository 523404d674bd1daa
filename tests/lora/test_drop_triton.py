"""Dropout's kernel in the interpreter: the mask of the specification, and no more than that."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.core import rng, triton_runtime

pytestmark = pytest.mark.skipif(
    not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
    reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (8, 256), (13, 301), (21, 18)])
def test_drops_what_the_specification_drops(size: tuple[int, int], dtype: torch.dtype) -> None:
    from peft_kernels.lora import drop_kernels

    x = (torch.randn(size[0], size[1] + 3) + 5.0).to(dtype)[:, : size[1]]
    # Guard bands: a store beyond y would show.
    band = torch.full((size[0] + 2, size[1]), float("nan"), dtype=dtype)
    y = band[1:-1]
    seed = torch.tensor([-7])
    drop_kernels.drop(x, seed, 0.3, y)
    mask = rng.dropout_mask(seed, *size, 0.3)
    expected = torch.where(mask, x / 0.7, 0.0)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y == 0, ~mask)
    assert band[0].isnan().all() and band[-1].isnan().all()
