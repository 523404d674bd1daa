"""Grouped LoRA launches in the interpreter: numerics, edges, launches, flags, repeatability."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from peft_kernels import explain, lora_projections
from peft_kernels.core import lora_tiles, rng, triton_runtime
from tests.lora.groups import (
    call,
    check,
    group,
    inputs_of,
    results,
    run,
    run_separately,
)

pytestmark = [
    pytest.mark.skipif(
        not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
        reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
    ),
    pytest.mark.timeout(120),  # A wait on a flag that nobody sets would hang.
]

CASES = [
    pytest.param(1, 5, [(7, 1), (1, 2)], id="one-token"),
    pytest.param(64, 64, [(96, 16), (32, 16), (32, 16)], id="aligned"),
    pytest.param(33, 41, [(50, 3), (36, 33), (7, 5), (40, 70)], id="four-ragged"),
    pytest.param(40, 36, [(33, 5), (20, 17), (8, 1), (12, 4), (9, 2)], id="five"),
    pytest.param(33, 41, [(50, 3)], id="one"),
]
DROPOUTS = [0.0, 0.3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize(("tokens", "in_features", "shapes"), CASES)
def test_as_accurate_as_eager(
    tokens: int,
    in_features: int,
    shapes: list[tuple[int, int]],
    dropout_p: float,
    dtype: torch.dtype,
) -> None:
    check(group(tokens, in_features, shapes, dropout_p=dropout_p, dtype=dtype), "triton", dtype)


@pytest.mark.parametrize("dropout_p", [0.0, [0.3, 0.0, 0.1]], ids=["plain", "mixed"])
@pytest.mark.parametrize("biases", [[True, False, True], [False] * 3], ids=["some", "none"])
def test_each_projection_is_lora_linear_bit_for_bit(biases: list[bool], dropout_p: Any) -> None:
    """All but dx, whose sum over the projections is rounded at other places."""
    given = group(
        33, 41, [(50, 3), (36, 33), (7, 5)], dropout_p=dropout_p, biases=biases,
        dtype=torch.float16,
    )  # fmt: skip
    with lora_tiles.forced_variant("ticket"):
        found, expected = run(given, "triton"), run_separately(given, "triton")
    for name in expected.keys() - {"dx"}:
        assert torch.equal(found[name], expected[name]), name
    check(given, "triton", torch.float16)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("variant", lora_tiles.VARIANTS)
def test_forced_variants_that_have_no_grouped_form_run_one_by_one(
    variant: str, dropout_p: float, launches: list[str]
) -> None:
    given = group(33, 40, [(24, 3), (16, 5)], dropout_p=dropout_p)
    with lora_tiles.forced_variant(variant):
        check(given, "triton", torch.float32)
    assert ("_projections_kernel" in launches) == (variant == "ticket")
    # dX by TMA, one by one, is the faster one under dropout; few tokens make their own s without.
    alone = ("split", "ticket_tma") if dropout_p else ("split", "recompute")
    assert ("_projections_gradient_kernel" in launches) == (variant not in alone)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_masks_equal_the_specification_bit_for_bit(p: float) -> None:
    """A = B = identity, W = 0 and scale = 1 - p: y is the dropped x, dx the sum of dropped dy."""
    size, tokens = 19, 35
    eye, zeros = torch.eye(size), torch.zeros(size, size)
    given = group(tokens, size, [(size, size)] * 3, dropout_p=p, biases=[False] * 3)
    x = torch.randn(tokens, size).abs() + 1
    given = [
        replace(
            each, x=x, weight=zeros, lora_a=eye, lora_b=eye, scale=1.0 - p,
            dy=torch.full((tokens, size), float(2**index)),
        )
        for index, each in enumerate(given)
    ]  # fmt: skip
    masks = [rng.dropout_mask(each.seed, tokens, size, p) for each in given]
    inputs = inputs_of(given)
    ys = call(given, inputs, "triton")
    assert all(torch.equal(y != 0, mask) for y, mask in zip(ys, masks, strict=True))
    expected = sum(2**index * mask for index, mask in enumerate(masks))
    torch.testing.assert_close(results(given, ys, inputs)["dx"], expected.float())


@pytest.mark.parametrize("dropout_p", DROPOUTS)
def test_every_output_element_is_written(dropout_p: float, poisoned_allocations: None) -> None:
    check(group(33, 41, [(50, 3), (36, 33), (7, 5)], dropout_p=dropout_p), "triton", torch.float32)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
def test_nothing_outside_an_output_is_written(dropout_p: float) -> None:
    """The launchers get views in the middle of a guarded buffer."""
    from peft_kernels.lora import projections_launch
    from peft_kernels.lora.projections_dispatch import Gradients, Projection

    tokens, depth, shapes = 33, 41, [(50, 3), (36, 33), (7, 5)]
    given = group(tokens, depth, shapes, dropout_p=dropout_p)
    buffers = []

    def guarded(*size: int) -> torch.Tensor:
        count = torch.Size(size).numel()
        buffers.append(torch.full((count + 512,), 77.0))
        return buffers[-1][256 : 256 + count].view(size)

    projections = [
        Projection(
            each.weight, each.lora_a, each.lora_b, each.bias, each.seed if dropout_p else None,
            each.scale, dropout_p,
        )
        for each in given
    ]  # fmt: skip
    ys = [guarded(tokens, width) for width, _ in shapes]
    ss = [guarded(tokens, rank) for _, rank in shapes]
    projections_launch.forward(given[0].x, projections, ys, ss)
    gradients = [
        Gradients(guarded(rank, depth), guarded(width, rank), guarded(width), None)
        for width, rank in shapes
    ]
    dys = [each.dy for each in given]
    dx = guarded(tokens, depth)
    projections_launch.backward(dys, given[0].x, ss, projections, dx, gradients)
    for buffer in buffers:
        assert (buffer[:256] == 77.0).all() and (buffer[-256:] == 77.0).all()
        assert not (buffer[256:-256] == 77.0).all()


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize(("count", "groups"), [(2, 1), (3, 1), (4, 1), (5, 2)])
def test_one_launch_forward_and_one_for_dx(
    count: int, groups: int, dropout_p: float, launches: list[str]
) -> None:
    given = group(40, 20, [(24, 4)] * count, dropout_p=dropout_p)
    inputs = inputs_of(given)
    for own in inputs:
        own[1].requires_grad_(False)
    ys = call(given, inputs, "triton")
    assert launches == ["_projections_kernel"] * groups
    launches.clear()
    torch.autograd.backward(ys, [each.dy for each in given])
    expected = ["_projections_gradient_kernel"] * groups + ["_token_reduction_kernel"] * count
    assert launches == expected
    found = explain(
        lora_projections, inputs[0][0], [own[1] for own in inputs], [own[2] for own in inputs],
        [own[3] for own in inputs], dropout_p=dropout_p, backend="triton",
    )  # fmt: skip
    assert found.plan is not None
    assert f"{groups} launch{'es' if groups > 1 else ''} for {count} projections" in found.plan
    assert "dA, dB, dbias one by one" in found.plan


def test_what_is_not_grouped_is_said(launches: list[str]) -> None:
    given = group(40, 20, [(24, 4), (16, 2)])
    given[1] = replace(given[1], weight=given[1].weight.t().contiguous().t())
    check(given, "triton", torch.float32)
    assert "_projections_kernel" not in launches
    inputs = inputs_of(given)
    found = explain(
        lora_projections, inputs[0][0], [own[1] for own in inputs], [own[2] for own in inputs],
        [own[3] for own in inputs], backend="triton",
    )  # fmt: skip
    assert found.plan is not None
    assert "forward one by one: the weights are not all row-major" in found.plan


def test_column_major_weights_are_grouped(launches: list[str]) -> None:
    given = group(40, 20, [(24, 4), (16, 2), (8, 3)], dropout_p=0.1)
    turned = [replace(each, weight=each.weight.t().contiguous().t()) for each in given]
    found, expected = run(turned, "triton"), run(given, "triton")
    assert launches.count("_projections_gradient_kernel") == 2
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["row slices", "expanded rows"])
def test_strides_change_no_bit(layout: str) -> None:
    given = group(40, 24, [(30, 4), (18, 3)], dropout_p=0.1)
    x = given[0].x
    if layout == "row slices":
        x = torch.cat([torch.zeros_like(x), x, torch.zeros_like(x)], 1)[:, 24:48]
        dys = [torch.cat([each.dy, each.dy], 1)[:, : each.dy.shape[1]] for each in given]
    else:
        x, dys = x[:1].expand(40, 24), [each.dy[:1].expand_as(each.dy) for each in given]
    strided = [replace(each, x=x, dy=dy) for each, dy in zip(given, dys, strict=True)]
    dense = [replace(each, x=each.x.contiguous(), dy=each.dy.contiguous()) for each in strided]
    found, expected = run(strided, "triton"), run(dense, "triton")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_runs_repeat_and_any_number_of_programs_gives_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft_kernels.lora import launch

    given = group(70, 24, [(36, 3), (20, 40)], dropout_p=0.2)
    expected = run(given, "triton")
    for programs in (1, 2, 7, 64):
        monkeypatch.setattr(launch, "_resident_programs", lambda device, count=programs: count)
        found = run(given, "triton")
        assert all(torch.equal(found[name], expected[name]) for name in expected), programs


@pytest.mark.parametrize("dropout_p", DROPOUTS)
def test_counters_are_zero_again_after_every_launch(
    dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One buffer over many launches, as on a GPU stream: a stale flag or ticket would show."""
    cases = [group(70, 24, [(36, 40), (30, 3)], dropout_p=dropout_p, seed=i) for i in range(2)]
    expected = [run(given, "triton") for given in cases]
    buffer = torch.zeros(4096, dtype=torch.int32)
    monkeypatch.setattr(triton_runtime, "counters", lambda device, size: buffer)
    found = [run(given, "triton") for given in cases]
    assert buffer.count_nonzero() == 0
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_scales_as_tensors_give_what_floats_give() -> None:
    from peft_kernels.lora.projections_dispatch import run_forward

    given = group(20, 24, [(24, 4), (8, 2)])
    inputs = [[t.detach() for t in own] for own in inputs_of(given)]
    kinds = [[own[kind] for own in inputs] for kind in (1, 2, 3, 4)]
    found = []
    for wrap in (float, torch.tensor):
        ys = [torch.empty(20, 24), torch.empty(20, 8)]
        ss = [torch.empty(20, 4), torch.empty(20, 2)]
        scales = [wrap(each.scale) for each in given]
        run_forward(inputs[0][0], *kinds, [None] * 2, scales, [0.0] * 2, "triton", ys, ss)
        found.append([*ys, *ss])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_float32_adapters_beside_float16_get_float32_gradients() -> None:
    given = group(
        33, 24, [(20, 4), (12, 3)], dtype=torch.float16, adapter_dtype=torch.float32, dropout_p=0.2
    )
    found = check(given, "triton", torch.float16)
    names = [f"{name}{index}" for name in ("da", "db", "dbias") for index in (0, 1)]
    assert {found[name].dtype for name in names} == {torch.float32}
    assert not torch.equal(found["da0"], found["da0"].half().float())


def test_no_gradient_of_x_leaves_the_factors_gradients(launches: list[str]) -> None:
    given = group(33, 24, [(20, 4), (12, 3)])
    expected = run(given, "triton")
    launches.clear()
    inputs = inputs_of(given)
    inputs[0][0].requires_grad_(False)
    ys = call(given, inputs, "triton")
    torch.autograd.backward(ys, [each.dy for each in given])
    assert "_projections_gradient_kernel" not in launches
    for index, own in enumerate(inputs):
        for name, value in zip(("dweight", "da", "db", "dbias"), own[1:], strict=True):
            torch.testing.assert_close(value.grad, expected[f"{name}{index}"])
