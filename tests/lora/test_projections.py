"""``lora_projections``: every backend's numbers, one saved x, bad input, autograd, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels import BackendUnavailable, explain, lora_projections
from tests.lora.groups import (
    call,
    check,
    flat,
    group,
    inputs_of,
    results,
    run,
    run_separately,
    separate,
)

SHAPES = [
    pytest.param([(20, 4)], id="one"),
    pytest.param([(20, 4), (33, 17)], id="two"),
    pytest.param([(36, 3), (7, 5), (50, 2)], id="three"),
    pytest.param([(8, 1), (1, 3), (9, 20), (5, 2), (12, 4)], id="five"),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_as_accurate_as_eager(
    shapes: list[tuple[int, int]], backend: str, dtype: torch.dtype, dropout_p: float
) -> None:
    check(group((3, 11), 41, shapes, dtype=dtype, dropout_p=dropout_p), backend, dtype)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_each_projection_is_lora_linear_bit_for_bit(
    shapes: list[tuple[int, int]], backend: str
) -> None:
    """All but dx, whose sum over the projections is rounded at other places."""
    given = group(33, 41, shapes, dropout_p=0.3)
    found, expected = run(given, backend), run_separately(given, backend)
    for name in expected.keys() - {"dx"}:
        assert torch.equal(found[name], expected[name]), name
    torch.testing.assert_close(found["dx"], expected["dx"])


@pytest.mark.parametrize("dropout_p", [0.0, [0.3, 0.0, 0.5]], ids=["plain", "mixed"])
def test_gradcheck(dropout_p: Any) -> None:
    given = group(
        (2, 3), 6, [(5, 2), (4, 3), (3, 1)], dtype=torch.float64, dropout_p=dropout_p,
        biases=[True, False, True],
    )  # fmt: skip
    inputs = inputs_of(given)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, *rest = tensors
        own = [[x, *(rest.pop(0) for _ in each[1:])] for each in inputs]
        return call(given, own, "reference")

    assert torch.autograd.gradcheck(function, flat(inputs))


def test_dx_of_16_bit_parts_is_rounded_once() -> None:
    """Sixteen equal parts of 1 + 1/128, which bfloat16 holds; summed in it, they would drift."""
    count, value = 16, 1.0078125
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    one = torch.full((1, 1), value, dtype=torch.bfloat16)
    none = torch.zeros(1, 1, dtype=torch.bfloat16)
    ys = lora_projections(x, [one] * count, [none] * count, [none] * count)
    (dx,) = torch.autograd.grad(sum(ys), [x])
    assert dx.item() == torch.tensor(count * value).bfloat16().item()


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


def test_masks_are_independent_and_drawn_at_once() -> None:
    """A = B = identity and W = 0: y is the dropped x."""
    size = 64
    eye, zeros = torch.eye(size), torch.zeros(size, size)
    x = torch.ones(50, size)
    arguments = (x, [zeros] * 3, [eye] * 3, [eye] * 3)
    torch.manual_seed(3)
    with Operators() as seen:
        first = lora_projections(*arguments, dropout_p=0.5)
    assert seen.names.count("aten.randint") == 1
    torch.manual_seed(3)
    again = lora_projections(*arguments, dropout_p=0.5)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for index in range(3):
        kept, other = first[index] != 0, first[index - 1] != 0
        assert abs(kept.float().mean() - 0.5) < 0.03
        # Of 3200 independent pairs half agree; five standard deviations are 0.044.
        assert abs((kept == other).float().mean() - 0.5) < 0.045
    evaluated = lora_projections(*arguments, dropout_p=0.5, training=False)
    assert all(torch.equal(y, x) for y in evaluated)


def test_x_is_saved_once_and_nothing_of_its_size_beside_it() -> None:
    given = group(64, 40, [(48, 4), (24, 2), (24, 8)], dropout_p=0.1)
    inputs = inputs_of(given)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = call(given, inputs)
    known = {t.data_ptr() for t in flat(inputs)}
    assert sum(t.data_ptr() == inputs[0][0].data_ptr() for t in saved) == 1
    rest = [t for t in saved if t.data_ptr() not in known]
    assert sum(t.numel() * t.element_size() for t in rest) == 64 * (4 + 2 + 8) * 4 + 3 * 8
    assert len(ys) == 3


def test_x_is_kept_only_for_the_gradients_of_a_and_the_weight() -> None:
    given = group((3, 20), 40, [(48, 4), (24, 2)], dropout_p=0.1)
    results = []
    for frozen in (False, True):
        inputs = inputs_of(given)
        for _, weight, lora_a, *_ in inputs:
            weight.requires_grad_(not frozen)
            lora_a.requires_grad_(not frozen)
        places: list[int] = []

        def pack(tensor: Tensor, places: list[int] = places) -> Tensor:
            places.append(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ys = call(given, inputs)
        assert (inputs[0][0].data_ptr() in places) is not frozen
        wanted = [inputs[0][0], *(tensor for own in inputs for tensor in own[3:])]
        results.append(torch.autograd.grad(sum(y.square().sum() for y in ys), wanted))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_gradients_that_nobody_needs_are_not_made() -> None:
    given = group(9, 8, [(6, 2), (5, 3)])
    inputs = inputs_of(given)
    for tensor in (inputs[0][1], inputs[1][1], inputs[1][2]):
        tensor.requires_grad_(False)
    with Operators() as seen:
        (first, second) = call(given, inputs, "reference")
        (first.sum() + second.sum()).backward()
    assert [own[1].grad for own in inputs] == [None, None] and inputs[1][2].grad is None
    assert all(t.grad is not None for t in (inputs[0][0], *inputs[0][2:], *inputs[1][3:]))
    assert "aten.mm" in seen.names


def test_an_unused_result_costs_no_backward_and_changes_no_gradient() -> None:
    given = group(9, 8, [(6, 2), (5, 3), (4, 1)], dropout_p=0.2)
    found = []
    for form in (call, separate):
        inputs = inputs_of(given)
        ys = form(given, inputs, "reference")
        (ys[0] * given[0].dy + 0.0).sum().backward()
        assert all(t.grad is None for own in inputs[1:] for t in own[1:])
        found.append([t.grad for t in inputs[0]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_used_results_whose_parameters_are_frozen() -> None:
    """Only the unused projection trains: backward has nothing to write."""
    given = group(9, 8, [(6, 2), (5, 3)])
    inputs = inputs_of(given)
    for tensor in inputs[0]:
        tensor.requires_grad_(False)
    first, _ = call(given, inputs)
    first.sum().backward()
    assert all(t.grad is None for t in flat(inputs))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_no_rows(shape: tuple[int, ...], backend: str) -> None:
    given = group(shape[:-1], 8, [(6, 2), (5, 3)], dropout_p=0.2)
    found = run(given, backend)
    assert found["y0"].shape == (*shape[:-1], 6) and found["y1"].shape == (*shape[:-1], 5)
    assert found["dx"].shape == shape
    for name in found.keys() - {"dx", "y0", "y1"}:
        assert found[name].numel() and not found[name].count_nonzero(), name


def test_a_projection_without_outputs_beside_one_with() -> None:
    given = group(7, 8, [(0, 2), (5, 3)])
    found, expected = run(given, "reference"), run_separately(given, "reference")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_any_strides() -> None:
    given = group((4, 10), 24, [(30, 4), (20, 3)], dropout_p=0.2)
    expected = run(given)
    inputs = inputs_of(given)
    wide = torch.cat([inputs[0][0].detach()] * 2, -1)[..., 24:].requires_grad_()
    turned = [
        [wide, *(t.detach().t().contiguous().t().requires_grad_() for t in own[1:])]
        for own in inputs
    ]
    assert not turned[0][1].is_contiguous() and not wide.is_contiguous()
    found = results(given, call(given, turned), turned)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_float32_adapters_beside_bfloat16_and_autocast() -> None:
    options = {"dtype": torch.bfloat16, "adapter_dtype": torch.float32, "dropout_p": 0.2}
    given = group(33, 24, [(20, 4), (12, 3)], **options)
    check(given, "reference", torch.bfloat16)
    plain = run(given)
    assert {plain[f"da{i}"].dtype for i in (0, 1)} == {torch.float32}
    assert {plain[name].dtype for name in ("dx", "y0", "y1", "dweight1")} == {torch.bfloat16}
    wide = group(33, 24, [(20, 4), (12, 3)], dropout_p=0.2)
    inputs = inputs_of(wide)
    with torch.autocast("cpu", torch.bfloat16):
        ys = call(wide, inputs)
    found = results(wide, ys, inputs)
    assert {y.dtype for y in ys} == {torch.bfloat16}
    assert {found[name].dtype for name in ("dx", "dweight0", "da1")} == {torch.float32}


def test_inputs_are_never_written_to() -> None:
    given = group(9, 8, [(6, 2), (5, 3)], dropout_p=0.2)
    inputs = inputs_of(given)
    before = [t.detach().clone() for t in flat(inputs)]
    results(given, call(given, inputs), inputs)
    assert all(torch.equal(one, other) for one, other in zip(flat(inputs), before, strict=True))


def _arguments(**changes: Any) -> dict[str, Any]:
    arguments = {
        "x": torch.randn(4, 8),
        "weights": [torch.randn(6, 8), torch.randn(5, 8)],
        "lora_as": [torch.randn(2, 8), torch.randn(3, 8)],
        "lora_bs": [torch.randn(6, 2), torch.randn(5, 3)],
    }
    return arguments | changes


_W, _A = torch.randn(6, 8), torch.randn(2, 8)
BAD = [
    ({"weights": torch.randn(2, 6, 8)}, TypeError, "weights must be a list or tuple"),
    ({"weights": []}, ValueError, "weights must have at least one entry"),
    ({"lora_as": [_A]}, ValueError, "lora_as must have 2 entries, as many as weights, got 1"),
    ({"lora_bs": []}, ValueError, "lora_bs must have 2 entries"),
    ({"biases": [None]}, ValueError, "biases must have 2 entries"),
    ({"scales": [1.0]}, ValueError, "scales must have 2 entries"),
    ({"dropout_p": [0.1] * 3}, ValueError, "dropout_p must have 2 entries"),
    ({"weights": [_W, torch.randn(5, 9)]}, ValueError, r"x must have shape .*weights\[1\]"),
    ({"weights": [_W, None]}, TypeError, r"weights\[1\] must be a torch.Tensor"),
    ({"weights": [_W, torch.randn(5, 8).half()]}, TypeError, r"weights\[1\] is torch.float16"),
    ({"lora_as": [_A, torch.randn(3, 9)]}, ValueError, r"lora_as\[1\] must have shape \[r, 8\]"),
    ({"lora_as": [_A, _A]}, ValueError, r"lora_bs\[1\] must have shape \[5, 2\].*lora_as\[1\]"),
    ({"biases": [None, torch.randn(6)]}, ValueError, r"biases\[1\] must have shape \[5\]"),
    ({"biases": [torch.randn(6, device="meta"), None]}, ValueError, r"biases\[0\] is on meta"),
    ({"scales": [1.0, "2"]}, TypeError, r"scales\[1\] must be a number"),
    ({"scales": float("inf")}, ValueError, "scales must be finite"),
    ({"dropout_p": [0.1, 1.0]}, ValueError, r"dropout_p\[1\] must lie in \[0, 1\)"),
    ({"dropout_p": 0.1, "seeds": [torch.tensor([1])]}, ValueError, "seeds must have 2 entries"),
    (
        {"dropout_p": 0.1, "seeds": [torch.tensor([1]), 7]},
        TypeError,
        r"seeds\[1\] must be an int64",
    ),
    ({"backend": "tritn"}, ValueError, "backend must be one of"),
    ({"backend": "cuda"}, BackendUnavailable, "lora_projections.*cuda"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name_and_index(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        lora_projections(**_arguments(**change))


def test_explain_names_the_backend_and_how_it_runs() -> None:
    found = explain(lora_projections, **_arguments())
    assert found.op == "lora_projections" and found.backend == "cpp"
    assert found.plan == "one by one: 2 projections"
    with pytest.raises(ValueError, match=r"lora_bs must have 2 entries"):
        explain(lora_projections, **_arguments(lora_bs=[]))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_fullgraph_gives_what_eager_gives(backend: str, dropout_p: float) -> None:
    torch._dynamo.reset()
    given = group((3, 5), 16, [(12, 4), (8, 2), (6, 3)], dropout_p=dropout_p)
    inputs = inputs_of(given)
    inputs[0][1].requires_grad_(False)

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(own: list[list[Tensor]]) -> tuple[Tensor, ...]:
        return call(given, own)

    trained = [t for t in flat(inputs) if t.requires_grad]
    dys = [each.dy for each in given]
    found = torch.autograd.grad(compiled(inputs), trained, dys)
    expected = torch.autograd.grad(call(given, inputs), trained, dys)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_opcheck() -> None:
    given = group(5, 16, [(12, 4), (8, 2)], dropout_p=0.3)
    inputs = [[t.detach() for t in own] for own in inputs_of(given)]
    x, ops = inputs[0][0], torch.ops.peft_kernels
    weights, lora_as, lora_bs, biases = ([own[kind] for own in inputs] for kind in (1, 2, 3, 4))
    seeds, scales = [each.seed for each in given], [torch.tensor(each.scale) for each in given]
    ss = [torch.empty(5, 4), torch.empty(5, 2)]
    ys = [torch.empty(5, 12), torch.empty(5, 8)]
    rest = (seeds, scales, [0.3, 0.3], None)
    torch.library.opcheck(
        ops.lora_projections_forward.default, (x, weights, lora_as, lora_bs, biases, *rest, ys, ss)
    )
    outputs = [torch.empty_like(t) for t in (x, *lora_as, *lora_bs)]
    torch.library.opcheck(
        ops.lora_projections_backward.default,
        ([each.dy for each in given], x, ss, weights, lora_as, lora_bs, *rest, list(range(5)),
         outputs),
    )  # fmt: skip
