"""The reference is the specification: float64 autograd, SDPA and the papers' formulas judge it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import prefix_attention
from tests.prefix.problems import Problem, check, fused, problem, results, visible

LAYOUTS = {
    "plain": {},
    "gqa": {"heads": 4, "kv_heads": 2},
    "mqa": {"heads": 3, "kv_heads": 1},
    "per sample": {"shared": False},
    "causal": {"causal": True},
    "decoding": {"causal": True, "queries": 1},
    "window": {"window": 2},
    "causal window": {"causal": True, "window": 2},
    "cross": {"queries": 6, "keys": 3},
    "left padding": {"causal": True, "padding": "left"},
    "right padding": {"padding": "right"},
    "nothing kept": {"padding": "all"},
    "nothing seen": {"padding": "all", "prefix": 0},
    "packed": {"lengths": (2, 0, 3)},
    "packed causal window": {"lengths": (4, 1), "causal": True, "window": 2},
    "no prefix": {"prefix": 0},
    "prefix alone": {"queries": 2, "keys": 0},
    "odd head size": {"size": 5},
    "scale": {"scale": 0.7},
    "negative scale": {"scale": -0.4},
}


def _small(layout: str, **more: object) -> Problem:
    sizes = {"batch": 2, "heads": 2, "kv_heads": 2, "queries": 3, "keys": 4, "prefix": 2, "size": 3}
    return problem(**(sizes | LAYOUTS[layout] | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", [2, 40], ids=["few rows", "many rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_long_sums_of_few_rows_in_parts_leave_nothing_out(dtype: torch.dtype, heads: int) -> None:
    """Keys, prefix and features are more than one part, and no multiple of it."""
    given = problem(2, heads, 2, 1, 70, 45, 40, causal=True, dtype=dtype)
    check(given, "reference", dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_gradient_passes_gradcheck_in_float64(
    layout: str, gated: bool, dropout_p: float
) -> None:
    given = _small(layout, dtype=torch.float64, gated=gated, dropout_p=dropout_p)
    names = list(given.tensors)

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = fused(given, dict(zip(names, inputs, strict=True)), "reference")
        # Where nothing is seen lse is -inf, and its differences are NaN.
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    tensors = tuple(given.inputs().values())
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_values_and_gradients_are_those_of_a_dense_mask(
    layout: str, gated: bool, dropout_p: float, poisoned_allocations: None
) -> None:
    options = LAYOUTS[layout] | {"gated": gated, "dropout_p": dropout_p}
    check(problem(**options), "reference", torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_16_bit_results_are_as_accurate_as_eager_ones(
    dtype: torch.dtype, gated: bool, dropout_p: float
) -> None:
    given = problem(
        2, 4, 2, 33, 37, 9, 24, dtype=dtype, gated=gated, dropout_p=dropout_p, causal=True,
        padding="left",
    )  # fmt: skip
    check(given, "reference", dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_sdpa_over_the_concatenation(layout: str) -> None:
    given = _small(layout, dtype=torch.float64)
    batch, heads, _, _, prefix = given.sizes
    t = given.tensors
    seen = visible(given)
    mask = torch.cat([torch.ones(*seen.shape[:2], prefix, dtype=torch.bool), seen], 2)[:, None]

    def whole(prefix_part: Tensor, own: Tensor) -> Tensor:
        return torch.cat([prefix_part.expand(batch, *prefix_part.shape[-3:]), own], 2)

    expected = F.scaled_dot_product_attention(
        t["query"], whole(t["prefix_key"], t["key"]), whole(t["prefix_value"], t["value"]),
        mask, scale=given.options["scale"], enable_gqa=True,
    )  # fmt: skip
    # What SDPA makes of a row that sees nothing is not specified.
    expected = expected.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    out, _ = fused(given, given.inputs(), "reference")
    torch.testing.assert_close(out.detach(), expected)


def test_the_gated_form_is_llama_adapters() -> None:
    """Zhang et al.: softmax over the tokens, softmax over the prompt times tanh of a gate."""
    given = problem(gated=True, causal=True, queries=7, dtype=torch.float64, kv_heads=4)
    t = given.tensors
    own = F.scaled_dot_product_attention(t["query"], t["key"], t["value"], is_causal=True)
    prompt = F.scaled_dot_product_attention(
        t["query"], t["prefix_key"].expand(2, -1, -1, -1), t["prefix_value"].expand(2, -1, -1, -1)
    )
    expected = own + t["gate"].tanh()[:, None, None] * prompt
    torch.testing.assert_close(fused(given, t, "reference")[0], expected)


def test_lse_is_that_of_everything_seen_and_with_a_gate_of_the_sequence_alone() -> None:
    given = problem(causal=True, dtype=torch.float64)
    tensors = given.tensors
    gated = tensors | {"gate": torch.randn(4, dtype=torch.float64)}
    empty = {name: t[:, :0] if "prefix" in name else t for name, t in tensors.items()}
    alone = fused(given, empty, "reference")[1]
    assert torch.equal(fused(given, gated, "reference")[1], alone)
    assert (fused(given, tensors, "reference")[1] > alone).all()


def test_dropout_leaves_lse_alone() -> None:
    plain, dropped = (problem(dropout_p=p) for p in (0.0, 0.5))
    one, other = (fused(each, each.tensors, "reference")[1] for each in (plain, dropped))
    assert torch.equal(one, other)


def test_what_a_mask_hides_changes_nothing() -> None:
    given = problem(padding="left", causal=True)
    hidden = ~given.options["key_mask"][:, None, :, None]
    loud = {
        name: t.masked_fill(hidden, 1e4) if name in ("key", "value") else t
        for name, t in given.tensors.items()
    }
    for one, other in zip(fused(given, given.tensors), fused(given, loud), strict=True):
        torch.testing.assert_close(one, other)


def test_results_repeat_bit_for_bit() -> None:
    given = problem(2, 4, 2, 19, 23, 9, 16, causal=True, gated=True, dropout_p=0.2)
    runs = []
    for _ in range(2):
        inputs = given.inputs()
        runs.append(results(fused(given, inputs, "reference"), inputs, given.dout, given.dlse))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_packed_sequences_are_as_if_each_were_alone() -> None:
    given = problem(lengths=(3, 5, 1), causal=True, window=3, gated=True)
    packed, _ = fused(given, given.tensors, "reference")
    start = 0
    for length in (3, 5, 1):
        own = {
            name: t[:, :, start : start + length] if name in ("query", "key", "value") else t
            for name, t in given.tensors.items()
        }
        alone = prefix_attention(**own, causal=True, window=3, backend="reference")
        torch.testing.assert_close(packed[:, :, start : start + length], alone)
        start += length
