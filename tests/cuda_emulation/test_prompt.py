"""Prompt kernels of csrc/cuda, run on the CPU: the bits of every other backend, in every order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peft_kernels import prompt_embedding
from peft_kernels.prompt import cuda, reference
from tests.cuda_emulation import build
from tests.prompt.problems import Problem, check, fused, gradients, problem

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("position", ["start", "after_padding", 3])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_every_output_and_gradient_in_every_order(
    ordered: build.Emulation, dtype: torch.dtype, position: str | int, per_sample: bool
) -> None:
    given = problem(
        19, 9, 5, 40, dtype=dtype, prompt_dtype=torch.float32, position=position,
        per_sample=per_sample, padding_idx=4,
    )  # fmt: skip
    check(given, "cuda")


@pytest.mark.parametrize(
    ("batch", "tokens", "length", "width"),
    [(1, 1, 1, 1), (0, 3, 2, 4), (2, 0, 3, 5), (3, 4, 0, 7), (33, 5, 2, 17), (2, 3, 2, 1100)],
)
@pytest.mark.parametrize("position", ["start", "after_padding"])
@DTYPES
def test_sizes_that_end_within_a_tile(
    device: build.Emulation,
    dtype: torch.dtype,
    position: str,
    batch: int,
    tokens: int,
    length: int,
    width: int,
) -> None:
    check(problem(batch, tokens, length, width, dtype=dtype, position=position), "cuda")


@pytest.mark.parametrize("padding", ["left", "right", "holes", None])
@pytest.mark.parametrize("position", ["start", "after_padding", 0, 1300])
def test_rows_longer_than_a_block_takes_at_a_time(
    ordered: build.Emulation, padding: str | None, position: str | int
) -> None:
    check(problem(3, 1300, 9, 8, padding=padding, position=position), "cuda")


@pytest.mark.parametrize(
    "mask_dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int32, torch.float16, torch.bfloat16,
     torch.float32, torch.float64],
)  # fmt: skip
def test_masks_of_every_dtype(device: build.Emulation, mask_dtype: torch.dtype) -> None:
    given = problem(7, 9, 4, 8, mask_dtype=mask_dtype, position="after_padding", padding="holes")
    check(given, "cuda")
    if mask_dtype.is_floating_point:
        assert given.mask is not None
        check(replace(given, mask=-given.mask), "cuda")  # -0 is 0 still


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_ids_and_labels_of_both_integers(device: build.Emulation, integers: torch.dtype) -> None:
    given = problem(5, 9, 4, 8, position="after_padding")
    assert given.labels is not None
    check(
        replace(given, input_ids=given.input_ids.to(integers), labels=given.labels.to(integers)),
        "cuda",
    )


@pytest.mark.parametrize("prompt_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_of_another_dtype_than_the_table(
    device: build.Emulation, dtype: torch.dtype, prompt_dtype: torch.dtype
) -> None:
    check(problem(20, 6, 4, 24, dtype=dtype, prompt_dtype=prompt_dtype), "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float64_prompt_gets_the_bits_of_the_reference(
    device: build.Emulation, dtype: torch.dtype
) -> None:
    """Its sums are float32 as for every prompt: only the reference is held to that."""
    given = problem(20, 6, 4, 24, dtype=dtype, prompt_dtype=torch.float64)
    results = []
    for backend in ("cuda", "reference"):
        leaves = given.leaves()
        output = fused(given, leaves, backend)
        results.append([output.embeddings, gradients(given, output, leaves)["prompt"]])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@DTYPES
@pytest.mark.parametrize("offset", [1, 3])
def test_addresses_that_are_no_multiple_of_16_bytes(
    device: build.Emulation, dtype: torch.dtype, offset: int
) -> None:
    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.new_empty(tensor.numel() + offset)[offset:].view(tensor.shape)
        assert moved.data_ptr() % 16
        return moved.copy_(tensor)

    given = problem(6, 9, 4, 32, dtype=dtype, position="after_padding")
    everything: Problem = replace(
        given, weight=shifted(given.weight), prompt=shifted(given.prompt),
        d_embeddings=shifted(given.d_embeddings),
    )  # fmt: skip
    check(everything, "cuda")
    check(replace(given, d_embeddings=shifted(given.d_embeddings)), "cuda")
    check(replace(given, prompt=shifted(given.prompt)), "cuda")


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strides_change_no_bit(device: build.Emulation, layout: str) -> None:
    given = problem(6, 9, 4, 8, per_sample=True, position="after_padding")

    def strided(t: torch.Tensor) -> torch.Tensor:
        if layout == "sliced":
            return torch.cat([t, torch.full_like(t, 7)], -1)[..., : t.shape[-1]]
        if layout == "transposed":
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        return t[:1].expand_as(t)

    check(
        replace(
            given, input_ids=strided(given.input_ids), weight=strided(given.weight),
            prompt=strided(given.prompt), d_embeddings=strided(given.d_embeddings),
        ),
        "cuda",
    )  # fmt: skip


@DTYPES
def test_runs_of_equal_ids_longer_than_a_chain(
    ordered: build.Emulation, dtype: torch.dtype
) -> None:
    given = problem(
        12, 30, 2, 24, vocabulary=3, dtype=dtype, padding_idx=1, position="after_padding"
    )
    found = check(given, "cuda")
    assert found["weight"][1].count_nonzero() == 0
    assert (found["weight"][[0, 2]] != 0).any(1).all()


def test_a_trained_prompt_beside_a_frozen_table_is_one_launch_each_way(
    device: build.Emulation,
) -> None:
    given = problem(5, 9, 4, 24, position="after_padding")
    prompt, weight = given.leaves()
    weight.requires_grad_(False)
    device.launched()
    output = fused(given, [prompt, weight], "cuda")
    assert device.launched() == ["prompt_forward"]
    gradients(given, output, [prompt, weight])
    assert device.launched() == ["prompt_gradient"]


@DTYPES
def test_an_id_outside_the_table_is_nan_and_gets_no_gradient(
    device: build.Emulation, dtype: torch.dtype
) -> None:
    ids = torch.tensor([[1, 10, -100, 2**40]])
    table, prompt = torch.randn(10, 24, dtype=dtype), torch.randn(2, 24, dtype=dtype)
    out, positions = table.new_zeros(1, 6, 24), torch.empty(1, 6, dtype=torch.int64)
    cuda.forward(ids, table, prompt, None, None, 0, out, None, None, positions, None)
    assert out[0, 3:].isnan().all()
    assert torch.equal(out[0, :3], torch.cat([prompt, table[1:2]]))
    d_table = torch.full_like(table, float("nan"))
    cuda.backward(torch.ones_like(out), ids, None, 0, -1, None, d_table)
    assert torch.equal(d_table, torch.zeros_like(table).index_fill_(0, torch.tensor([1]), 1))


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize("width", [41, 48])
def test_nothing_outside_an_output_is_written(
    device: build.Emulation, per_sample: bool, width: int
) -> None:
    given = problem(5, 9, 3, width, position="after_padding", per_sample=per_sample)
    buffers = []

    def guarded(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        count = torch.Size(size).numel()
        buffers.append(torch.full((count + 512,), 77, dtype=dtype))
        return buffers[-1][256 : 256 + count].view(size)

    integers = [guarded(5, 12, dtype=torch.int64) for _ in range(3)]
    starts = guarded(5, dtype=torch.int64)
    cuda.forward(
        given.input_ids, given.weight, given.prompt, given.mask, given.labels, 0,
        guarded(5, 12, width), *integers, starts,
    )  # fmt: skip
    cuda.backward(
        given.d_embeddings, given.input_ids, starts, 0, -1,
        guarded(*given.prompt.shape), guarded(*given.weight.shape),
    )  # fmt: skip
    assert len(buffers) == 7
    for buffer in buffers:
        assert (buffer[:256] == 77).all() and (buffer[-256:] == 77).all()


def test_a_failed_launch_raises_with_the_kernels_name_and_the_next_one_works(
    device: build.Emulation,
) -> None:
    """A gradient of no rows would be a grid of no blocks; the public function never asks for it."""
    from peft_kernels.core import cuda_library

    nothing, dy = torch.empty(0, 8), torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError, match="^prompt_gradient: invalid configuration argument$"):
        cuda_library.call("prompt_gradient", dy, None, 0, nothing)
    found, expected = torch.empty(2, 8), torch.empty(2, 8)
    cuda.backward(dy, None, None, 0, -1, found, None)
    reference.backward(dy, None, None, 0, -1, expected, None)
    assert torch.equal(found, expected)


def test_it_is_a_backend_on_demand_and_compiles(device: build.Emulation) -> None:
    ids, table, prompt = torch.tensor([[3, 1]]), torch.randn(5, 8), torch.randn(2, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(prompt: torch.Tensor) -> torch.Tensor:
        return prompt_embedding(ids, table, prompt, backend="cuda").embeddings

    assert torch.equal(run(prompt)[0], torch.cat([prompt, table[[3, 1]]]))
    assert "prompt_forward" in device.launched()
