"""torch.compile: no graph break, no recompilation per scale, ops that pass opcheck."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

from peft_kernels import Adapter, adapter
from tests.adapter.problems import SCALES, fused, problem, results

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("dropout_p", "scale", "residual"),
    [(0.0, "number", "input"), (0.3, "channel", "own"), (0.3, "learned", None)],
)
def test_fullgraph_gives_what_eager_gives(
    backend: str, dropout_p: float, scale: str, residual: str | None
) -> None:
    given = problem((3, 5), 16, 4, dropout_p=dropout_p, scale=scale, residual=residual)

    def call(**inputs: torch.Tensor) -> torch.Tensor:
        return fused(given, inputs, None)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    inputs, others = given.inputs(), given.inputs()
    found = results(compiled(**inputs), inputs, given.dy)
    expected = results(fused(given, others, None), others, given.dy)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_fullgraph_under_autocast_with_float32_parameters() -> None:
    given = problem((3, 5), 16, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(**inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fused(given, inputs, None)

    inputs = given.inputs()
    found = results(run(**inputs), inputs, given.dy)
    assert found["y"].dtype == torch.bfloat16 and found["d down_weight"].dtype == torch.float32


def test_an_input_given_as_residual_too_compiles() -> None:
    tensors = problem((3, 5), 16, 4).inputs()
    x = tensors["x"]
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    found = []
    for each in (compiled, adapter):
        y = each(**tensors, residual=x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(tensors.values()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_no_recompilation_from_the_third_distinct_scale_on() -> None:
    tensors = problem(4, 16, 4).inputs()
    counter = CompileCounter()
    run = torch.compile(
        lambda scale: adapter(**tensors, scale=scale, activation="gelu"),
        fullgraph=True,
        backend=counter,
    )
    frames = []
    for scale in (0.5, 1.5, 2.5, 3.5, 4.5):
        expected = adapter(**tensors, scale=scale, activation="gelu")
        torch.testing.assert_close(run(scale), expected)
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 4 and frames[1] <= 2


def test_batches_of_any_size_share_a_graph() -> None:
    layer = Adapter(16, bottleneck=4, scale="learned")
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    compiled(torch.randn(3, 16))
    compiled(torch.randn(5, 16))
    frames = counter.frame_count
    for step in range(3):
        x = torch.randn(6 + step, 16)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == frames


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p: float, scale: str) -> None:
    given = problem(5, 16, 4, dropout_p=dropout_p, scale=scale)
    x, down, up, down_bias, up_bias, *learned = given.tensors.values()
    factor = learned[0] if learned else torch.tensor(1.5)
    seed = given.seed if dropout_p else None
    y, pre = torch.empty(5, 16), torch.empty(5, 4)
    torch.library.opcheck(
        torch.ops.peft_kernels.adapter_forward.default,
        (x, down, up, down_bias, up_bias, None, True, factor, "gelu", seed, dropout_p, None, None,
         y, pre),
    )  # fmt: skip
    gradients = [torch.empty_like(t) for t in (x, down, up, down_bias, up_bias)]
    d_scale = torch.empty(factor.numel()) if learned else None
    torch.library.opcheck(
        torch.ops.peft_kernels.adapter_backward.default,
        (given.dy, x, pre, down, up, down_bias, up_bias, factor, "gelu", seed, dropout_p, None,
         None, True, *gradients, d_scale),
    )  # fmt: skip


def test_checkpointing_inside_compile_reproduces_eager_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    given = problem(6, 16, 4, dropout_p=0.2, scale="channel")
    names = list(given.tensors)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return fused(given, dict(zip(names, tensors, strict=True)), None).tanh()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return checkpoint(call, *tensors, use_reentrant=False)

    inputs, others = given.inputs(), given.inputs()
    found = results(run(*inputs.values()), inputs, given.dy)
    expected = results(call(*others.values()), others, given.dy)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_the_layer_compiles_with_dropout_and_norms() -> None:
    layer = Adapter(16, dropout=0.3, layer_norm_before=True, layer_norm_after=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    compiled(x).sum().backward()
    assert layer.up_weight.grad is not None
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))
