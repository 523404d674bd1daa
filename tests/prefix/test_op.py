"""``prefix_attention`` as its user meets it: dtypes, layouts, memory, seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_kernels import prefix_attention
from tests.numerics import assert_as_accurate_as_eager
from tests.prefix.problems import (
    Problem,
    call_arguments,
    check,
    eager,
    fused,
    problem,
    results,
)

EMPTY = {
    "batch": {"batch": 0},
    "batch of samples": {"batch": 0, "shared": False},
    "queries": {"queries": 0},
    "keys": {"queries": 2, "keys": 0},
    "prefix": {"prefix": 0},
    "keys and prefix": {"queries": 2, "keys": 0, "prefix": 0},
    "all": {"batch": 0, "queries": 0, "keys": 0, "prefix": 0},
    "packed": {"lengths": (0, 0)},
}


@pytest.mark.parametrize("what", EMPTY)
@pytest.mark.parametrize("gated", [False, True])
def test_empty_tensors_give_empty_results_and_zero_gradients(
    what: str, gated: bool, poisoned_allocations: None
) -> None:
    given = problem(**EMPTY[what], gated=gated, dropout_p=0.3)  # type: ignore[arg-type]
    inputs, others = given.inputs(), given.inputs()
    found = results(fused(given, inputs), inputs, given.dout, given.dlse)
    expected = results(eager(given, others), others, given.dout, given.dlse)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("shared", [False, True])
def test_a_float32_prefix_beside_bfloat16(shared: bool) -> None:
    """The prefix is cast down, the sequence is not cast up, gradients come back in float32."""
    given = problem(
        2, 4, 2, 17, 19, 5, 16, dtype=torch.bfloat16, prefix_dtype=torch.float32, shared=shared,
        gated=True, causal=True,
    )  # fmt: skip
    inputs = given.inputs()
    found = results(fused(given, inputs), inputs, given.dout, given.dlse)
    assert found["out"].dtype == torch.bfloat16 and found["lse"].dtype == torch.float32
    assert all(found[f"d {name}"].dtype == t.dtype for name, t in inputs.items())
    check(given, None, torch.bfloat16)
    # Float32 sums, not bfloat16 ones kept in float32.
    grad = found["d prefix_key"]
    assert not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", [torch.float32, torch.float16, torch.float64])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters_own(
    base: torch.dtype, prefix: torch.dtype
) -> None:
    given = problem(2, 4, 2, 17, 19, 5, 16, dtype=base, prefix_dtype=prefix, gated=True)
    inputs = given.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = fused(given, inputs)
    assert out.dtype == torch.bfloat16
    found = results((out, lse), inputs, given.dout, given.dlse)
    assert all(found[f"d {name}"].dtype == t.dtype for name, t in inputs.items())
    wide, others = given.inputs(torch.float64), given.inputs(torch.bfloat16)
    exact = results(eager(given, wide), wide, given.dout, given.dlse)
    expected = results(eager(given, others), others, given.dout, given.dlse)
    for name, value in found.items():
        assert_as_accurate_as_eager(name, value, [expected[name]], exact[name], torch.bfloat16)


def test_autocast_leaves_float64_alone() -> None:
    given = problem(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(given, given.inputs())[0].dtype == torch.float64


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(-2, -3).contiguous().transpose(-2, -3),
    "features outside": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "sliced": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], -2)[..., : t.shape[-2], :],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", [False, True])
def test_strides_change_nothing(layout: str, gated: bool) -> None:
    given = problem(gated=gated, causal=True, padding="left")
    change = LAYOUTS[layout]
    plain = given.inputs()
    expected = results(fused(given, plain), plain, given.dout, given.dlse)
    inputs = {
        name: (change(t) if t.dim() > 1 else t).detach().requires_grad_()
        for name, t in given.tensors.items()
    }
    found = results(fused(given, inputs), inputs, change(given.dout), given.dlse)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_expanded_tensors_are_read_where_they_lie() -> None:
    given = problem(shared=False, batch=3)
    tensors = {name: t[:1] for name, t in given.tensors.items()}
    expanded = {name: t.expand(3, -1, -1, -1).requires_grad_() for name, t in tensors.items()}
    copied = {name: t.detach().contiguous().requires_grad_() for name, t in expanded.items()}
    dout, dlse = torch.ones(()).expand(3, 4, 5, 16), torch.ones(()).expand(3, 4, 5)
    found = results(fused(given, expanded), expanded, dout, dlse)
    expected = results(fused(given, copied), copied, dout, dlse)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_a_shared_prefix_is_the_same_prefix_for_every_row() -> None:
    given = problem(batch=3, gated=True)
    shared, own = given.inputs(), given.inputs()
    own |= {
        name: own[name].detach().expand(3, -1, -1, -1).clone().requires_grad_()
        for name in ("prefix_key", "prefix_value")
    }
    found = results(fused(given, shared), shared, given.dout, given.dlse)
    expected = results(fused(given, own), own, given.dout, given.dlse)
    for name, value in found.items():
        other = expected[name]
        other = other.sum(0) if name.startswith("d prefix") else other
        torch.testing.assert_close(value, other)


NAMES = ("query", "key", "value", "prefix_key", "prefix_value", "gate")


@pytest.mark.parametrize("trained", [(name,) for name in NAMES] + [NAMES[3:], NAMES[:1]])
def test_a_frozen_tensors_share_is_skipped_and_changes_no_other(trained: tuple[str, ...]) -> None:
    given = problem(gated=True, dropout_p=0.2, causal=True)
    inputs = given.inputs()
    expected = results(fused(given, inputs), inputs, given.dout, given.dlse)
    some = {name: t.detach().requires_grad_(name in trained) for name, t in given.tensors.items()}
    out, lse = fused(given, some)
    torch.autograd.backward([out, lse], [given.dout, given.dlse])
    for name, t in some.items():
        if name in trained:
            assert torch.equal(t.grad, expected[f"d {name}"])
        else:
            assert t.grad is None


@pytest.mark.parametrize("which", ["out", "lse"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_result_that_nothing_depends_on_has_no_gradient(which: str, gated: bool) -> None:
    given = problem(gated=gated)
    found = []
    for compute in (fused, eager):
        inputs = given.inputs()
        out, lse = compute(given, inputs)
        y, dy = (out, given.dout) if which == "out" else (lse, given.dlse)
        gradients = torch.autograd.grad(
            y, list(inputs.values()), dy, allow_unused=True, materialize_grads=True
        )
        found.append(gradients)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_without_return_lse_the_result_is_the_tensor_alone() -> None:
    arguments = call_arguments(causal=True)
    out, lse = prefix_attention(**arguments, return_lse=True)
    alone = prefix_attention(**arguments)
    assert isinstance(alone, Tensor) and torch.equal(alone, out)
    assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_at_gate_zero_the_result_is_bitwise_that_without_a_prefix(
    backend: str | None, dtype: torch.dtype, causal: bool
) -> None:
    given = problem(2, 4, 2, 33, 41, 9, 32, dtype=dtype, causal=causal, padding="left")
    gated = {**given.tensors, "gate": torch.zeros(4)}
    without = {name: t[:, :0] if "prefix" in name else t for name, t in given.tensors.items()}
    for one, other in zip(
        fused(given, gated, backend), fused(given, without, backend), strict=True
    ):
        assert torch.equal(one, other)


def test_a_gate_of_zero_gets_a_gradient_and_its_prefix_none() -> None:
    given = problem(gated=True)
    inputs = given.inputs() | {"gate": torch.zeros(4, requires_grad=True)}
    found = results(fused(given, inputs), inputs, given.dout, given.dlse)
    assert (found["d gate"] != 0).all()
    assert not found["d prefix_key"].any() and not found["d prefix_value"].any()


def _saved(run: Callable[[], object]) -> dict[int, Tensor]:
    saved: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return saved


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("gated", [False, True])
def test_saved_for_backward_are_qkv_out_lse_and_one_prefix(dropout_p: float, gated: bool) -> None:
    given = problem(
        8, 4, 2, 24, 24, 64, 16, dtype=torch.bfloat16, dropout_p=dropout_p, gated=gated,
        padding="left",
    )  # fmt: skip
    inputs = given.inputs()
    found: list[tuple[Tensor, Tensor]] = []
    saved = _saved(lambda: found.append(fused(given, inputs)))
    out, lse = found[0]
    wanted = [*inputs.values(), out, lse, given.options["key_mask"]]
    allowed = sum(t.numel() * t.element_size() for t in wanted) + (lse.nbytes if gated else 0) + 8
    assert _bytes(saved) <= allowed
    # Nothing of the size of B · P beyond the prefix itself.
    assert sum(64 in t.shape for t in saved.values()) == 2
    # What eager keeps, so that the measure is seen to measure.
    assert _bytes(_saved(lambda: eager(given, inputs))) > 5 * allowed


def test_inputs_are_never_written_to() -> None:
    given = problem(gated=True, dropout_p=0.2, causal=True, padding="random")
    inputs = given.inputs()
    before = {name: t.detach().clone() for name, t in inputs.items()}
    dout, dlse, mask = given.dout.clone(), given.dlse.clone(), given.options["key_mask"].clone()
    results(fused(given, inputs), inputs, given.dout, given.dlse)
    assert all(torch.equal(t, before[name]) for name, t in inputs.items())
    assert torch.equal(dout, given.dout) and torch.equal(dlse, given.dlse)
    assert torch.equal(mask, given.options["key_mask"])


def test_torch_func_is_refused_in_the_packages_words() -> None:
    given = problem()
    others = {name: t for name, t in given.tensors.items() if name != "query"}
    with pytest.raises(RuntimeError, match="PrefixAttentionFunction does not support torch.func"):
        torch.func.grad(lambda q: prefix_attention(q, **others).sum())(given.query)


def test_double_backward_is_refused() -> None:
    inputs = problem().inputs()
    out = prefix_attention(**inputs)
    (first,) = torch.autograd.grad(out.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_backward_under_autocast_is_that_outside_of_it(dtype: torch.dtype) -> None:
    """The reference is made of operations that autocast would change."""
    given = problem()
    found = []
    for inside in (True, False):
        inputs = given.inputs()
        with torch.autocast("cpu", dtype):
            out = prefix_attention(**inputs, backend="reference")
        with torch.autocast("cpu", dtype, enabled=inside):
            loss = out.float().square().sum()
            found.append(torch.autograd.grad(loss, list(inputs.values())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_dropout_follows_manual_seed_and_differs_between_calls() -> None:
    arguments = call_arguments(dropout_p=0.5)
    torch.manual_seed(5)
    first, second = prefix_attention(**arguments), prefix_attention(**arguments)
    torch.manual_seed(5)
    assert torch.equal(first, prefix_attention(**arguments))
    assert not torch.equal(first, second)


def test_evaluation_ignores_dropout_and_leaves_the_generator_alone() -> None:
    expected = prefix_attention(**call_arguments())
    state = torch.get_rng_state()
    assert torch.equal(prefix_attention(**call_arguments(dropout_p=0.5, training=False)), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tensor_that_changed_in_place_before_backward_raises() -> None:
    inputs = problem().inputs()
    out = prefix_attention(**inputs)
    with torch.no_grad():
        inputs["prefix_key"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_meta_tensors_give_shapes() -> None:
    arguments = {name: t.to("meta") for name, t in problem().tensors.items()}
    out, lse = prefix_attention(**arguments, causal=True, return_lse=True)
    assert out.shape == (2, 4, 5, 16) and lse.shape == (2, 4, 5)


def _run(given: Problem, *tensors: Tensor) -> Tensor:
    names = list(given.tensors)
    return prefix_attention(
        **dict(zip(names, tensors, strict=True)), causal=True, dropout_p=0.4
    ).tanh()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout_gives_the_gradients_of_the_run_without(
    use_reentrant: bool,
) -> None:
    given = problem(gated=True)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(11)
        tensors = list(given.inputs().values())
        if checkpointed:
            out = checkpoint(_run, given, *tensors, use_reentrant=use_reentrant)
        else:
            out = _run(given, *tensors)
        out.backward(given.dout)
        found.append([out, *(t.grad for t in tensors)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
