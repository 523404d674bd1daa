"""Public functions on the emulated CUDA library: choice, launches, forward and backward."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import BackendUnavailable, explain, lora_linear
from peft_kernels.core import cuda_library
from tests.cuda_emulation import build
from tests.lora.problems import check, fused, problem, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_lora_linear_forward_and_backward(
    ordered: build.Emulation, dtype: torch.dtype, dropout_p: float
) -> None:
    check(problem(37, 41, 33, 5, dtype=dtype, dropout_p=dropout_p), "cuda", dtype)


def test_lora_linear_is_one_launch_forward_and_two_backward(device: build.Emulation) -> None:
    given = problem(70, 40, 33, 4)
    inputs = given.inputs()
    inputs[1].requires_grad_(False)  # the base weight
    device.launched()
    y = fused(given, inputs, "cuda")
    assert device.launched() == ["lora_kernel"]
    results(y, [each for each in inputs if each.requires_grad], given.dy)
    assert device.launched() == ["lora_kernel", "token_reduction_kernel"]


def test_cpu_tensors_are_served_on_demand_alone_and_while_emulated(
    device: build.Emulation,
) -> None:
    given = problem(4, 6, 8, 2)
    arguments = given.x, given.weight, given.lora_a, given.lora_b
    assert explain(lora_linear, *arguments).backend == "cpp"
    assert "only when demanded" in explain(lora_linear, *arguments).reasons["cuda"]
    assert explain(lora_linear, *arguments, backend="cuda").backend == "cuda"
    emulated = cuda_library._emulated
    try:
        cuda_library.emulate(None)
        with pytest.raises(BackendUnavailable, match="cuda: serves NVIDIA GPUs"):
            lora_linear(*arguments, backend="cuda")
    finally:
        cuda_library._emulated = emulated
        cuda_library.forget()


def test_more_shared_memory_than_the_gpu_has_is_an_error_and_the_next_call_works(
    device: build.Emulation,
) -> None:
    given = problem(9, 6, 8, 2)
    arguments = given.x, given.weight, given.lora_a, given.lora_b
    try:
        device.shared_bytes(1024)
        with pytest.raises(RuntimeError, match=r"^lora_kernel: invalid argument$"):
            lora_linear(*arguments, backend="cuda")
    finally:
        device.shared_bytes(64 * 1024)
    found = lora_linear(*arguments, backend="cuda")
    torch.testing.assert_close(found, lora_linear(*arguments, backend="reference"))
