"""Every backend that runs here: outputs equal to eager's, gradients, edges, repeatability."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peft_kernels import explain, prompt_embedding
from peft_kernels.core import extension, tiles, triton_runtime
from tests.prompt.problems import Problem, check, eager, fused, gradients, problem

TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
        reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
    ),
)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", TRITON])
POSITIONS = pytest.mark.parametrize("position", ["start", "after_padding", 1, 7])

# Batch, tokens, prompt, width.
SHAPES = [
    pytest.param(1, 7, 1, 1, id="one-of-everything"),
    pytest.param(3, 7, 4, 16, id="small"),
    pytest.param(5, 9, 3, 41, id="ragged"),
    pytest.param(35, 8, 5, 20, id="three-chains"),
    pytest.param(2, 40, 33, 300, id="several-tiles"),
]


def test_the_extension_is_built() -> None:
    """Fail, not skip, without it: ``make test`` builds it."""
    assert extension.why_not() is None
    given = problem(2, 3, 2, 4)
    assert explain(prompt_embedding, given.input_ids, given.weight, given.prompt).backend == "cpp"


@BACKENDS
@POSITIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize(("batch", "tokens", "length", "width"), SHAPES)
def test_outputs_equal_eager_and_gradients_are_as_accurate(
    backend: str,
    position: str | int,
    dtype: torch.dtype,
    per_sample: bool,
    batch: int,
    tokens: int,
    length: int,
    width: int,
) -> None:
    given = problem(
        batch, tokens, length, width, dtype=dtype, per_sample=per_sample, position=position,
        padding_idx=4,
    )  # fmt: skip
    check(given, backend)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_dtypes_that_the_interpreter_does_not_serve(
    backend: str, dtype: torch.dtype, per_sample: bool
) -> None:
    check(problem(35, 9, 5, 41, dtype=dtype, per_sample=per_sample, position=2), backend)


@BACKENDS
@pytest.mark.parametrize("padding", ["left", "right", "holes", None])
@pytest.mark.parametrize("position", ["start", "after_padding", 3])
def test_every_padding(backend: str, padding: str | None, position: str | int) -> None:
    check(problem(12, 9, 4, 8, padding=padding, position=position), backend)


@BACKENDS
@pytest.mark.parametrize("position", ["start", "after_padding"])
@pytest.mark.parametrize(
    "mask_dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
     torch.bfloat16, torch.float32, torch.float64],
)  # fmt: skip
def test_the_mask_keeps_its_dtype_and_its_values(
    backend: str, mask_dtype: torch.dtype, position: str
) -> None:
    given = problem(6, 9, 4, 8, mask_dtype=mask_dtype, position=position)
    assert given.mask is not None
    if mask_dtype.is_floating_point:
        # Minus zero keeps nothing; other numbers do, and are passed on.
        given = replace(given, mask=torch.where(given.mask == 0, -0.0, -0.5).to(mask_dtype))
    check(given, backend)


@BACKENDS
@pytest.mark.parametrize("position", ["start", "after_padding"])
def test_int32_ids_and_labels(backend: str, position: str) -> None:
    given = problem(5, 9, 4, 8, position=position)
    assert given.labels is not None
    check(replace(given, input_ids=given.input_ids.int(), labels=given.labels.int()), backend)


@BACKENDS
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_a_float32_prompt_is_cast_once_and_gets_a_float32_gradient(
    backend: str, per_sample: bool
) -> None:
    given = problem(
        5, 9, 4, 40, dtype=torch.float16, prompt_dtype=torch.float32, per_sample=per_sample
    )
    gradient = check(given, backend)["prompt"]
    assert gradient.dtype == torch.float32
    if not per_sample:  # The sum is not rounded to the table's dtype.
        assert not torch.equal(gradient, gradient.half().float())


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_float32_prompt_beside_a_bfloat16_table(backend: str, per_sample: bool) -> None:
    given = problem(
        5, 9, 4, 40, dtype=torch.bfloat16, prompt_dtype=torch.float32, per_sample=per_sample
    )
    assert check(given, backend)["prompt"].dtype == torch.float32


def test_every_float32_is_narrowed_as_torch_narrows_it() -> None:
    """Ties, subnormals, the largest, infinities; rows lie apart, as in a wider matrix."""
    bits = torch.randint(-(2**31), 2**31, (3, 2, 50), dtype=torch.int64).to(torch.int32)
    bits[0, 0, :4] = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 1])
    wide = bits.view(torch.float32)
    wide = torch.where(wide.isnan(), torch.inf, wide)
    prompt, ids = wide[:, :, :37], torch.zeros(3, 4, dtype=torch.int64)
    table = torch.randn(5, 37, dtype=torch.bfloat16)
    found = prompt_embedding(ids, table, prompt, backend="cpp").embeddings[:, :2]
    assert torch.equal(found, prompt.to(torch.bfloat16))
    nan = torch.full((2, 37), torch.nan)
    assert prompt_embedding(ids, table, nan, backend="cpp").embeddings[:, :2].isnan().all()


@BACKENDS
@pytest.mark.parametrize(
    ("batch", "tokens", "length"),
    [(0, 5, 3), (3, 0, 2), (3, 5, 0), (3, 0, 0), (0, 0, 0)],
)
@pytest.mark.parametrize("position", ["start", "after_padding", 0])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_empty_sizes(
    backend: str, batch: int, tokens: int, length: int, position: str | int, per_sample: bool
) -> None:
    given = problem(batch, tokens, length, 8, per_sample=per_sample, position=position)
    found = check(given, backend)
    if batch == 0:
        assert found["prompt"].count_nonzero() == 0 and found["weight"].count_nonzero() == 0


@BACKENDS
@POSITIONS
def test_every_output_element_is_written(
    backend: str, position: str | int, poisoned_allocations: None
) -> None:
    given = problem(19, 9, 4, 40, position=position, vocabulary=30, padding_idx=2)
    check(given, backend)
    assert given.mask is not None
    check(replace(given, mask=given.mask.float()), backend)
    check(replace(given, prompt=torch.randn(19, 4, 40)), backend)


@BACKENDS
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_nothing_outside_an_output_is_written(backend: str, per_sample: bool) -> None:
    """The launchers get views in the middle of a guarded buffer."""
    from peft_kernels.prompt.dispatch import run_backward, run_forward

    given = problem(5, 9, 3, 41, position="after_padding", per_sample=per_sample)
    buffers = []

    def guarded(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        count = torch.Size(size).numel()
        buffers.append(torch.full((count + 512,), 77, dtype=dtype))
        return buffers[-1][256 : 256 + count].view(size)

    integers = [guarded(5, 12, dtype=torch.int64) for _ in range(3)]
    starts = guarded(5, dtype=torch.int64)
    run_forward(
        given.input_ids, given.weight, given.prompt, given.mask, given.labels, 0, backend,
        guarded(5, 12, 41), *integers, starts,
    )  # fmt: skip
    run_backward(
        given.d_embeddings, given.input_ids, starts, 0, -1, backend,
        guarded(*given.prompt.shape), guarded(*given.weight.shape),
    )  # fmt: skip
    assert len(buffers) == 7
    for buffer in buffers:
        assert (buffer[:256] == 77).all() and (buffer[-256:] == 77).all()


@BACKENDS
@pytest.mark.parametrize("needed", ["prompt", "weight"])
def test_a_frozen_tensor_changes_nothing_for_the_other(backend: str, needed: str) -> None:
    given = problem(20, 9, 4, 24, position="after_padding", padding_idx=3)
    both = given.leaves()
    expected = gradients(given, fused(given, both, backend), both)[needed]
    alone = given.leaves()
    alone[needed == "prompt"].requires_grad_(False)
    found = gradients(given, fused(given, alone, backend), alone)
    assert list(found) == [needed] and torch.equal(found[needed], expected)


@BACKENDS
def test_repeated_ids_repeat_bit_for_bit_and_the_padding_row_gets_nothing(backend: str) -> None:
    given = problem(40, 30, 2, 24, vocabulary=3, padding_idx=1, position="after_padding")
    runs = []
    for _ in range(3):
        leaves = given.leaves()
        runs.append(gradients(given, fused(given, leaves, backend), leaves))
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)
    assert runs[0]["weight"][1].count_nonzero() == 0
    assert (runs[0]["weight"][[0, 2]] != 0).all()


@BACKENDS
@pytest.mark.parametrize("layout", ["sliced", "transposed", "step", "expanded"])
def test_strides_change_no_bit(backend: str, layout: str) -> None:
    given = problem(6, 9, 4, 8, per_sample=True, position="after_padding")

    def strided(t: torch.Tensor) -> torch.Tensor:
        if layout == "sliced":
            return torch.cat([t, torch.full_like(t, 7)], -1)[..., : t.shape[-1]]
        if layout == "transposed":
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "step":
            return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]
        return t[:1].expand_as(t)

    assert given.mask is not None and given.labels is not None
    tensors = {
        "input_ids": given.input_ids, "weight": given.weight, "prompt": given.prompt,
        "mask": given.mask, "labels": given.labels, "d_embeddings": given.d_embeddings,
    }  # fmt: skip
    changed = {name: strided(t) for name, t in tensors.items()}
    assert not all(t.is_contiguous() for t in changed.values())
    loose = replace(given, **changed)
    packed = replace(given, **{name: t.contiguous() for name, t in changed.items()})
    found, expected = check(loose, backend), check(packed, backend)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@BACKENDS
def test_the_gradient_of_a_sum_is_right(backend: str) -> None:
    """Its gradient has stride 0 everywhere."""
    given = problem(5, 9, 4, 8)
    leaves, others = given.leaves(), given.leaves()
    fused(given, leaves, backend).embeddings.sum().backward()
    eager(given, others).embeddings.sum().backward()
    for one, other in zip(leaves, others, strict=True):
        assert torch.equal(one.grad, other.grad)


def _as_ones(given: Problem) -> Problem:
    return replace(given, mask=torch.ones_like(given.input_ids))


@BACKENDS
@pytest.mark.parametrize("position", ["start", "after_padding", 2])
def test_no_mask_is_a_mask_of_ones(backend: str, position: str | int) -> None:
    given = problem(5, 9, 4, 8, padding=None, position=position)
    without, ones = fused(given, given.leaves(), backend), None
    ones = fused(_as_ones(given), given.leaves(), backend)
    assert without.attention_mask is None
    assert ones.attention_mask is not None and bool((ones.attention_mask == 1).all())
    assert torch.equal(without.embeddings, ones.embeddings)
    assert torch.equal(without.position_ids, torch.arange(13).expand(5, 13))
    assert torch.equal(without.position_ids, ones.position_ids)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("position", ["start", "after_padding", 13])
def test_rows_of_several_blocks_with_every_length_of_padding(
    backend: str, position: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 8 tokens here, of 1024 otherwise; padding that ends at each edge of a block."""
    monkeypatch.setattr(tiles, "prompt_tile", lambda size: tiles.CopyTile(8, 8, 8, 4))
    given = problem(18, 17, 10, 8, position=position)
    padded = torch.arange(18)[:, None]
    check(replace(given, mask=(torch.arange(17) >= padded).long()), backend)
    check(replace(given, mask=(torch.arange(17) < padded).bool()), backend)
