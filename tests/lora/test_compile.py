"""torch.compile: no graph break, no recompilation per scale, ops that pass opcheck."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

from peft_kernels import LoRALinear, lora_embedding, lora_linear, lora_projections
from tests.lora.problems import fused, problem, results

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_fullgraph_gives_what_eager_gives(backend: str, dropout_p: float) -> None:
    given = problem((3, 5), 12, 16, 4, dropout_p=dropout_p)

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return fused(given, list(inputs), None)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    inputs, others = given.inputs(), given.inputs()
    found = results(compiled(*inputs), inputs, given.dy)
    expected = results(fused(given, others, None), others, given.dy)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_fullgraph_under_autocast_with_float32_adapters() -> None:
    given = problem((3, 5), 12, 16, 4, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fused(given, list(inputs), None)

    inputs = given.inputs()
    found = results(run(*inputs), inputs, given.dy)
    assert found["y"].dtype == torch.bfloat16 and found["da"].dtype == torch.float32


IDS = torch.tensor([[0, 5, 5]])
REPEATED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": lambda square, seed: lora_linear(square, square, square, square),
    "embedding": lambda square, seed: lora_embedding(IDS, square.detach(), square, square),
    "projections": lambda square, seed: torch.stack(
        lora_projections(
            square, [square] * 2, [square] * 2, [square] * 2, dropout_p=0.3, seeds=[seed, seed]
        )
    ),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_tensor_in_two_places_compiles(name: str) -> None:
    square = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([5])
    found = []
    for call in (
        torch.compile(REPEATED[name], fullgraph=True, backend="aot_eager"),
        REPEATED[name],
    ):
        y = call(square, seed)
        found.append((y, *torch.autograd.grad(y.square().sum(), square)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_scale_beside_float64_keeps_its_digits_while_traced() -> None:
    square = torch.randn(8, 8, dtype=torch.float64)
    for call in (
        lambda: lora_linear(square, square, square, square, scale=0.3),
        lambda: lora_projections(square, [square], [square], [square], scales=0.3)[0],
    ):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), call(), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_traced_backward_follows_a_forward_that_was_not_traced() -> None:
    layer = LoRALinear(8, 8, r=2, lora_alpha=3)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [p.grad for p in (layer.lora_A, layer.lora_B)]
    layer.zero_grad()
    outside = torch._dynamo.disable(layer)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda x: outside(x).square().sum().backward(), backend="aot_eager")(x)
    torch.testing.assert_close([p.grad for p in (layer.lora_A, layer.lora_B)], expected)


def test_no_recompilation_from_the_third_distinct_scale_on() -> None:
    given = problem(4, 12, 16, 4)
    counter = CompileCounter()
    x, weight, lora_a, lora_b, bias = given.inputs()
    run = torch.compile(
        lambda scale: lora_linear(x, weight, lora_a, lora_b, bias, scale=scale),
        fullgraph=True,
        backend=counter,
    )
    frames = []
    for scale in (0.5, 1.5, 2.5, 3.5, 4.5):
        expected = lora_linear(x, weight, lora_a, lora_b, bias, scale=scale)
        torch.testing.assert_close(run(scale), expected)
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 4 and frames[1] <= 2


def test_a_layers_scaling_can_change_without_recompilation_and_batches_too() -> None:
    layer = LoRALinear(16, 12, r=4, lora_alpha=8)
    torch.nn.init.normal_(layer.lora_B)
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    compiled(torch.randn(3, 16))
    compiled(torch.randn(5, 16))
    layer.scaling = 0.5
    compiled(torch.randn(5, 16))
    frames = counter.frame_count
    for step in range(4):
        layer.scaling = 1.25 + step
        x = torch.randn(6 + step, 16)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == frames


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p: float) -> None:
    given = problem(5, 12, 16, 4, dropout_p=dropout_p)
    x, weight, lora_a, lora_b, bias = (t.detach() for t in given.inputs())
    seed = given.seed if dropout_p else None
    scale = torch.tensor(1.5)
    y, s = torch.empty(5, 12), torch.empty(5, 4)
    torch.library.opcheck(
        torch.ops.peft_kernels.lora_forward.default,
        (x, weight, lora_a, lora_b, bias, seed, scale, dropout_p, None, y, s),
    )
    gradients = [torch.empty_like(t) for t in (x, lora_a, lora_b, bias)]
    torch.library.opcheck(
        torch.ops.peft_kernels.lora_backward.default,
        (given.dy, x, s, weight, lora_a, lora_b, seed, scale, dropout_p, None, *gradients, None),
    )


def test_checkpointing_inside_compile_reproduces_eager_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    given = problem(6, 12, 16, 4, dropout_p=0.2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return checkpoint(
            lambda *t: fused(given, list(t), None).relu(), *inputs, use_reentrant=False
        )

    inputs, others = given.inputs(), given.inputs()
    found = results(run(*inputs), inputs, given.dy)
    expected = results(fused(given, others, None).relu(), others, given.dy)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
