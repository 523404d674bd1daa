"""A launch that finds no memory, first or later, forward or backward, and what comes after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from peft_kernels import adapter, adapter_grouped, lora_linear, prefix_attention, prompt_embedding
from tests.cuda_emulation import build


def _of(*shape: int) -> Tensor:
    return torch.randn(shape).div(shape[-1] ** 0.5).requires_grad_()


def _lora() -> tuple[Tensor, list[Tensor]]:
    leaves = [_of(9, 16), _of(12, 16), _of(4, 16), _of(12, 4), _of(12)]
    return lora_linear(*leaves, backend="cuda"), leaves


def _adapter() -> tuple[Tensor, list[Tensor]]:
    leaves = [_of(9, 16), _of(4, 16), _of(16, 4), _of(4), _of(16)]
    return adapter(*leaves, activation="gelu", backend="cuda"), leaves


def _grouped() -> tuple[Tensor, list[Tensor]]:
    leaves = [_of(9, 16), _of(3, 4, 16), _of(3, 16, 4)]
    index = torch.tensor([0, 2, -1, 1, 0, 0, 2, 2, 1])
    return adapter_grouped(*leaves, index, backend="cuda"), leaves


def _prefix() -> tuple[Tensor, list[Tensor]]:
    leaves = [_of(2, 4, 5, 16), *(_of(2, 2, 5, 16) for _ in "kv"), *(_of(2, 3, 16) for _ in "kv")]
    return prefix_attention(*leaves, causal=True, backend="cuda"), leaves


def _prompt() -> tuple[Tensor, list[Tensor]]:
    leaves = [_of(7, 16), _of(3, 16)]
    ids = torch.tensor([[3, 1, 3], [0, 6, 2]])
    return prompt_embedding(ids, *leaves, backend="cuda").embeddings, leaves


CALLS = {
    "lora_linear": _lora,
    "adapter": _adapter,
    "adapter_grouped": _grouped,
    "prefix_attention": _prefix,
    "prompt_embedding": _prompt,
}


@pytest.fixture
def memory(device: build.Emulation) -> Iterator[build.Emulation]:
    yield device
    device.launches_with_memory(-1)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_each_launch_without_memory_is_told_and_the_next_call_has_its_bits(
    memory: build.Emulation, call: Callable[[], tuple[Tensor, list[Tensor]]]
) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(5)
        out, leaves = call()
        return [out, *torch.autograd.grad(out, leaves, torch.randn(out.shape))]

    memory.launched()
    expected = run()
    launched = memory.launched()
    assert len(launched) >= 2  # forward and backward
    for count, kernel in enumerate(launched):
        memory.launches_with_memory(count)
        with pytest.raises(torch.OutOfMemoryError, match=f"^{kernel}: out of memory$"):
            run()
        memory.launches_with_memory(-1)
        assert all(map(torch.equal, run(), expected)), f"after {kernel} found no memory"
