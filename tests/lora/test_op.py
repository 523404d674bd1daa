"""``lora_linear`` as its user meets it: bad input, dtypes, autocast, memory, seeds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_kernels import BackendUnavailable, lora_linear
from tests.lora.problems import check, eager, fused, problem, results
from tests.numerics import assert_as_accurate_as_eager


def _arguments(**changes: Any) -> dict[str, Any]:
    given = problem(4, 6, 8, 2)
    arguments = {
        "x": given.x, "weight": given.weight, "lora_a": given.lora_a, "lora_b": given.lora_b,
        "bias": given.bias,
    }  # fmt: skip
    return arguments | changes


BAD = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[..., K\]"),
    ({"x": torch.randn(4, 9)}, ValueError, r"x must have shape \[..., 8\].*\[4, 9\]"),
    ({"x": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "x must be float64.*torch.int64"),
    ({"weight": None}, TypeError, "weight must be a torch.Tensor"),
    ({"weight": torch.randn(6, 8, 1)}, ValueError, r"weight must have shape \[N, K\]"),
    ({"weight": torch.ones(6, 8, dtype=torch.int8)}, TypeError, "weight.*dequantise"),
    ({"weight": torch.randn(6, 8).to_sparse()}, TypeError, "weight must be a dense tensor"),
    ({"weight": torch.randn(6, 8).half()}, TypeError, "weight is torch.float16.*autocast"),
    ({"lora_a": torch.randn(2, 9)}, ValueError, r"lora_a must have shape \[r, 8\].*\[2, 9\]"),
    ({"lora_a": torch.randn(0, 8)}, ValueError, "lora_a must have a rank of at least 1"),
    ({"lora_a": torch.randn(3, 8)}, ValueError, r"lora_b must have shape \[6, 3\].*\[6, 2\]"),
    ({"lora_b": torch.randn(7, 2)}, ValueError, r"lora_b must have shape \[6, 2\].*\[7, 2\]"),
    ({"bias": torch.randn(7)}, ValueError, r"bias must have shape \[6\].*\[7\]"),
    ({"bias": torch.randn(6, device="meta")}, ValueError, "bias is on meta while x is on cpu"),
    ({"scale": "2"}, TypeError, "scale must be a number"),
    ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ({"scale": torch.tensor(2)}, TypeError, "scale must be a number.*float32 tensor.*int64"),
    ({"scale": torch.ones(2)}, ValueError, "scale must be .*one element.*shape \\[2\\]"),
    ({"scale": torch.ones((), device="meta")}, ValueError, "scale must be .*on cpu.*on meta"),
    ({"scale": torch.ones((), requires_grad=True)}, ValueError, "scale must.*requires a gradient"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p must lie in \[0, 1\)"),
    ({"dropout_p": True}, TypeError, "dropout_p must be a number"),
    ({"dropout_p": 0.1, "seed": 7}, TypeError, r"seed must be an int64.*torch.tensor\(\[7\]"),
    ({"dropout_p": 0.1, "seed": torch.ones(2, dtype=torch.int64)}, ValueError, "one element"),
    ({"backend": "tritn"}, ValueError, "backend must be one of triton, cuda, cpp, reference"),
    ({"backend": "cuda"}, BackendUnavailable, "cuda"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        lora_linear(**_arguments(**change))


def test_mixed_16_bit_dtypes_are_refused_with_the_way_out() -> None:
    arguments = {
        name: value.bfloat16() for name, value in _arguments().items() if isinstance(value, Tensor)
    }
    arguments["lora_a"] = arguments["lora_a"].half()
    with pytest.raises(TypeError, match="lora_a is torch.float16 and x is torch.bfloat16.*float32"):
        lora_linear(**arguments)


def test_a_quantised_tensor_subclass_is_refused() -> None:
    class Packed(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            raise AssertionError("nothing may run")

    weight = torch.Tensor._make_wrapper_subclass(Packed, (6, 8), dtype=torch.float32)
    with pytest.raises(TypeError, match="weight is a .*Packed"):
        lora_linear(**_arguments(weight=weight))


def test_a_sharded_weight_is_refused_with_the_way_out() -> None:
    class DTensor(Tensor):
        """Named as torch.distributed names its sharded tensor."""

    weight = torch.randn(6, 8).as_subclass(DTensor)
    with pytest.raises(TypeError, match="weight is a DTensor.*to_local"):
        lora_linear(**_arguments(weight=weight))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_float32_adapters_beside_bfloat16(dropout_p: float) -> None:
    """Peft's default: A and B are cast down, x is not cast up, gradients come back in float32."""
    given = problem(
        33, 20, 24, 4, dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout_p=dropout_p
    )
    inputs = given.inputs()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fused(given, inputs, None)
    assert y.dtype == torch.bfloat16
    assert not any(t.dtype == torch.float32 and t.numel() >= given.x.numel() for t in saved)
    found = results(y, inputs, given.dy)
    assert [found[name].dtype for name in ("da", "db", "dbias")] == [torch.float32] * 3
    assert found["dx"].dtype == found["dweight"].dtype == torch.bfloat16
    check(given, "reference", torch.bfloat16)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters_own(
    base: torch.dtype, adapters: torch.dtype
) -> None:
    given = problem((3, 5), 6, 8, 2, dtype=base, adapter_dtype=adapters)
    inputs = given.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(given, inputs, None)
    assert y.dtype == torch.bfloat16
    found = results(y, inputs, given.dy)
    for value, name in zip(inputs, ("dx", "dweight", "da", "db", "dbias"), strict=True):
        assert found[name].dtype == value.dtype, name
    wide, others = given.inputs(torch.float64), given.inputs()
    exact = results(eager(given, wide), wide, given.dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = results(eager(given, others), others, given.dy)
    for name, value in found.items():
        assert_as_accurate_as_eager(name, value, [expected[name]], exact[name], torch.bfloat16)


def test_autocast_leaves_float64_alone() -> None:
    given = problem(4, 6, 8, 2, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(given, given.inputs(), None).dtype == torch.float64
        with pytest.raises(TypeError, match="x is torch.float64: cast one of them, autocast leave"):
            lora_linear(torch.ones(2, 2, dtype=torch.float64), *[torch.ones(2, 2)] * 3)


def _saved_bytes(run: Any, known: list[Tensor]) -> int:
    """Return the bytes saved for backward in storages other than those of ``known``."""
    storages: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        keep_alive = run()
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del keep_alive
    return sum(storages.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_three_projections_of_one_x_save_it_once_and_their_s(autocast: bool) -> None:
    dtype = torch.float32
    cases = [problem(64, 48, 40, 4, dtype=dtype, dropout_p=0.1, seed=seed) for seed in range(3)]
    x = cases[0].x.requires_grad_()
    parameters = [given.inputs()[1:] for given in cases]

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return [
                fused(case, [x, *rest], None) for case, rest in zip(cases, parameters, strict=True)
            ]

    known = [x, *(tensor for rest in parameters for tensor in rest)]
    s_bytes = 64 * 4 * (2 if autocast else 4)
    seed_bytes = 8
    assert _saved_bytes(run, known) == 3 * (s_bytes + seed_bytes)
    assert _saved_bytes(run, known[1:]) == 3 * (s_bytes + seed_bytes) + x.numel() * 4


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_scale_may_be_a_tensor_that_is_read_at_run_time(backend: str | None) -> None:
    results = []
    held = torch.tensor(0.3)
    given = {name: value.requires_grad_() for name, value in _arguments().items()}
    for scale in (0.3, held):
        y = lora_linear(**given, scale=scale, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(given.values()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    y = lora_linear(**given, scale=held, backend=backend)
    held.fill_(0.4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [64, 3, (2, 0), (5, 130)])
def test_x_is_kept_only_for_the_gradients_of_a_and_the_weight(
    tokens: int | tuple[int, ...], autocast: bool, backend: str | None
) -> None:
    # LoRA-FA trains B alone, to keep no activations.
    given = problem(tokens, 48, 40, 4, dropout_p=0.3)
    results = []
    for frozen in (False, True):
        inputs = given.inputs()
        x, weight, lora_a, lora_b, bias = inputs
        weight.requires_grad_(not frozen)
        lora_a.requires_grad_(not frozen)

        def run(inputs: list[Tensor] = inputs) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return fused(given, inputs, backend)

        y = run()
        results.append(torch.autograd.grad(y, [x, lora_b, bias], given.dy.to(y.dtype)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    s_bytes = x.numel() // 40 * 4 * (2 if autocast else 4)
    assert _saved_bytes(lambda: [run()], [weight, lora_a, lora_b]) == s_bytes + 8


def test_inputs_are_never_written_to() -> None:
    given = problem(9, 6, 8, 2, dropout_p=0.2)
    inputs = given.inputs()
    before = [t.detach().clone() for t in inputs]
    dy = given.dy.clone()
    fused(given, inputs, None).backward(dy)
    for value, copied in zip(inputs, before, strict=True):
        assert torch.equal(value, copied)
    assert torch.equal(dy, given.dy)


def test_dropout_follows_manual_seed_and_differs_between_calls() -> None:
    arguments = _arguments(dropout_p=0.5)
    torch.manual_seed(5)
    first, second = lora_linear(**arguments), lora_linear(**arguments)
    torch.manual_seed(5)
    assert torch.equal(first, lora_linear(**arguments))
    assert not torch.equal(first, second)


def test_evaluation_ignores_dropout_and_leaves_the_generator_alone() -> None:
    arguments = _arguments()
    expected = lora_linear(**arguments)
    state = torch.get_rng_state()
    assert torch.equal(lora_linear(**arguments, dropout_p=0.5, training=False), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout_gives_the_gradients_of_the_run_without(
    use_reentrant: bool,
) -> None:
    given = problem(9, 6, 8, 2)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(11)
        inputs = given.inputs()

        def run(*tensors: Tensor) -> Tensor:
            return lora_linear(*tensors, scale=1.5, dropout_p=0.4).relu()

        y = checkpoint(run, *inputs, use_reentrant=use_reentrant) if checkpointed else run(*inputs)
        found.append([y, *torch.autograd.grad(y, inputs, given.dy)] if not use_reentrant else [y])
        if use_reentrant:
            y.backward(given.dy)
            found[-1] += [t.grad for t in inputs]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_weight_that_changed_in_place_before_backward_raises() -> None:
    given = problem(4, 6, 8, 2)
    inputs = given.inputs()
    y = fused(given, inputs, None)
    with torch.no_grad():
        inputs[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(given.dy)


def test_meta_tensors_give_shapes() -> None:
    arguments = {
        name: value.to("meta") for name, value in _arguments().items() if isinstance(value, Tensor)
    }
    assert lora_linear(**arguments).shape == (4, 6)


def test_gradients_arrive_in_a_deep_copied_model() -> None:
    from peft_kernels import LoRALinear

    layer = copy.deepcopy(LoRALinear(8, 6, r=2, lora_alpha=4))
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.lora_B.grad is not None and layer.weight.grad is None


def test_a_demand_that_cannot_be_met_raises_without_rows_too() -> None:
    given = _arguments(x=torch.empty(0, 8), backend="cuda")
    with pytest.raises(BackendUnavailable, match="cuda"):
        lora_linear(**given)
