"""DoRA and embeddings on an NVIDIA GPU: dropout's kernel, and the rule for values and gradients."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import lora_embedding
from peft_kernels.core import rng
from peft_kernels.lora.dropout import drop
from tests.lora.dora_problems import fused, inputs, judge_together, results
from tests.lora.test_gpu import gpu_problem

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@DTYPES
@pytest.mark.parametrize("size", [(1, 1), (8, 256), (1000, 777)])
def test_drop_draws_the_mask_of_the_specification(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    x = (torch.randn(size[0], size[1] + 3, device="cuda") + 9.0).to(dtype)[:, : size[1]]
    seed = torch.tensor([-7], device="cuda")
    y = drop(x, seed, 0.3)
    mask = rng.dropout_mask(seed, *size, 0.3)
    assert torch.equal(y == 0, ~mask)
    torch.testing.assert_close(y, torch.where(mask, x / 0.7, 0.0))


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(512, 1024, 768, 16), (300, 515, 777, 5), (40, 1, 33, 1)])
def test_dora_is_as_accurate_as_peft(
    shape: tuple[int, int, int, int], dropout_p: float, dtype: torch.dtype
) -> None:
    draws = 30 if shape[1] == 1 else 1
    problems = [
        gpu_problem(*shape, dtype=dtype, dropout_p=dropout_p, seed=seed) for seed in range(draws)
    ]
    found = []
    for given in problems:
        tensors = inputs(given)
        found.append(results(fused(given, tensors), tensors, given.dy))
    judge_together(problems, found, dtype)


@DTYPES
def test_an_embedding_gives_what_a_cpu_gives(dtype: torch.dtype) -> None:
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        ids = torch.randint(0, 50, (7, 9)).to(device)
        tensors = [torch.randn(s) for s in ((50, 24), (4, 50), (24, 4))]
        leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
        y = lora_embedding(ids, *leaves, scale=1.5, padding_idx=3)
        found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for on_cpu, on_gpu in zip(*found, strict=True):
        scale = on_cpu.abs().max().item()
        torch.testing.assert_close(
            on_gpu.cpu(), on_cpu, rtol=0.0, atol=8 * torch.finfo(dtype).eps * scale
        )
