"""torch.compile: no graph break, no recompilation per scale or length, ops that pass opcheck."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

from peft_kernels import prefix_attention
from tests.prefix.problems import fused, problem, results

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


OPTIONS = {
    "plain": {},
    "causal window padded": {"causal": True, "window": 3, "padding": "left", "scale": 0.3},
    "packed": {"lengths": (3, 4), "causal": True, "shared": False},
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("gated", "dropout_p"), [(False, 0.0), (True, 0.3)])
def test_fullgraph_gives_what_eager_gives(
    backend: str, options: str, gated: bool, dropout_p: float
) -> None:
    given = problem(**OPTIONS[options], gated=gated, dropout_p=dropout_p)  # type: ignore[arg-type]
    compiled = torch.compile(lambda **inputs: fused(given, inputs), fullgraph=True, backend=backend)
    inputs, others = given.inputs(), given.inputs()
    found = results(compiled(**inputs), inputs, given.dout, given.dlse)
    expected = results(fused(given, others), others, given.dout, given.dlse)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_fullgraph_under_autocast_with_a_float32_prefix() -> None:
    given = problem()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(**inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return prefix_attention(**inputs, causal=True)

    inputs = given.inputs()
    out = run(**inputs)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and inputs["prefix_key"].grad.dtype == torch.float32


def test_a_key_that_is_the_value_too_compiles() -> None:
    inputs = {name: t for name, t in problem().inputs().items() if "value" not in name}

    def call(query: torch.Tensor, key: torch.Tensor, prefix_key: torch.Tensor) -> torch.Tensor:
        return prefix_attention(query, key, key, prefix_key, prefix_key)

    found = []
    for each in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        out = each(**inputs)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_no_recompilation_from_the_third_distinct_scale_on() -> None:
    tensors = problem().inputs()
    counter = CompileCounter()
    run = torch.compile(
        lambda scale: prefix_attention(**tensors, scale=scale), fullgraph=True, backend=counter
    )
    frames = []
    for scale in (0.5, 1.5, 2.5, 3.5, 4.5):
        torch.testing.assert_close(run(scale), prefix_attention(**tensors, scale=scale))
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 4 and frames[1] <= 2


def test_sequences_of_any_length_share_a_graph() -> None:
    counter = CompileCounter()
    run = torch.compile(
        lambda **tensors: prefix_attention(**tensors, causal=True), fullgraph=True, backend=counter
    )
    run(**problem(queries=6, keys=6).tensors)
    run(**problem(queries=8, keys=8).tensors)
    frames = counter.frame_count
    for length in (9, 11, 14):
        tensors = problem(queries=length, keys=length).tensors
        torch.testing.assert_close(run(**tensors), prefix_attention(**tensors, causal=True))
    assert counter.frame_count == frames


def test_offsets_that_are_none_are_refused_inside_a_graph_too() -> None:
    given = problem(lengths=(3, 4))
    given.options["cu_seqlens"][-1] = 6
    run = torch.compile(lambda **inputs: fused(given, inputs), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="must start at 0 and end at 7"):
        run(**given.tensors)


@pytest.mark.parametrize(("gated", "dropout_p"), [(False, 0.0), (True, 0.3)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_opcheck(gated: bool, dropout_p: float, scale: float | None) -> None:
    given = problem(gated=gated, dropout_p=dropout_p, padding="left")
    *five, gate = [*given.tensors.values(), None][:6]
    seed = given.seed if dropout_p else None
    factor = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    out, lse = torch.empty(2, 4, 5, 16), torch.empty(2, 4, 5)
    prefix_lse = torch.empty(2, 4, 5) if gated else None
    beside = (given.options["key_mask"], None, gate, seed)
    options = (factor, True, 3, dropout_p, None)
    forward = torch.ops.peft_kernels.prefix_forward.default
    torch.library.opcheck(forward, (*five, *beside, *options, out, lse, prefix_lse))
    forward(*five, *beside, *options, out, lse, prefix_lse)
    gradients = [torch.empty_like(t) for t in five] + [torch.empty(4) if gated else None]
    torch.library.opcheck(
        torch.ops.peft_kernels.prefix_backward.default,
        (given.dout, given.dlse, *five, *beside, out, lse, prefix_lse, *options, *gradients),
    )


def test_checkpointing_inside_compile_reproduces_eager_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    given = problem(dropout_p=0.2, gated=True, causal=True)
    names = list(given.tensors)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return fused(given, dict(zip(names, tensors, strict=True)))[0].tanh()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return checkpoint(call, *tensors, use_reentrant=False)

    inputs, others = given.inputs(), given.inputs()
    run(*inputs.values()).backward(given.dout)
    call(*others.values()).backward(given.dout)
    for name in names:
        torch.testing.assert_close(inputs[name].grad, others[name].grad)
