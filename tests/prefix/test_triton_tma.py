"""Prefix attention by tensor descriptors: the same bits as by pointers, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels.core import prefix_tiles, triton_runtime
from peft_kernels.prefix import launch as launchers
from peft_kernels.prefix.arguments import descriptor
from tests.prefix.problems import Problem, fused, laid_out, results
from tests.prefix.test_triton import LAYOUTS as ALL_LAYOUTS
from tests.prefix.test_triton import RICH, problem

pytestmark = [
    pytest.mark.skipif(
        not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
        reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
    ),
    pytest.mark.timeout(120),
]


# The order of programs is no matter of descriptors. At heads of 128 dk and dv have an order of
# products of their own.
LAYOUTS = {n: each for n, each in ALL_LAYOUTS.items() if n != "more pairs than start together"}
WIDE = {
    "heads": 2, "kv_heads": 1, "queries": 20, "keys": 37, "prefix": 5, "size": 128, "causal": True,
}  # fmt: skip
LAYOUTS |= {"heads of 128": WIDE, "heads of 128 under a window": WIDE | {"window": 9}}


@pytest.fixture
def by_tma(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """Whether each kernel that was launched took descriptors."""
    seen: dict[str, bool] = {}
    whole = launchers.launch

    def noted(kernel: Any, grid: Any, *positional: Any, **named: Any) -> None:
        if "TMA" in named:
            seen[kernel.fn.__name__] = named["TMA"]
        if "LSE_TMA" in named:
            seen["lse of " + kernel.fn.__name__] = named["LSE_TMA"]
        whole(kernel, grid, *positional, **named)

    monkeypatch.setattr(launchers, "launch", noted)
    yield seen


def _run(given: Problem, variant: str) -> dict[str, Tensor]:
    with prefix_tiles.forced_variant(variant):
        inputs = given.inputs()
        return results(fused(given, inputs, "triton"), inputs, given.dout, given.dlse)


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_descriptors_change_no_bit(layout: str, by_tma: dict[str, bool]) -> None:
    given = problem(**LAYOUTS[layout], dtype=torch.float16)
    expected = _run(given, "pointers")
    assert by_tma and not any(by_tma.values())
    by_tma.clear()
    _same(_run(given, "tma"), expected)
    _, heads, queries, size = given.query.shape
    _, kv_heads, keys, _ = given.tensors["key"].shape
    folded = heads > kv_heads and 2 * queries <= 16
    even = size * given.query.element_size() % 16 == 0
    assert by_tma["_prefix_forward_kernel"] == (even and keys > 0)
    if "_prefix_key_gradient_kernel" in by_tma:
        streamed = even and not folded
        assert by_tma["_prefix_key_gradient_kernel"] == streamed
        assert by_tma["lse of _prefix_key_gradient_kernel"] == (streamed and queries % 4 == 0)


@pytest.mark.parametrize("name", ["key", "value", "prefix_key", "prefix_value"])
def test_each_gradient_alone_is_the_same_as_among_all(name: str, by_tma: dict[str, bool]) -> None:
    given = problem(**WIDE, dtype=torch.float16)
    expected = _run(given, "tma")[f"d {name}"]
    inputs = {each: t.detach() for each, t in given.inputs().items()}
    inputs[name].requires_grad_()
    by_tma.clear()
    with prefix_tiles.forced_variant("tma"):
        outputs = list(fused(given, inputs, "triton"))
        (found,) = torch.autograd.grad(outputs, [inputs[name]], [given.dout, given.dlse])
    assert by_tma[f"_prefix_{'gradient' if 'prefix' in name else 'key_gradient'}_kernel"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", ["heads last", "slices", "expanded", "one sample", "shifted"])
def test_strides_change_no_bit(layout: str, by_tma: dict[str, bool]) -> None:
    given = problem(**RICH | {"size": 16, "gated": True})
    strided, packed = laid_out(given, layout)
    expected = _run(packed, "pointers")
    by_tma.clear()
    _same(_run(strided, "tma"), expected)
    named = layout != "shifted" and not (layout == "expanded" and given.query.shape[0] > 1)
    assert by_tma["_prefix_forward_kernel"] == named


def test_a_descriptor_ends_with_its_head() -> None:
    """What lies behind a head in memory, the next head or a NaN, is never read."""
    given = problem(batch=2, heads=2, kv_heads=2, queries=19, keys=21, prefix=5, causal=True)
    poisoned = {
        name: torch.cat([t, torch.full_like(t[..., :3, :], float("nan"))], -2)[
            ..., : t.shape[-2], :
        ]
        if t.dim() > 2
        else t
        for name, t in given.tensors.items()
    }
    _same(_run(replace(given, tensors=poisoned), "tma"), _run(given, "pointers"))


def test_blocks_are_padded_in_features() -> None:
    named = descriptor(torch.zeros(1, 2, 33, 80), 16, 128)
    assert list(named.block_shape) == [1, 1, 16, 128]
    assert list(named.shape) == [1, 2, 33, 80]
