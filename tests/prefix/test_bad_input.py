"""``prefix_attention`` and its ``explain``: what is refused, by name, before anything ran."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels import BackendUnavailable, explain, prefix_attention
from tests.prefix.problems import call_arguments


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


_PACKED = {"query": torch.randn(1, 4, 7, 16)} | {
    name: torch.randn(1, 2, 7, 16) for name in ("key", "value")
}

BAD = [
    ({"query": [1.0]}, TypeError, "query must be a torch.Tensor"),
    ({"value": None}, TypeError, "value must be a torch.Tensor, got None"),
    ({"prefix_key": None}, TypeError, "prefix_key must be a torch.Tensor, got None"),
    ({"query": torch.randn(4, 5, 16)}, ValueError, r"query must have shape \[B, Hq, S, d\]"),
    ({"query": torch.randn(2, 5, 5, 16)}, ValueError, "heads must be a multiple of key's, got 5"),
    ({"query": torch.randn(2, 4, 5, 8)}, ValueError, r"key must have shape \[2, Hkv, T, 8\]"),
    ({"query": torch.randn(2, 4, 5, 0)}, ValueError, "query must have a head size of at least 1"),
    ({"query": torch.ones(2, 4, 5, 16).int()}, TypeError, "query must be float64.*torch.int32"),
    ({"key": torch.randn(3, 2, 7, 16)}, ValueError, r"key must have shape \[2, Hkv, T, 16\]"),
    (dict.fromkeys(("key", "value"), torch.randn(2, 0, 7, 16)), ValueError, "of key's.* and 0 "),
    ({"key": torch.randn(2, 2, 7, 16).half()}, TypeError, "key is torch.float16 and query is"),
    ({"value": torch.randn(2, 2, 7, 8)}, ValueError, r"value must have the shape of key.*7, 16\]"),
    ({"value": torch.randn(2, 2, 7, 16).to_sparse()}, TypeError, "value must be a dense tensor"),
    ({"prefix_key": torch.randn(4, 3, 16)}, ValueError, r"prefix_key must have shape \[2, P, 16\]"),
    ({"prefix_key": torch.randn(3, 2, 3, 16)}, ValueError, r"or \[2, 2, P, 16\] to fit key"),
    ({"prefix_key": torch.randn(2, 3, 8)}, ValueError, "prefix_key must have shape"),
    ({"prefix_value": torch.randn(2, 4, 16)}, ValueError, "prefix_value must have the shape of"),
    ({"prefix_key": torch.randn(2, 3, 16, device="meta")}, ValueError, "prefix_key is on meta"),
    ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    ({"query": torch.randn(2, 4, 8, 16), "causal": True}, ValueError, "S = 8 and T = 7"),
    ({"scale": "1"}, TypeError, "scale must be a number or None"),
    ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ({"key_mask": torch.ones(2, 7)}, TypeError, "key_mask must be a bool tensor, True = keep"),
    ({"key_mask": torch.ones(2, 7).long()}, TypeError, r"write\s+mask.bool\(\)"),
    ({"key_mask": torch.ones(2, 10).bool()}, ValueError, r"key_mask must have shape \[2, 7\]"),
    ({"key_mask": torch.ones(2, 1, 5, 7).bool()}, ValueError, r"key_mask.*got \[2, 1, 5, 7\]"),
    ({"key_mask": torch.ones(2, 7, device="meta").bool()}, ValueError, "key_mask is on meta"),
    ({"cu_seqlens": [0, 7]}, TypeError, "cu_seqlens must be an int32 tensor"),
    ({"cu_seqlens": torch.tensor([0, 7])}, TypeError, r"int32.*cast it with .to\(torch.int32\)"),
    ({"cu_seqlens": _ints(0, 7)}, ValueError, "cu_seqlens needs packed tensors, one batch row"),
    (_PACKED | {"cu_seqlens": _ints(0)}, ValueError, r"cu_seqlens must have shape \[n \+ 1\]"),
    (_PACKED | {"cu_seqlens": _ints(1, 7)}, ValueError, r"must start at 0 and end at 7.*\[1, 7\]"),
    (_PACKED | {"cu_seqlens": _ints(0, 6)}, ValueError, "must start at 0 and end at 7"),
    (_PACKED | {"cu_seqlens": _ints(0, 5, 3, 7)}, ValueError, "cu_seqlens must be increasing"),
    (
        _PACKED | {"query": torch.randn(1, 4, 6, 16), "cu_seqlens": _ints(0, 7)},
        ValueError,
        "as many queries as keys",
    ),
    ({"window": 0}, ValueError, "window must be at least 1.*got 0"),
    ({"window": -3}, ValueError, "window must be at least 1.*got -3"),
    ({"window": 2.0}, TypeError, "window must be an integer or None"),
    ({"window": True}, TypeError, "window must be an integer or None"),
    ({"gate": torch.zeros(2)}, ValueError, r"gate must have shape \[4\].*got \[2\]"),
    ({"gate": torch.zeros(1)}, ValueError, r"gate.expand\(4\)"),
    ({"gate": 0.0}, TypeError, "gate must be a torch.Tensor"),
    ({"gate": torch.zeros(4, device="meta")}, ValueError, "gate is on meta while query is on"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
    ({"dropout_p": 2.0, "training": False}, ValueError, r"dropout_p must lie in \[0, 1\)"),
    ({"dropout_p": 0.1, "seed": 7}, TypeError, r"seed must be an int64.*torch.tensor\(\[7\]"),
    ({"backend": "tritn"}, ValueError, "backend must be one of triton, cuda, cpp, reference"),
    ({"backend": "cuda"}, BackendUnavailable, "cuda: serves NVIDIA GPUs: move the tensors"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        prefix_attention(**call_arguments(**change))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_wider_than_64_bits_hides_nothing(causal: bool, backend: str | None) -> None:
    expected = prefix_attention(**call_arguments(causal=causal, backend=backend))
    for window in (2**63 - 1, 2**63, int(1e30)):
        found = prefix_attention(**call_arguments(causal=causal, window=window, backend=backend))
        assert torch.equal(found, expected), window


def test_explain_checks_as_the_call_does_and_names_the_backend() -> None:
    with pytest.raises(ValueError, match="window must be at least 1"):
        explain(prefix_attention, **call_arguments(window=0))
    found = explain(prefix_attention, **call_arguments(causal=True, dropout_p=0.1))
    assert found.backend in ("cpp", "reference")
    assert explain(prefix_attention, **call_arguments(), backend="reference").backend == "reference"
