"""Any layout and option, on every backend that runs here, against float64 and a dense mask.

A backend joins by being in ``PREFIX_ATTENTION``. The bound is the standard one for a rounded sum: a
few rounding units of the sum of magnitudes, which no luck of eager's at one tiny size can pass. A
wrong index, mask or edge is far outside it. The 1.5x rule judges fixed cases, in the other files.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels import BackendUnavailable, explain, prefix_attention
from peft_kernels.prefix.dispatch import PREFIX_ATTENTION
from tests.prefix.problems import (
    Problem,
    eager,
    finite,
    fused,
    keep_masks,
    problem,
    results,
    visible,
)

BACKENDS = [backend.name for backend in PREFIX_ATTENTION.backends]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Triton's interpreter is slow; sizes beyond a tile of its own are in the backends' own tests.
_MOST = {"triton": 20}
_EXAMPLES = {"triton": 12, "cuda": 12}


def _serves(backend: str, given: Problem) -> bool:
    arguments = given.tensors | given.options
    try:
        found = explain(prefix_attention, **arguments, dropout_p=given.dropout_p, backend=backend)
    except BackendUnavailable:
        return False
    return found.backend == backend


@st.composite
def _problems(draw: st.DrawFn, dtypes: list[torch.dtype], most: int) -> Problem:
    dtype = draw(st.sampled_from(dtypes))
    length = st.integers(1, most)
    kv_heads = draw(st.integers(1, 3))
    causal, packed = draw(st.booleans()), draw(st.sampled_from([False, False, False, True]))
    keys = draw(length)
    queries = draw(st.one_of(st.just(1), st.integers(1, keys if causal else most)))
    lengths = tuple(draw(st.lists(st.integers(0, most // 2), min_size=1, max_size=3)))
    assume(not packed or sum(lengths) > 0)
    given = problem(
        draw(st.sampled_from([2, 3, 1])),
        kv_heads * draw(st.sampled_from([1, 2, 3])),
        kv_heads,
        queries,
        keys,
        draw(st.sampled_from([*range(1, 10), 0, most - 3, most])),
        draw(st.sampled_from([16, 24, 32, 40])),
        dtype=dtype,
        prefix_dtype=draw(st.sampled_from([dtype, torch.float32])) if dtype.itemsize == 2 else None,
        shared=draw(st.sampled_from([True, True, False])),
        causal=causal,
        window=draw(st.one_of(st.none(), st.integers(1, most))),
        padding=draw(st.sampled_from([None, "left", "right", "random", "all"])),
        lengths=lengths if packed else None,
        gated=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.1, 0.6])),
        scale=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 2**16)),
    )
    return _with_layout(given, draw(st.sampled_from(["packed", "tokens first", "step"])))


def _with_layout(given: Problem, layout: str) -> Problem:
    def tokens_first(t: Tensor) -> Tensor:
        return t.transpose(-2, -3).contiguous().transpose(-2, -3) if t.dim() > 2 else t

    def step(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]

    change = {"packed": lambda t: t, "tokens first": tokens_first, "step": step}[layout]
    tensors = {name: change(t) for name, t in given.tensors.items()}
    return replace(given, tensors=tensors, dout=change(given.dout))


def _magnitudes(given: Problem) -> tuple[dict[str, Tensor], float]:
    """Return a bound of every result with its terms made positive, and of the scores."""
    t = {name: value.double() for name, value in given.tensors.items()}
    batch, heads, queries, keys, prefix = given.sizes
    kv_heads, size = t["key"].shape[1], t["query"].shape[3]
    scale = given.options["scale"] or size**-0.5

    def whole(name: str) -> Tensor:
        """Return a prefix and its sequence, [B, Hkv, 1, P + T, d]."""
        first = t[f"prefix_{name}"].expand(batch, kv_heads, prefix, size)
        return torch.cat([first, t[name]], 2)[:, :, None]

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(batch, kv_heads, -1, *x.shape[2:])  # [B, Hkv, G, S, ...]

    q, k, v = grouped(t["query"]), whole("key"), whole("value")
    mask = torch.cat([torch.ones(batch, queries, prefix, dtype=torch.bool), visible(given)], 2)
    scores = (q @ k.mT * scale).masked_fill(~mask[:, None, None], -torch.inf)

    def softmax(part: Tensor) -> Tensor:
        return part.softmax(-1).nan_to_num()  # NaN where nothing is seen

    if "gate" in t:
        parts = softmax(scores[..., :prefix]), softmax(scores[..., prefix:])
        c = grouped(t["gate"].tanh().abs().expand(batch, -1))[..., None, None]
        factor = torch.cat([c.expand_as(parts[0]), torch.ones_like(parts[1])], -1)
        weights = torch.cat(parts, -1)
    else:
        weights, factor = softmax(scores), torch.ones(())
    keep = keep_masks(given)
    kept = 1.0 if keep is None else grouped(torch.cat(keep, -1)) / (1.0 - given.dropout_p)
    dout, dlse = grouped(given.dout.double().abs()), grouped(given.dlse.double().abs())[..., None]
    dw = dout @ v.abs().mT * kept
    delta = (weights * factor * dw).sum(-1, keepdim=True)
    ds = weights * (factor * dw + factor * dw.mul(weights).sum(-1, keepdim=True) + delta + dlse)
    by_key = {
        "key": scale * (ds.mT @ q.abs()).sum(2),
        "value": ((weights * kept * factor).mT @ dout).sum(2),
    }
    found = {
        "out": ((weights * kept * factor) @ v.abs()).view(batch, heads, queries, size),
        "lse": torch.ones(batch, heads, queries, dtype=torch.float64),
        "d query": (scale * ds @ k.abs()).view(batch, heads, queries, size),
        "d gate": (weights * dw)[..., :prefix].sum((0, 3, 4)).flatten(),
    }
    for name, value in by_key.items():
        of_prefix, found[f"d {name}"] = value.split([prefix, keys], 2)
        shared = t[f"prefix_{name}"].dim() == 3
        found[f"d prefix_{name}"] = of_prefix.sum(0) if shared else of_prefix
    return found, float((q.abs() @ k.abs().mT).amax() * scale) if k.numel() else 0.0


def _check(given: Problem, backend: str) -> None:
    wide, own = given.inputs(torch.float64), given.inputs()
    exact = results(eager(given, wide), wide, given.dout, given.dlse)
    found = results(fused(given, own, backend), own, given.dout, given.dlse)
    magnitude, scores = _magnitudes(given)
    # An error of a score, made of float32 sums, is a relative error of its weight. The float64
    # measure is rounded too: where float64 is judged, both errors count.
    unit, wide_unit = (torch.finfo(each).eps for each in (given.query.dtype, given.dlse.dtype))
    relative = 3 * (unit + scores * wide_unit) * (2 if given.dlse.dtype == torch.float64 else 1)
    assert found.keys() == exact.keys()
    assert torch.equal(found["lse"].isneginf(), exact["lse"].isneginf())
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        error = (finite(value.double()) - finite(exact[name])).abs()
        bound = relative * magnitude[name] + 1e-30
        if given.query.dtype == torch.float16:
            bound = bound + 2**-24 * (1.0 + scores)  # below the normal numbers
        assert (error <= bound).all(), (
            f"{name}: error {error.max():.2e} is {(error / bound).max():.1f} bounds"
        )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_call_agrees_with_float64_and_a_dense_mask(backend: str) -> None:
    dtypes = [dtype for dtype in _DTYPES if _serves(backend, problem(dtype=dtype))]
    if not dtypes:
        pytest.skip(f"the {backend} backend does not run here: see python -m peft_kernels env")

    @settings(max_examples=_EXAMPLES.get(backend, 120), deadline=None, derandomize=True)
    @drawn(_problems(dtypes, _MOST.get(backend, 40)))
    def run(given: Problem) -> None:
        assume(_serves(backend, given))
        _check(given, backend)

    run()
