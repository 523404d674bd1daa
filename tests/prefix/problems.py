"""Random prefix attention problems, and what float64 and eager PyTorch make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peft_kernels import prefix_attention
from peft_kernels.core import rng
from tests.numerics import assert_as_accurate_as_eager, eager_forms

OTHER_ORDERS = 4  # in which eager PyTorch adds, when it is the measure
# Which axis each dimension of a tensor is: batch, head, query, key, prefix key, and the features of
# query and key (d) and of value (e). An axis is permuted alike in all.
AXES = {
    "query": "bhqd",
    "key": "bhkd",
    "value": "bhke",
    "prefix_key": "bhpd",
    "prefix_value": "bhpe",
    "gate": "h",
    "out": "bhqe",
    "lse": "bhq",
}


@dataclass(frozen=True)
class Problem:
    """Tensors of one call, in the dtype they are given in, by the names of the arguments."""

    tensors: dict[str, Tensor]
    dout: Tensor
    dlse: Tensor | None  # None: nothing depends on lse
    options: dict[str, Any] = field(default_factory=dict)
    dropout_p: float = 0.0
    seed: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @property
    def query(self) -> Tensor:
        return self.tensors["query"]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Batch, query heads, queries, keys and prefix keys."""
        batch, heads, queries, _ = self.query.shape
        keys, prefix = self.tensors["key"].shape[2], self.tensors["prefix_key"].shape[-2]
        return batch, heads, queries, keys, prefix

    def inputs(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return fresh leaves of the differentiable inputs, in ``dtype`` where it is given."""
        # detach() keeps strides, which clone() would not for every layout.
        return {
            name: (t if dtype is None else t.to(dtype)).detach().requires_grad_()
            for name, t in self.tensors.items()
        }


def laid_out(given: Problem, layout: str) -> tuple[Problem, Problem]:
    """Return a problem with other strides, and the same one without them.

    Args:
        given: whose operands of at least three dimensions are laid out.
        layout: "heads last", "slices" of wider rows, "expanded" over the batch, "one row" over all
            rows, "one sample" (a single index has an odd stride), or "shifted" by one element.
    """

    def arranged(t: Tensor) -> Tensor:
        if t.dim() < 3:
            return t
        if layout == "heads last":
            return t.transpose(-3, -2).contiguous().transpose(-3, -2)
        if layout == "slices":
            return torch.cat([torch.full_like(t, float("nan")), t], -1)[..., t.shape[-1] :]
        if layout == "one sample":
            pairs = zip(t.shape, t.stride(), strict=True)
            return t.as_strided(t.shape, [7 if n == 1 else stride for n, stride in pairs])
        if layout == "shifted":
            return torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape)
        if layout == "one row":
            return t[..., :1, :].expand_as(t)
        assert layout == "expanded"
        return t[:1].expand_as(t)

    strided = replace(
        given,
        tensors={name: arranged(t) for name, t in given.tensors.items()},
        dout=arranged(given.dout),
    )
    packed = replace(
        given,
        tensors={name: t.contiguous().clone() for name, t in strided.tensors.items()},
        dout=strided.dout.contiguous().clone(),
    )
    return strided, packed


def problem(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 5,
    keys: int = 7,
    prefix: int = 3,
    size: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    prefix_dtype: torch.dtype | None = None,
    shared: bool = True,
    causal: bool = False,
    window: int | None = None,
    padding: str | None = None,
    lengths: tuple[int, ...] | None = None,
    gated: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: int = 0,
) -> Problem:
    """Return a random problem whose results are of order one.

    ``padding`` is "left", "right", "random" or "all" (row 0 keeps no key); ``lengths`` are those of
    packed sequences, of ``batch`` 1, and replace ``queries`` and ``keys`` by their sum.
    """
    generator = torch.Generator().manual_seed(seed)
    if lengths is not None:
        batch, queries, keys = 1, sum(lengths), sum(lengths)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(kind)

    one = (kv_heads, prefix, size) if shared else (batch, kv_heads, prefix, size)
    small = prefix_dtype or dtype
    tensors = {
        "query": normal(batch, heads, queries, size),
        "key": normal(batch, kv_heads, keys, size),
        "value": normal(batch, kv_heads, keys, size),
        "prefix_key": normal(*one, kind=small),
        "prefix_value": normal(*one, kind=small),
    }
    if gated:
        tensors["gate"] = normal(heads, kind=small)
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale}
    if padding is not None:
        options["key_mask"] = _mask(padding, batch, keys, generator)
    if lengths is not None:
        ends = torch.tensor((0, *lengths)).cumsum(0)
        options["cu_seqlens"] = ends.to(torch.int32)
    return Problem(
        tensors=tensors,
        dout=normal(batch, heads, queries, size),
        dlse=normal(batch, heads, queries, kind=torch.promote_types(dtype, torch.float32)),
        options=options,
        dropout_p=dropout_p,
        seed=torch.randint(-(2**62), 2**62, (1,), generator=generator),
    )


def _mask(padding: str, batch: int, keys: int, generator: torch.Generator) -> Tensor:
    if padding == "random":
        return torch.rand(batch, keys, generator=generator) < 0.7
    kept = torch.randint(1, max(2, keys), (batch, 1), generator=generator)
    if padding == "all":
        kept[0] = 0
    column = torch.arange(keys)
    return column >= keys - kept if padding == "left" else column < kept


def visible(given: Problem) -> Tensor:
    """Return which key each query sees, bool [B, S, T], asked one by one."""
    batch, _, queries, keys, _ = given.sizes
    causal, window = given.options["causal"], given.options["window"]
    mask, offsets = given.options.get("key_mask"), given.options.get("cu_seqlens")
    starts = [] if offsets is None else offsets.tolist()
    segments = [sum(start <= j for start in starts) for j in range(keys)]

    def sees(i: int, j: int) -> bool:
        at = i + keys - queries
        seen = j <= at if causal else True
        if window is not None:
            seen &= at - j < window if causal else abs(at - j) < window
        return seen and (offsets is None or segments[at] == segments[j])

    pairs = [[sees(i, j) for j in range(keys)] for i in range(queries)]
    found = torch.tensor(pairs, dtype=torch.bool, device=given.query.device)
    found = found.view(queries, keys).expand(batch, -1, -1)
    return found if mask is None else found & mask[:, None, :]


def keep_masks(given: Problem) -> tuple[Tensor, Tensor] | None:
    """Return which probabilities dropout keeps, bool [B, Hq, S, P] and [B, Hq, S, T]."""
    if not given.dropout_p:
        return None
    batch, heads, queries, keys, prefix = given.sizes
    first = (prefix + 3) // 4 * 4
    rows = batch * heads * queries
    keep = rng.dropout_mask(given.seed, rows, first + keys, given.dropout_p)
    keep = keep.view(batch, heads, queries, first + keys)
    return keep[..., :prefix], keep[..., first:]


def dense(
    given: Problem,
    inputs: dict[str, Tensor],
    seen: Tensor,
    keep: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as one writes them in PyTorch: heads repeated, prefix copied, a mask."""
    query = inputs["query"]
    batch, heads, queries, keys, prefix = given.sizes
    groups = heads // inputs["key"].shape[1]

    def repeated(x: Tensor) -> Tensor:
        x = x if x.dim() == 4 else x.expand(batch, -1, -1, -1)
        return x.repeat_interleave(groups, 1)

    whole_key = torch.cat([repeated(inputs["prefix_key"]), repeated(inputs["key"])], 2)
    whole_value = torch.cat([repeated(inputs["prefix_value"]), repeated(inputs["value"])], 2)
    scale = given.options["scale"]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ whole_key.mT) * scale
    mask = torch.cat([seen.new_ones(batch, queries, prefix), seen], 2)[:, None]
    mask = mask.expand(scores.shape)

    def softmax(part: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        empty = ~allowed.any(-1, keepdim=True)
        part = part.masked_fill(~allowed, -torch.inf).masked_fill(empty, 0.0)
        lse = part.logsumexp(-1) if part.shape[-1] else part.sum(-1)
        return part.softmax(-1) * allowed, lse.masked_fill(empty[..., 0], -torch.inf)

    def dropped(weights: Tensor, kept: Tensor | None) -> Tensor:
        return weights if kept is None else weights * kept / (1.0 - given.dropout_p)

    if "gate" not in inputs:
        weights, lse = softmax(scores, mask)
        kept = None if keep is None else torch.cat(keep, -1)
        return dropped(weights, kept) @ whole_value, lse
    of_prefix, _ = softmax(scores[..., :prefix], mask[..., :prefix])
    own, lse = softmax(scores[..., prefix:], mask[..., prefix:])
    kept_p, kept_t = (None, None) if keep is None else keep
    out = dropped(own, kept_t) @ whole_value[:, :, prefix:]
    factor = inputs["gate"].tanh()[:, None, None]
    return out + factor * (dropped(of_prefix, kept_p) @ whole_value[:, :, :prefix]), lse


def call_arguments(**changes: Any) -> dict[str, Any]:
    """Return the arguments of a small call, some of them changed."""
    return {**problem().tensors, **changes}


def eager(given: Problem, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of ``dense`` under the masks of the problem."""
    return dense(given, inputs, visible(given), keep_masks(given))


def fused(
    given: Problem, inputs: dict[str, Tensor], backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the package."""
    return prefix_attention(
        **(inputs | given.options),
        dropout_p=given.dropout_p,
        seed=given.seed if given.dropout_p else None,
        return_lse=True,
        backend=backend,
    )


def results(
    found: tuple[Tensor, Tensor], inputs: dict[str, Tensor], dout: Tensor, dlse: Tensor | None
) -> dict[str, Tensor]:
    """Return out, lse and every gradient by name."""
    out, lse = found
    outputs, weights = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs, weights = [out, lse], [*weights, dlse.to(lse.dtype)]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), weights)
    named = dict(zip((f"d {name}" for name in inputs), gradients, strict=True))
    return {"out": out.detach(), "lse": lse.detach()} | named


def eager_in_another_order(given: Problem, dtype: torch.dtype, order: int) -> dict[str, Tensor]:
    """Return out, lse and every gradient of eager PyTorch, all sums in an order drawn from a seed.

    Every axis but that of the heads is permuted before, and the results permuted back.
    """
    generator = torch.Generator().manual_seed(order)
    batch, _, queries, keys, prefix = given.sizes
    size = given.query.shape[-1]
    lengths = {"b": batch, "q": queries, "k": keys, "p": prefix, "d": size, "e": size}
    orders = {axis: torch.randperm(n, generator=generator) for axis, n in lengths.items()}

    def permuted(value: Tensor, axes: str, back: bool = False) -> Tensor:
        for dim, axis in enumerate(axes[-value.dim() :], -value.dim()):
            if axis in orders:
                index = orders[axis].to(value.device)
                value = value.index_select(dim, index.argsort() if back else index)
        return value

    other = replace(
        given, tensors={name: permuted(t, AXES[name]) for name, t in given.tensors.items()}
    )
    seen, keep = permuted(visible(given), "bqk"), keep_masks(given)
    if keep is not None:
        keep = permuted(keep[0], "bhqp"), permuted(keep[1], "bhqk")
    inputs = other.inputs(dtype)
    dout = permuted(given.dout, AXES["out"])
    dlse = None if given.dlse is None else permuted(given.dlse, AXES["lse"])
    found = results(dense(other, inputs, seen, keep), inputs, dout, dlse)
    return {
        name: permuted(value, AXES[name.removeprefix("d ")], back=True)
        for name, value in found.items()
    }


def finite(value: Tensor) -> Tensor:
    """Return an lse with 0 in place of -inf, which no other result may hold."""
    return value.masked_fill(value.isneginf(), 0.0)


def check(
    given: Problem,
    backend: str | None,
    dtype: torch.dtype,
    others: Sequence[dict[str, Tensor]] = (),
) -> dict[str, Tensor]:
    """Judge out, lse and every gradient of a backend by the 1.5x rule; return them.

    ``others`` are results of PyTorch's in ``dtype`` beside the formula's, for the same measure.
    """
    exact, same_dtype, actual = _measured(given, backend, dtype)
    _judge(actual, exact, [*same_dtype, *others], dtype)
    return actual


def check_together(
    given: Sequence[Problem], backend: str | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Judge problems of one layout as one larger, and return its results, one behind the other.

    Of few numbers eager's worst error is luck, and may be far below what it is of many.
    """
    measured = [_measured(each, backend, dtype) for each in given]

    def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

    exact, same_dtype, actual = zip(*measured, strict=True)
    eager_results = [joined(parts) for parts in zip(*same_dtype, strict=True)]
    found = joined(actual)
    _judge(found, joined(exact), eager_results, dtype)
    return found


def _measured(
    given: Problem, backend: str | None, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the results in float64, those of eager PyTorch in ``dtype``, and a backend's."""
    wide = given.inputs(torch.float64)
    exact = results(eager(given, wide), wide, given.dout, given.dlse)
    narrow = given.inputs(dtype)
    same_dtype = eager_forms(
        lambda: results(eager(given, narrow), narrow, given.dout, given.dlse), given.dout.device
    )
    same_dtype += [eager_in_another_order(given, dtype, order) for order in range(OTHER_ORDERS)]
    own = given.inputs()
    actual = results(fused(given, own, backend), own, given.dout, given.dlse)
    assert torch.equal(actual["lse"].isneginf(), exact["lse"].isneginf())
    for results_ in (exact, actual, *same_dtype):
        results_["lse"] = finite(results_["lse"])
    return exact, same_dtype, actual


def _judge(
    actual: dict[str, Tensor],
    exact: dict[str, Tensor],
    same_dtype: Sequence[dict[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    for name, value in actual.items():
        if not exact[name].any():
            # Nothing is seen, or nothing depends on it: exactly zero, not nearly.
            assert not value.any(), f"{name} must be zero"
            continue
        if dtype == torch.float64:
            # The measure itself: it has no error to be judged by.
            torch.testing.assert_close(value, exact[name], rtol=1e-11, atol=1e-12)
            continue
        judged = [each[name] for each in same_dtype if name in each]
        assert_as_accurate_as_eager(name, value, judged, exact[name], dtype)
