"""Single launches of every method, as a tuner runs them: by our kernels, or by the reference.

Each has one tile of its own. A launch of prefix attention's gradients of keys brings that of delta
with it, which is the same for all of its candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.adapter import cases as adapter_cases
from bench.lora.cases import LoRACase
from bench.lora.problem import make_problem as lora_problem
from bench.prefix import PrefixCase
from bench.prefix import make_problem as prefix_problem
from peft_kernels.adapter import reference as adapter_reference
from peft_kernels.core import adapter_tiles, rng, tiles
from peft_kernels.core.operands import wide_dtype
from peft_kernels.lora import reference as lora_reference
from peft_kernels.prefix import reference as prefix_reference


@dataclass(frozen=True)
class Launch:
    """A launch on tensors of its own, and what it writes."""

    run: Callable[[], None]
    outputs: tuple[Tensor, ...]


# Makes the launch of a case in a dtype; with ``ours`` by the Triton kernels, else by the reference.
Make = Callable[[Any, str, torch.device, torch.dtype, bool], Launch]


def lora(
    case: LoRACase, direction: str, device: torch.device, dtype: torch.dtype, ours: bool
) -> Launch:
    """Make the base product and the low-rank one: "forward" or "backward", which is dx."""
    problem = lora_problem(case, device)
    x, w, a, b, dy = (
        t.detach().to(dtype)
        for t in (problem.x, problem.weight, problem.lora_a, problem.lora_b, problem.dy)
    )
    seed = problem.seed if case.dropout_p else None
    forward, backward = lora_reference.forward, lora_reference.backward
    if ours:
        from peft_kernels.lora import launch

        forward, backward = launch.lora_forward, launch.lora_backward
    y, s, dx = torch.empty_like(dy), x.new_empty(x.shape[0], a.shape[0]), torch.empty_like(x)
    if direction == "forward":
        given = (x, w, a, b, None, seed, problem.scale, case.dropout_p, y, s)
        return Launch(lambda: forward(*given), (y, s))
    s.zero_()  # of the factors' gradients alone
    backward_given = (
        dy, x, s, w, a, b, seed, problem.scale, case.dropout_p, dx, None, None, None, None
    )  # fmt: skip
    return Launch(lambda: backward(*backward_given), (dx,))


def prefix(
    case: PrefixCase, launch: str, device: torch.device, dtype: torch.dtype, ours: bool
) -> Launch:
    """Make one of prefix attention's launches; "key 0.1" has dropout of 0.1."""
    launch, _, dropout = launch.partition(" ")
    problem = prefix_problem(case, device)
    q, k, v, prefix_k, prefix_v = (t.detach().to(dtype) for t in problem.tensors)
    dout = problem.dy.to(dtype)
    seed = torch.tensor([7], device=device) if dropout else None
    forward: Any = prefix_reference.forward
    backward: Any = prefix_reference.backward
    if ours:
        from peft_kernels.prefix import launch as launches

        forward, backward = launches.prefix_forward, launches.prefix_backward
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=wide_dtype(dtype))
    tensors = (q, k, v, prefix_k[None], prefix_v[None])
    options = (True, case.head_size**-0.5, None, float(dropout or 0))
    given = (*tensors, None, None, None, seed, *options, out, lse, None)
    if launch == "forward":
        return Launch(lambda: forward(*given), (out, lse))
    forward(*given)
    # A prefix's gradient may be wider than what is computed in.
    wide = wide_dtype(dtype)
    asked = {
        "query": (torch.empty_like(q), None, None, None, None),
        "key": (None, torch.empty_like(k), torch.empty_like(v), None, None),
        "prefix": (None, None, None, *(torch.empty_like(t, dtype=wide) for t in tensors[3:])),
    }[launch]
    backward_given = (
        dout, None, *tensors, None, None, None, seed, out, lse, None, *options, *asked, None
    )  # fmt: skip
    return Launch(lambda: backward(*backward_given), tuple(t for t in asked if t is not None))


def adapter(
    case: adapter_cases.AdapterCase,
    direction: str,
    device: torch.device,
    dtype: torch.dtype,
    ours: bool,
) -> Launch:
    """Make an adapter's "forward", or "backward": dx alone."""
    problem = adapter_cases.make_problem(case, device)
    x, down, up, down_bias, up_bias = (t.detach().to(dtype) for t in problem.tensors)
    dy = problem.dy.to(dtype)
    seed = problem.seed if case.dropout_p else None
    forward: Any = adapter_reference.forward
    backward: Any = adapter_reference.backward
    if ours:
        from peft_kernels.adapter import launch

        forward, backward = launch.adapter_forward, launch.adapter_backward
    y, pre, dx = torch.empty_like(x), x.new_empty(x.shape[0], down.shape[0]), torch.empty_like(x)
    options = (problem.scale, case.activation, seed, case.dropout_p)
    given = (x, down, up, down_bias, up_bias, x, *options, y, pre)
    if direction == "forward":
        return Launch(lambda: forward(*given), (y, pre))
    forward(*given)
    backward_given = (
        dy, x, pre, down, up, down_bias, up_bias, *options, True, dx, None, None, None, None, None
    )  # fmt: skip
    return Launch(lambda: backward(*backward_given), (dx,))


@dataclass(frozen=True)
class SumCase:
    """A token-split reduction: gradients [columns, rank] of two factors over all tokens."""

    name: str
    tokens: int
    columns: tuple[int, int]
    rank: int
    dropout_p: float = 0.0
    dtype: str = "bfloat16"


def reduction(
    case: SumCase, kind: str, device: torch.device, dtype: torch.dtype, ours: bool
) -> Launch:
    """Make the reduction of LoRA ("lora") or of an adapter ("adapter": column sums too)."""
    half = getattr(torch, case.dtype)
    generator = torch.Generator(device=device).manual_seed(0)

    def random(columns: int) -> Tensor:
        drawn = torch.randn(case.tokens, columns, device=device, generator=generator)
        return drawn.to(half).to(dtype)

    v0, v1, low0, low1 = (random(columns) for columns in (*case.columns, case.rank, case.rank))
    seed = torch.tensor([7], device=device) if case.dropout_p else None
    first = v0.new_empty(case.rank, v0.shape[1])
    second = v0.new_empty(v1.shape[1], case.rank)
    lowsum, colsum = v0.new_empty(case.rank), v0.new_empty(v1.shape[1])
    sums = (lowsum, colsum) if kind == "adapter" else ()

    def by_kernel() -> None:
        from peft_kernels.core.token_reduction import Factor, token_reduction

        tile = (
            adapter_tiles.reduction_tile(device, dtype, v0.shape[1], case.rank)
            if sums
            else tiles.reduction_tile(device, dtype, case.rank)
        )
        token_reduction(
            Factor(v0, low0, first.t()), Factor(v1, low1, second), colsum if sums else None, tile,
            seed=seed, dropout_p=case.dropout_p, precision=tiles.precision(dtype, device),
            dropped=1 if sums else 0, lowsum=lowsum if sums else None,
        )  # fmt: skip

    def by_torch() -> None:
        kept = [v0, v1]
        if seed is not None:
            side = 1 if sums else 0
            keep = rng.dropout_mask(seed, *kept[side].shape, case.dropout_p)
            kept[side] = torch.where(keep, kept[side], 0.0)
        torch.mm(low0.t(), kept[0], out=first)
        torch.mm(kept[1].t(), low1, out=second)
        if sums:
            lowsum.copy_(low0.sum(0))
            colsum.copy_(kept[1].sum(0))

    return Launch(by_kernel if ours else by_torch, (first, second, *sums))


def trial(case: Any) -> Any:
    """Return a case cut to what is quick to check against float64."""
    if isinstance(case, LoRACase):
        return replace(case, tokens=min(case.tokens, 400), in_features=512, out_features=576)
    if isinstance(case, PrefixCase):
        group = case.heads // case.kv_heads
        tokens = min(case.tokens, 208)
        return replace(case, batch=2, heads=2 * group, kv_heads=2, tokens=tokens)
    if isinstance(case, SumCase):
        return replace(case, tokens=800, columns=(400, 336))
    # Of as many tokens as make the shape class.
    return replace(case, tokens=min(case.tokens, 4112), features=min(case.features, 400))


def tiny(case: Any) -> Any:
    """Return a case cut to what Triton's interpreter does in a moment, in a dtype that it knows."""
    if isinstance(case, LoRACase):
        sizes = {"tokens": min(case.tokens, 272), "in_features": 32, "out_features": 48}
        return replace(case, dtype="float16", **sizes)
    if isinstance(case, PrefixCase):
        sizes = {
            "batch": 1,
            "heads": 2,
            "kv_heads": 1,
            "tokens": 48,
            "length": min(case.length, 20),
        }
        return replace(case, dtype="float16", **sizes)
    if isinstance(case, SumCase):
        return replace(case, dtype="float16", tokens=96, columns=(48, 64))
    return replace(case, dtype="float16", tokens=min(case.tokens, 64), features=64)
