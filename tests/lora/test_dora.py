"""``dora_linear``: the norm, the values, the gradients, and what its user may get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from peft_kernels import BackendUnavailable, dora_linear, explain, lora_linear
from peft_kernels.core import extension, rng
from peft_kernels.lora import dora
from peft_kernels.lora.dropout import drop
from tests.lora.dora_problems import dense_norm, fused, inputs, judge, mask, peft_form, results
from tests.lora.problems import problem
from tests.numerics import assert_as_accurate_as_eager

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    pytest.param(1, 1, 1, 1, id="one-of-everything"),
    pytest.param((2, 9), 20, 33, 3, id="ragged"),
    pytest.param(64, 96, 64, 16, id="aligned"),
    pytest.param(40, 24, 20, 29, id="rank-above-both-sizes"),
]


@pytest.mark.parametrize("scale", [0.0, 1.5, -3.0, 1e3])
@pytest.mark.parametrize("rank", [1, 7, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_the_dense_ones_in_float32(
    dtype: torch.dtype, rank: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several chunks of rows, the last one shorter.
    monkeypatch.setattr(dora, "_CHUNK", 7 * 48)
    given = problem(1, 45, 48, rank, dtype=dtype, scale=scale)
    tensors = inputs(given)
    found = dora.dora_norm(tensors[1], tensors[2], tensors[3], scale)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide and not found.requires_grad
    exact = dense_norm(given, inputs(given, torch.float64))
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact, rtol=1e-14, atol=0.0)
        return
    eager = dense_norm(given, inputs(given, wide))
    assert_as_accurate_as_eager("norm", found, [eager], exact, wide)


def test_norm_of_a_new_adapter_is_the_bases_own() -> None:
    given = problem(1, 40, 48, 4)
    _, weight, lora_a, lora_b, *_ = inputs(given)
    found = dora.dora_norm(weight, lora_a, torch.zeros_like(lora_b), 2.0)
    torch.testing.assert_close(found, weight.detach().norm(dim=1), rtol=1e-6, atol=0.0)


def test_norm_of_rows_that_cancel_is_never_nan() -> None:
    lora_a, lora_b = torch.randn(3, 16), torch.randn(200, 3)
    found = dora.dora_norm(-1.7 * lora_b @ lora_a, lora_a, lora_b, 1.7)
    assert found.isfinite().all() and (found < 0.02 * (lora_b @ lora_a).norm(dim=1)).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "rank"), SHAPES)
def test_as_accurate_as_peft(
    tokens: Any, out_features: int, in_features: int, rank: int, dtype: torch.dtype,
    dropout_p: float,
) -> None:  # fmt: skip
    given = problem(tokens, out_features, in_features, rank, dtype=dtype, dropout_p=dropout_p)
    tensors = inputs(given)
    judge(given, results(fused(given, tensors), tensors, given.dy), dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapters_beside_16_bits(dtype: torch.dtype, dropout_p: float) -> None:
    given = problem(70, 48, 64, 8, dtype=dtype, adapter_dtype=torch.float32, dropout_p=dropout_p)
    tensors = inputs(given)
    found = results(fused(given, tensors), tensors, given.dy)
    assert found["y"].dtype == dtype
    for value, name in zip(tensors, list(found)[1:], strict=True):
        assert found[name].dtype == value.dtype, name
    judge(given, found, dtype)
    # A and B are cast down, as in lora_linear: their own gradients are those of 16 bits.
    outer = {name: found[name] for name in ("y", "dx", "dweight", "dbias")}
    judge(given, outer, dtype, as_given=True)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_backends(
    backend: str, bias: bool, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sum of the magnitude's gradient in several chunks of tokens, the last one shorter.
    monkeypatch.setattr(dora, "_CHUNK", 5 * 24)
    given = problem((3, 7), 24, 40, 5, bias=bias, dropout_p=dropout_p, scale=40.0)
    tensors = inputs(given)
    judge(given, results(fused(given, tensors, backend), tensors, given.dy), torch.float32)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_by_differences(dropout_p: float) -> None:
    """Of all but A and B, on which the norm depends and by definition is not differentiated."""
    given = problem(5, 4, 6, 2, dtype=torch.float64, dropout_p=dropout_p)
    tensors = inputs(given)
    for place in (1, 2, 3):
        tensors[place].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *t: fused(given, list(t)), tensors)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_weight_changed_in_place_is_seen(dropout_p: float) -> None:
    """Through ``.data`` too, as peft merges: no version counter and no address tells."""
    given = problem(6, 12, 16, 3, dtype=torch.float64, dropout_p=dropout_p)
    tensors = inputs(given)
    fused(given, tensors)
    tensors[1].data += 1.0
    torch.testing.assert_close(fused(given, tensors), peft_form(given, tensors))
    with torch.no_grad():
        tensors[1][3] *= 5.0
    torch.testing.assert_close(fused(given, tensors), peft_form(given, tensors))


def test_a_new_adapter_leaves_the_base_as_it_is() -> None:
    given = problem(6, 12, 16, 3)
    x, weight, lora_a, lora_b, _, bias = (t.detach() for t in inputs(given))
    magnitude = weight.norm(dim=1)
    y = dora_linear(x, weight, lora_a, torch.zeros_like(lora_b), magnitude, bias, scale=2.0)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))


def test_any_strides_and_leading_dimensions() -> None:
    given = problem((4, 3, 5), 12, 16, 3, dtype=torch.float64, dropout_p=0.2)
    tensors = [t.detach() for t in inputs(given)]
    expected = fused(given, tensors)
    x = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    strided = [x, *(t.t().contiguous().t() for t in tensors[1:4]), *tensors[4:]]
    assert not any(t.is_contiguous() for t in strided[:4])
    torch.testing.assert_close(fused(given, strided), expected)
    one = problem((), 12, 16, 3)
    single = inputs(one)
    judge(one, results(fused(one, single), single, one.dy), torch.float32)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_no_rows(dropout_p: float) -> None:
    given = problem((2, 0), 12, 16, 3, dropout_p=dropout_p)
    tensors = inputs(given)
    found = results(fused(given, tensors), tensors, given.dy)
    assert found["y"].shape == (2, 0, 12)
    assert not any(value.any() for value in found.values())


def test_a_base_that_needs_no_gradient_gets_none() -> None:
    given = problem(6, 12, 16, 3)
    tensors = inputs(given)
    for place in (0, 1, 5):
        tensors[place].requires_grad_(False)
    fused(given, tensors).sum().backward()
    assert [t.grad is not None for t in tensors] == [False, False, True, True, True, False]


def _saved(given: Any, trained: tuple[int, ...]) -> int:
    """Return the bytes saved for backward in storages other than those of the inputs."""
    tensors = inputs(given)
    for place, tensor in enumerate(tensors):
        tensor.requires_grad_(place in trained)
    storages: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        keep_alive = fused(given, tensors)
    for tensor in tensors:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del keep_alive
    return sum(storages.values())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_one_tensor_of_the_size_of_y_is_saved_where_the_magnitude_is_trained(
    dropout_p: float,
) -> None:
    given = problem(256, 128, 192, 2, dropout_p=dropout_p)
    y_bytes, small = 256 * 128 * 4, 4 * (256 * 2 + 128 * 8)
    assert 0 < _saved(given, (0, 2, 3)) <= small
    assert y_bytes < _saved(given, (0, 2, 3, 4)) <= y_bytes + small


def test_inputs_are_never_written_to() -> None:
    given = problem(9, 6, 8, 2, dropout_p=0.2)
    tensors = inputs(given)
    before = [t.detach().clone() for t in tensors]
    dy = given.dy.clone()
    fused(given, tensors).backward(dy)
    assert all(torch.equal(t, copied) for t, copied in zip(tensors, before, strict=True))
    assert torch.equal(dy, given.dy)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_autocast(base: torch.dtype, dropout_p: float) -> None:
    given = problem(70, 48, 64, 8, dtype=base, adapter_dtype=torch.float32, dropout_p=dropout_p)
    tensors = inputs(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(given, tensors)
        norm = dora.dora_norm(tensors[1], tensors[2], tensors[3], given.scale)
    assert y.dtype == torch.bfloat16
    exact = dense_norm(given, inputs(given, torch.float64))
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0.0)
    found = results(y, tensors, given.dy)
    wide, others = inputs(given, torch.float64), inputs(given)
    reference = results(peft_form(given, wide), wide, given.dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = results(peft_form(given, others), others, given.dy)
    for value, name in zip(tensors, list(found)[1:], strict=True):
        assert found[name].dtype == value.dtype, name
    for name, value in found.items():
        assert_as_accurate_as_eager(name, value, [expected[name]], reference[name], torch.bfloat16)


def test_dropout_is_the_identity_in_evaluation_and_follows_the_generator_in_training() -> None:
    given = problem(6, 12, 16, 3)
    tensors = [t.detach() for t in inputs(given)]
    expected = dora_linear(*tensors, scale=1.5)
    assert torch.equal(dora_linear(*tensors, scale=1.5, dropout_p=0.4, training=False), expected)
    torch.manual_seed(3)
    first = dora_linear(*tensors, scale=1.5, dropout_p=0.4)
    second = dora_linear(*tensors, scale=1.5, dropout_p=0.4)
    torch.manual_seed(3)
    assert torch.equal(dora_linear(*tensors, scale=1.5, dropout_p=0.4), first)
    assert not torch.equal(first, second)


def test_drop_is_the_mask_and_its_own_backward() -> None:
    given = problem((3, 5), 12, 17, 3, dropout_p=0.4)
    x = given.x.clone().requires_grad_()
    y = drop(x, given.seed, 0.4)
    torch.testing.assert_close(y, x * mask(given) / 0.6)
    y.sum().backward()
    torch.testing.assert_close(x.grad, mask(given) / 0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (21, 130), (40, 384)])
def test_compiled_drop_is_the_specification(
    size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from strided rows, and once more without the compiled module."""
    if extension.why_not() is not None:
        pytest.skip(str(extension.why_not()))
    x = torch.randn(size[0], size[1] + 5).to(dtype)[:, : size[1]]
    seed = torch.tensor([-(2**61) + 5])
    found = drop(x, seed, 0.3)
    monkeypatch.setattr(extension, "why_not_products", lambda dtype: "not here")
    expected = drop(x, seed, 0.3)
    keep = rng.dropout_mask(seed, *size, 0.3)
    assert torch.equal(found == 0, ~keep) and torch.equal(expected == 0, ~keep)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, torch.where(keep, x / 0.7, 0.0))


def test_dropped_elements_are_zeros_whatever_they_were() -> None:
    x = torch.full((64, 8), float("inf"))
    found = drop(x, torch.tensor([3]), 0.5)
    assert torch.equal(found == 0.0, ~rng.dropout_mask(torch.tensor([3]), 64, 8, 0.5))


BAD = [
    ({"magnitude": 1.0}, TypeError, "magnitude must be a torch.Tensor"),
    ({"magnitude": torch.ones(7)}, ValueError, r"magnitude must have shape \[6\].*\[7\]"),
    ({"magnitude": torch.ones(6, 1)}, ValueError, r"magnitude must have shape \[6\].*\[6, 1\]"),
    ({"magnitude": torch.ones(6, dtype=torch.int64)}, TypeError, "magnitude must be float64"),
    ({"magnitude": torch.ones(6, device="meta")}, ValueError, "magnitude is on meta"),
    ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[6\]"),
    ({"lora_b": torch.ones(6, 3)}, ValueError, r"lora_b must have shape \[6, 2\]"),
    ({"x": torch.ones(4, 7)}, ValueError, r"x must have shape \[..., 8\]"),
    ({"scale": float("inf")}, ValueError, "scale must be finite"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must lie in"),
    ({"dropout_p": 0.1, "seed": 7}, TypeError, "seed must be an int64"),
    ({"backend": "tritn"}, ValueError, "backend must be one of"),
    ({"backend": "cuda"}, BackendUnavailable, "cuda"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    tensors = inputs(problem(4, 6, 8, 2))
    names = ("x", "weight", "lora_a", "lora_b", "magnitude", "bias")
    with pytest.raises(error, match=match):
        dora_linear(**(dict(zip(names, tensors, strict=True)) | change))


def test_a_magnitude_that_does_not_mix_is_refused() -> None:
    given = problem(4, 6, 8, 2, dtype=torch.bfloat16)
    tensors = inputs(given)
    tensors[4] = tensors[4].detach().half()
    with pytest.raises(TypeError, match="magnitude is torch.float16 and x is torch.bfloat16"):
        fused(given, tensors)


def test_explain_names_the_backend_of_its_products() -> None:
    tensors = inputs(problem(4, 6, 8, 2))
    x, weight, lora_a, lora_b, _, bias = tensors
    assert explain(dora_linear, *tensors) == explain(lora_linear, x, weight, lora_a, lora_b, bias)


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_fullgraph_gives_what_eager_gives(backend: str, dropout_p: float) -> None:
    given = problem((3, 5), 12, 16, 4, dropout_p=dropout_p)
    compiled = torch.compile(
        lambda *tensors: fused(given, list(tensors)), fullgraph=True, backend=backend
    )
    tensors, others = inputs(given), inputs(given)
    found = results(compiled(*tensors), tensors, given.dy)
    expected = results(fused(given, others), others, given.dy)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.timeout(300)
def test_no_recompilation_from_the_third_distinct_scale_on() -> None:
    tensors = inputs(problem(4, 12, 16, 4))
    counter = CompileCounter()
    run = torch.compile(
        lambda scale: dora_linear(*tensors, scale=scale), fullgraph=True, backend=counter
    )
    frames = []
    for scale in (0.5, 1.5, 2.5, 3.5, 4.5):
        torch.testing.assert_close(run(scale), dora_linear(*tensors, scale=scale))
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 4 and frames[1] <= 2


def test_opcheck() -> None:
    given = problem(5, 12, 16, 4)
    x, weight, lora_a, lora_b, magnitude, bias = (t.detach() for t in inputs(given))
    ops, check = torch.ops.peft_kernels, torch.library.opcheck
    y = torch.empty(5, 12)
    check(ops.dora_norm.default, (weight, lora_a, lora_b, torch.tensor(1.5), torch.empty(12)))
    check(ops.dora_scaled.default, (given.dy, magnitude, bias, y))
    check(
        ops.dora_scaled_backward.default,
        (given.dy, given.dy, magnitude, y, torch.empty(12)),
    )
    check(ops.drop.default, (x, given.seed, 0.3, torch.empty_like(x)))
