"""The variant ``split``: our kernel for the prefix, SDPA's flash kernel for the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import explain, prefix_attention
from peft_kernels.core import prefix_tiles, triton_runtime
from peft_kernels.prefix import split
from tests.prefix.problems import Problem, check, fused, problem, results, visible

CALLS: dict[str, dict[str, Any]] = {
    "causal": {"queries": 150, "keys": 150, "causal": True},
    "more keys": {"queries": 9, "keys": 200},
    "one query": {"queries": 1, "keys": 128, "prefix": 1},
    "grouped": {"heads": 6, "kv_heads": 2, "queries": 130, "keys": 130, "causal": True},
    "a prefix for each row": {"queries": 130, "keys": 130, "shared": False, "causal": True},
    "head size 40": {"queries": 130, "keys": 130, "size": 40, "scale": 0.3, "causal": True},
}
NOT_SERVED: dict[str, dict[str, Any]] = {
    "padding": {"padding": "left"},
    "window": {"window": 3},
    "packed": {"lengths": (60, 90), "causal": True},
    "gated": {"gated": True},
    "dropout": {"dropout_p": 0.2},
    "decoding": {"queries": 2, "causal": True},
    "no prefix": {"prefix": 0},
    "few keys": {"keys": 127},
    "head size 20": {"size": 20},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Force the variant, and return a list that names the flash kernels as they are called."""
    made: list[str] = []
    for name in ("_flash", "_flash_backward"):
        original = getattr(split, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            made.append(name)
            return original(*args)

        monkeypatch.setattr(split, name, counted)
    with prefix_tiles.forced_variant("split"):
        yield made


def sdpa(given: Problem, grouped: bool) -> dict[str, Tensor]:
    """Return out and every gradient of SDPA over concatenated keys, with a mask."""
    inputs = given.inputs()
    batch, heads, queries, _, prefix = given.sizes
    seen = visible(given)
    mask = torch.cat([seen.new_ones(batch, queries, prefix), seen], 2)[:, None]
    key, value = (
        torch.cat([each.expand(batch, -1, -1, -1), inputs[name]], 2)
        for name, each in (("key", inputs["prefix_key"]), ("value", inputs["prefix_value"]))
    )
    if not grouped:
        key, value = (each.repeat_interleave(heads // each.shape[1], 1) for each in (key, value))
    out = F.scaled_dot_product_attention(
        inputs["query"], key, value, mask, scale=given.options["scale"], enable_gqa=grouped
    )
    found = results((out, out), inputs, given.dout, None)
    del found["lse"]
    return found


@pytest.mark.parametrize("call", CALLS)
def test_as_accurate_as_eager(call: str, calls: list[str]) -> None:
    """The measure is eager PyTorch, SDPA included: half of what is judged is its kernel's."""
    half = torch.bfloat16
    given = replace(problem(**{"prefix": 5, **CALLS[call]}, dtype=half), dlse=None)
    check(given, "cpp", half, [sdpa(given, grouped) for grouped in (False, True)])
    assert calls == ["_flash", "_flash_backward"]


@pytest.mark.skipif(
    not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
    reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
)
def test_beside_the_triton_kernel(calls: list[str]) -> None:
    half = torch.float16
    given = problem(queries=130, keys=130, prefix=19, causal=True, dtype=half)
    check(replace(given, dlse=None), "triton", half)
    assert calls == ["_flash", "_flash_backward"]


def test_a_gradient_of_lse_takes_the_fused_backward(calls: list[str]) -> None:
    half = torch.bfloat16
    check(problem(queries=130, keys=130, causal=True, dtype=half), "cpp", half)
    assert calls == ["_flash"]


@pytest.mark.parametrize("call", NOT_SERVED)
def test_what_flash_cannot_is_fused(call: str, calls: list[str]) -> None:
    half = torch.bfloat16
    check(problem(**{"queries": 7, "keys": 150, **NOT_SERVED[call]}, dtype=half), "cpp", half)
    assert not calls


def test_float32_is_fused(calls: list[str]) -> None:
    check(problem(queries=130, keys=130), "cpp", torch.float32)
    assert not calls


@pytest.mark.parametrize("frozen", ["query", "key", "value", "prefix_key", "prefix_value"])
def test_frozen_tensors_get_no_gradient(frozen: str, calls: list[str]) -> None:
    given = problem(queries=130, keys=130, causal=True, dtype=torch.bfloat16)
    whole = given.inputs()
    fused(given, whole)[0].backward(given.dout)
    inputs = given.inputs()
    inputs[frozen].requires_grad_(False)
    fused(given, inputs)[0].backward(given.dout)
    assert inputs[frozen].grad is None
    for name, tensor in inputs.items():
        if name != frozen:
            assert torch.equal(tensor.grad, whole[name].grad)
    only_prefix = [each for each in given.inputs().items() if each[0].startswith("prefix")]
    calls.clear()
    rest = {name: tensor.detach() for name, tensor in given.tensors.items()} | dict(only_prefix)
    fused(given, rest)[0].backward(given.dout)
    assert calls == ["_flash"]


def test_explain_names_the_variant(calls: list[str]) -> None:
    given = problem(queries=130, keys=130, causal=True, dtype=torch.bfloat16)
    arguments = given.tensors | given.options
    assert "split: the sequence by SDPA's flash kernel" in str(
        explain(prefix_attention, **arguments)
    )
    with prefix_tiles.forced_variant("fused"):
        assert "split" not in str(explain(prefix_attention, **arguments))
    # The table as it is: our kernel has won in every case that was measured.
    with prefix_tiles.forced_variant(None):
        assert "split" not in str(explain(prefix_attention, **arguments))


def test_the_table_decides_by_the_number_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prefix_tiles.SPLIT_FROM, "cpu", 8)
    cpu = torch.device("cpu")
    assert [prefix_tiles.variant(cpu, queries) for queries in (7, 8)] == ["fused", "split"]
    with pytest.raises(ValueError, match="variant must be one of fused, .*split, got 'ticket'"):
        prefix_tiles.forced_variant("ticket").__enter__()
