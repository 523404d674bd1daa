"""Checks that ranks run together: one layer under the tensor-parallel styles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from peft_kernels import (
    Adapter,
    LoRAColwiseParallel,
    LoRALinear,
    LoRARowwiseParallel,
    PromptEmbedding,
    lora_linear,
    prefix_attention,
)
from peft_kernels.core import rng
from tests.distributed.models import trained, whole
from tests.distributed.tensor_parallel import mesh


def layer(in_features: int = 16, out_features: int = 24, dropout: float = 0.0) -> LoRALinear:
    """Return a layer that trains all but its weight, the same on every rank."""
    torch.manual_seed(3)
    made = LoRALinear(in_features, out_features, r=3, lora_alpha=6, lora_dropout=dropout)
    nn.init.normal_(made.lora_B)
    made.bias.requires_grad_(True)
    return made


def styled(made: nn.Module, style: ParallelStyle) -> nn.Module:
    return parallelize_module(made, mesh(), style)


def gradients_of_each_tensor() -> None:
    """Of x and of every parameter, for both styles, against the layer on one rank."""
    for style, cut in ((LoRAColwiseParallel, None), (LoRARowwiseParallel, -1)):
        one, many = layer(), styled(layer(), style())
        torch.manual_seed(4)
        x, dy = torch.randn(2, 5, 16), torch.randn(2, 5, 24)
        given = [_leaf(x), _leaf(x if cut is None else _part(x, cut))]
        y = one(given[0])
        y.backward(dy)
        made = many(given[1])
        made.backward(_part(dy, -1) if cut is None else dy)
        dx = given[0].grad
        wanted = [_part(y, -1), dx] if cut is None else [y, _part(dx, -1)]
        torch.testing.assert_close([made, given[1].grad], wanted, rtol=1e-5, atol=1e-5)
        for name, parameter in trained(many).items():
            gradient = one.get_parameter(name).grad
            torch.testing.assert_close(whole(parameter.grad), gradient, rtol=1e-5, atol=1e-5)
        assert set(trained(many)) == {"lora_A", "lora_B", "bias"}


def layouts() -> None:
    """The sequence cut between layers: gathered in front of one, scattered behind the other."""
    one = nn.Sequential(layer(16, 24), layer(24, 16))
    plan = {
        "0": LoRAColwiseParallel(input_layouts=Shard(1)),
        "1": LoRARowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    many = parallelize_module(nn.Sequential(layer(16, 24), layer(24, 16)), mesh(), plan)
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(4))
    given = [_leaf(x), _leaf(_part(x, 1))]
    y, made = one(given[0]), many(given[1])
    assert isinstance(made, DTensor) and made.placements == (Shard(1),)
    torch.testing.assert_close(made.full_tensor(), y, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    made.full_tensor().square().sum().backward()
    torch.testing.assert_close(given[1].grad, _part(given[0].grad, 1), rtol=1e-4, atol=1e-4)


def between_layers_of_torch() -> None:
    """Torch's styles hand over results that are still on their way, in both directions."""
    torch.manual_seed(3)
    one = nn.Sequential(nn.Linear(16, 16), layer(16, 16), nn.Linear(16, 8))
    torch.manual_seed(3)
    many = nn.Sequential(nn.Linear(16, 16), layer(16, 16), nn.Linear(16, 8))
    many.load_state_dict(one.state_dict())
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate()),
        "1": LoRAColwiseParallel(output_layouts=Shard(0)),
        "2": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }
    parallelize_module(many, mesh(), plan)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(4))
    one(x).square().sum().backward()
    many(x).square().sum().backward()
    for (_, first), (name, second) in zip(
        one.named_parameters(), many.named_parameters(), strict=True
    ):
        if first.requires_grad:
            torch.testing.assert_close(
                whole(second.grad), first.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m
            )


def every_method_in_front_of_torch() -> None:
    """The gradient that comes back is still on its way when backward is called."""
    for method, arguments, make in _in_front():
        one, many = make(), make()
        style = ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate())
        parallelize_module(many.get_submodule("linear"), mesh(), style)
        for model, given in ((one, arguments), (many, [_part(each, 0) for each in arguments])):
            out = model["method"](*given)
            out = out if isinstance(out, Tensor) else out.embeddings
            model["linear"](out.flatten(1)).square().sum().backward()
        for name, parameter in trained(one["method"]).items():
            gradient = many["method"].get_parameter(name).grad
            dist.all_reduce(gradient)
            torch.testing.assert_close(
                gradient, parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=method: n + m
            )


def _in_front() -> list[tuple[str, list[Tensor], Callable[[], nn.ModuleDict]]]:
    """Return (name, arguments, a function that makes the method and a Linear behind it)."""
    torch.manual_seed(4)
    x, ids = torch.randn(4, 3, 8), torch.randint(9, (4, 2))

    def front(build: Callable[[], nn.Module]) -> Callable[[], nn.ModuleDict]:
        def make() -> nn.ModuleDict:
            torch.manual_seed(3)
            return nn.ModuleDict({"method": build(), "linear": nn.Linear(24, 8)})

        return make

    def attention() -> nn.Module:
        return Attention(torch.randn(2, 2, 4), torch.randn(2, 2, 4))

    def prompt() -> nn.Module:
        return PromptEmbedding(nn.Embedding(9, 8), num_virtual_tokens=1)

    return [
        ("LoRALinear", [x], front(lambda: layer(8, 8))),
        ("Adapter", [x], front(lambda: Adapter(8, bottleneck=3))),
        ("prefix_attention", [x], front(attention)),
        ("PromptEmbedding", [ids], front(prompt)),
    ]


class Attention(nn.Module):
    """``prefix_attention`` of two heads with nothing behind it that could wait for a gradient."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return prefix_attention(heads, heads, heads, self.key, self.value)


def dropout_by_column_is_that_of_one_process() -> None:
    many = styled(layer(dropout=0.5), LoRAColwiseParallel(output_layouts=Replicate()))
    one = layer(dropout=0.5)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(7)
    y = one(x)
    assert (y - one(x)).abs().max() > 1e-2
    torch.manual_seed(7 + dist.get_rank())  # the first rank's state decides
    torch.testing.assert_close(many(x), y)


def dropout_by_row_differs_between_ranks() -> None:
    """The mask of each rank's columns is drawn by its own seed, in forward and in backward."""
    many, one = styled(layer(dropout=0.5), LoRARowwiseParallel()), layer()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(7)
    seed, size = rng.draw_seed(x.device), dist.get_world_size()
    masks = [rng.dropout_mask(seed ^ rank, 5, 16 // size, 0.5) for rank in range(size)]
    assert not torch.equal(masks[0], masks[1])
    mask = torch.cat(masks, -1) * 2.0
    torch.manual_seed(7)
    y = many(_part(x, -1))
    low_rank = lora_linear(
        x * mask, torch.zeros_like(one.weight), one.lora_A, one.lora_B, scale=2.0
    )
    expected = nn.functional.linear(x, one.weight, one.bias) + low_rank
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name in ("lora_A", "lora_B"):
        gradient = one.get_parameter(name).grad
        torch.testing.assert_close(
            whole(many.get_parameter(name).grad), gradient, rtol=1e-4, atol=1e-4
        )


def optimizer_state_is_sharded_as_the_parameters() -> None:
    model = styled(layer(), LoRARowwiseParallel())
    optimizer = torch.optim.AdamW(trained(model).values())
    model(torch.randn(4, 16 // dist.get_world_size())).sum().backward()
    optimizer.step()
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert state["lora_A"]["exp_avg"].placements == (Shard(1),)
    assert state["lora_B"]["exp_avg"].placements == (Replicate(),)


def merging() -> None:
    for style, cut in ((LoRAColwiseParallel, False), (LoRARowwiseParallel, True)):
        many = styled(layer(), style()).eval()
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(4))
        x = _part(x, -1) if cut else x
        y, weight = many(x), many.weight.full_tensor().clone()
        many.merge()
        assert (many.weight.full_tensor() - weight).abs().max() > 1e-2
        torch.testing.assert_close(many(x), y, rtol=1e-4, atol=1e-4)
        many.unmerge()
        torch.testing.assert_close(many.weight.full_tensor(), weight, rtol=1e-5, atol=1e-5)


def compiled() -> None:
    for style, columns in ((LoRAColwiseParallel, 16), (LoRARowwiseParallel, 16 // mesh().size())):
        many = styled(layer(), style())
        x = torch.randn(5, columns, generator=torch.Generator().manual_seed(4))
        y = many(x)
        y.sum().backward()
        gradients = [whole(each.grad) for each in trained(many).values()]
        many.zero_grad()
        compiled_y = torch.compile(many, fullgraph=True, backend="aot_eager")(x)
        compiled_y.sum().backward()
        torch.testing.assert_close(compiled_y, y)
        again = [whole(each.grad) for each in trained(many).values()]
        torch.testing.assert_close(again, gradients)


def a_layer_that_raised_is_whole_again() -> None:
    many = styled(layer(), LoRAColwiseParallel())
    with pytest.raises(TypeError, match=r"weight is torch\.float32 and x is torch\.float64"):
        many(torch.randn(5, 16, dtype=torch.float64))
    assert isinstance(many.weight, DTensor) and rng.DRAWING.rule is None
    many(torch.randn(5, 16))


def bad_input() -> None:
    with pytest.raises(TypeError, match=r"take a LoRALinear or peft.*got torch\.nn.*Linear"):
        styled(nn.Linear(8, 8), LoRAColwiseParallel())
    with pytest.raises(ValueError, match="out_features must be divisible by the . ranks, got 7"):
        styled(layer(8, 7), LoRAColwiseParallel())
    with pytest.raises(ValueError, match="in_features must be divisible by the . ranks, got 7"):
        styled(layer(7, 8), LoRARowwiseParallel())
    with pytest.raises(ValueError, match="distributed already"):
        styled(styled(layer(), LoRAColwiseParallel()), LoRARowwiseParallel())
    many = styled(layer(), LoRAColwiseParallel())
    with pytest.raises(TypeError, match="first positional argument"):
        many(x=torch.randn(5, 16))
    with pytest.raises(TypeError, match="weight is a DTensor.*LoRAColwiseParallel"):
        lora_linear(torch.randn(5, 16), many.weight, many.lora_A, many.lora_B)
    torch.manual_seed(0)
    on_its_way = styled(nn.Linear(8, 8), RowwiseParallel(input_layouts=Replicate()))
    x = on_its_way(torch.randn(5, 8))
    with pytest.raises(TypeError, match=r"x is the result of a collective.*pass x\.clone\(\)"):
        layer(8, 8)(x)
    gradient = torch.autograd.grad(layer(8, 8)(x.clone()).sum(), on_its_way.weight)
    assert gradient[0].full_tensor().abs().max() > 1e-3


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(True)


def _part(x: Tensor, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]


CHECKS: dict[str, Callable[[], None]] = {
    f"tp_{check.__name__}": check
    for check in (
        gradients_of_each_tensor,
        layouts,
        between_layers_of_torch,
        every_method_in_front_of_torch,
        dropout_by_column_is_that_of_one_process,
        dropout_by_row_differs_between_ranks,
        optimizer_state_is_sharded_as_the_parameters,
        merging,
        compiled,
        a_layer_that_raised_is_whole_again,
        bad_input,
    )
}
