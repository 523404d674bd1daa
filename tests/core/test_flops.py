"""What torch's FlopCounterMode counts of our ops: what it counts of the same in plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import peft_kernels
from peft_kernels import LoRALinear


def flops(call: Callable[[], Any]) -> dict[str, int]:
    """Return how many of each op in a call and, of what is trained, its backward."""
    with FlopCounterMode(display=False) as counter:
        result = call()
        if result.requires_grad:
            result.sum().backward()
    return {str(op): number for op, number in counter.get_flop_counts()["Global"].items()}


def total(call: Callable[[], Any]) -> int:
    return sum(flops(call).values())


def trained(names: tuple[bool, ...], *shapes: tuple[int, ...], **given: Any) -> list[Tensor]:
    return [
        torch.randn(*shape, **given).requires_grad_(name)
        for name, shape in zip(names, shapes, strict=True)
    ]


@pytest.mark.parametrize("names", list(itertools.product((False, True), repeat=4)), ids=str)
def test_lora_counts_what_its_products_do(names: tuple[bool, ...]) -> None:
    x, w, a, b = trained(names, (5, 7, 32), (48, 32), (4, 32), (48, 4))
    found = flops(lambda: peft_kernels.lora_linear(x, w, a, b, scale=2.0))
    assert set(found) <= {"peft_kernels.lora_forward", "peft_kernels.lora_backward"}
    assert sum(found.values()) == total(lambda: x @ w.t() + x @ a.t() @ b.t())


@pytest.mark.parametrize("names", list(itertools.product((False, True), repeat=3)), ids=str)
def test_projections_count_as_one_by_one(names: tuple[bool, ...]) -> None:
    x, a, b = trained(names, (9, 32), (4, 32), (48, 4))
    w, other = torch.randn(48, 32), torch.randn(16, 32)
    c, d = trained((True, names[0]), (6, 32), (16, 6))
    of_each = [w, other], [a, c], [b, d]

    def apart() -> Tensor:
        ys = (peft_kernels.lora_linear(x, *each) for each in zip(*of_each, strict=True))
        return torch.cat(list(ys), -1)

    def together() -> Tensor:
        return torch.cat(peft_kernels.lora_projections(x, *of_each), -1)

    assert total(together) == total(apart)
    assert "peft_kernels.lora_projections_forward" in flops(together)


@pytest.mark.parametrize("names", list(itertools.product((False, True), repeat=3)), ids=str)
def test_an_adapter_counts_what_its_products_do(names: tuple[bool, ...]) -> None:
    x, down, up = trained(names, (5, 7, 32), (4, 32), (32, 4))
    found = total(lambda: peft_kernels.adapter(x, down, up))
    assert found == total(lambda: x + torch.relu(x @ down.t()) @ up.t())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("trains", [True, False])
def test_prefix_attention_counts_as_sdpa(trains: bool, causal: bool) -> None:
    """As torch counts its flash kernels, which the CPU's is not among: no mask, scores twice."""
    shape = (2, 4, 11, 8)
    q, k, v, pk, pv = trained((trains,) * 5, (2, 4, 9, 8), shape, shape, (4, 3, 8), (4, 3, 8))
    found = total(lambda: peft_kernels.prefix_attention(q, k, v, pk, pv, causal=causal))
    whole = torch.Size((2, 4, 11 + 3, 8))
    expected = sdpa_flop_count(q.shape, whole, whole)
    if trains:
        expected += sdpa_backward_flop_count(q.shape, q.shape, whole, whole)
    assert found == expected


@pytest.mark.parametrize(
    ("name", "of_sequence", "of_prefix"),
    [("query", 3, 3), ("key", 3, 0), ("value", 2, 0), ("prefix_key", 0, 3), ("prefix_value", 0, 2)],
)
def test_a_gradient_alone_counts_what_it_needs(name: str, of_sequence: int, of_prefix: int) -> None:
    """Scores; of what is not a value's dP too; and the gradient itself."""
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    own = (1, 1, 4, 8)
    given = trained(tuple(each == name for each in names), own, own, own, (1, 3, 8), (1, 3, 8))
    found = flops(lambda: peft_kernels.prefix_attention(*given))
    pairs = 2 * 4 * 8  # of one product with one key
    assert found["peft_kernels.prefix_backward"] == pairs * (4 * of_sequence + 3 * of_prefix)


def test_modules_have_their_share_and_the_numbers_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), LoRALinear.from_linear(nn.Linear(16, 32), r=4, lora_alpha=8)
    )
    x = torch.randn(5, 8)
    expected = model(x)
    with FlopCounterMode(display=False) as counter:
        found = model(x)
        found.sum().backward()
    assert torch.equal(found, expected)
    counts = counter.get_flop_counts()
    assert sum(counts["Sequential.1"].values()) > sum(counts["Sequential.0"].values()) > 0


def test_without_data_too() -> None:
    """The cost of a model nobody has the memory for."""
    x, w, a, b = trained((True, False, True, True), (4, 8), (16, 8), (2, 8), (16, 2))
    expected = total(lambda: peft_kernels.lora_linear(x, w, a, b))
    with FakeTensorMode():
        x, w, a, b = trained((True, False, True, True), (4, 8), (16, 8), (2, 8), (16, 2))
        assert total(lambda: peft_kernels.lora_linear(x, w, a, b)) == expected > 0
    x, w, a, b = trained((True, False, True, True), (4, 8), (16, 8), (2, 8), (16, 2), device="meta")
    assert total(lambda: peft_kernels.lora_linear(x, w, a, b)) == expected


def test_another_counter_of_the_users_own_formula_keeps_it() -> None:
    x, w, a, b = trained((False,) * 4, (4, 8), (16, 8), (2, 8), (16, 2))
    mapping = {torch.ops.peft_kernels.lora_forward: lambda *shapes, **named: 7}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        peft_kernels.lora_linear(x, w, a, b)
    assert counter.get_total_flops() == 7
