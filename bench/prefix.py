"""Prefix attention, for every benchmark: cases, providers, what is right, what is asked.

A case is one causal self-attention behind a shared prefix, and its backward to q, k, v and prefix;
or one step of decoding, whose query sees the prefix and every key of its cache.
Providers: ``eager``, the path that peft takes through transformers: prefix and keys concatenated,
heads repeated, SDPA under a dense mask (made beforehand: a model makes it once for all layers), in
decoding without a mask and without repeating heads, but still concatenated with every step;
``compile``, that under ``torch.compile``; on a GPU ``flash``, the same without repeating heads and
with a causal bias that SDPA's flash kernel knows, which transformers does not take; ``fused``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.method import (
    BOTH,
    COMPILED,
    CPU,
    DRY,
    FORWARD,
    GPU,
    MAIN,
    MEMORY,
    OURS,
    SHORT,
    Case,
    Expected,
    Forward,
    Method,
    Provider,
    Target,
    packaged,
    results,
    speed_up,
)
from bench.roofline import Work
from bench.third_party import flash_attn, flex_attention, usable, xformers
from peft_kernels import prefix_attention

OTHER_ORDERS = 4  # of eager's sums: one order alone is luck


@dataclass(frozen=True)
class PrefixCase(Case):
    """q [batch, heads, queries, head_size], k and v of tokens with kv_heads, a prefix of `length`.

    Attributes:
        name: as in ``Case``, like suite and reported.
        dtype: of every tensor.
        length: P.
        decoding: the last token alone asks, the others are in the cache.
    """

    op: ClassVar[str] = "prefix"
    name: str
    suite: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    length: int
    head_size: int
    dtype: str = "bfloat16"
    reported: bool = False
    decoding: bool = False

    @property
    def queries(self) -> int:
        """How many of the last tokens ask."""
        return 1 if self.decoding else self.tokens


def _case(suite: str, *sizes: int, dtype: str = "bfloat16", decoding: bool = False) -> PrefixCase:
    b, h, hkv, s, p, d = sizes
    place = {MEMORY: "saved ", DRY: "dry "}.get(suite, "")
    form = " decoding" if decoding else ""
    name = f"{place}prefix{form} B{b} H{h}/{hkv} S{s} P{p} d{d} {SHORT[dtype]}"
    return PrefixCase(name, suite, *sizes, dtype, suite in (GPU, DRY), decoding)


CASES = (
    *(
        _case(CPU, 4, 16, 4, 512, length, 64, dtype=dtype)
        for length in (32, 128)
        for dtype in ("float32", "bfloat16")
    ),
    _case(MEMORY, 4, 16, 4, 512, 128, 64),
    *(
        _case(GPU, *sizes)
        for sizes in (
            (32, 32, 8, 512, 16, 128), (8, 32, 8, 2048, 32, 128), (2, 32, 8, 8192, 128, 128),
            (32, 12, 12, 512, 128, 64), (8, 32, 8, 512, 2048, 128), (64, 32, 8, 128, 2048, 128),
        )
    ),
    _case(GPU, 64, 32, 8, 128, 2048, 128, decoding=True),
    _case(DRY, 2, 4, 2, 21, 5, 16, dtype="float32"),
)  # fmt: skip


def quick(case: PrefixCase) -> PrefixCase:
    """Return ``case`` cut to a size that proves the code runs and measures nothing."""
    return replace(
        case, name=f"quick {case.name}", batch=2, heads=4, kv_heads=2, tokens=21, length=5,
        head_size=16,
    )  # fmt: skip


@dataclass(frozen=True)
class PrefixProblem:
    """What every provider is given."""

    case: PrefixCase
    tensors: tuple[Tensor, ...]  # q, k, v, prefix_k, prefix_v: the last two [kv_heads, P, d]
    mask: Tensor  # bool [queries, P + S], True = seen
    dy: Tensor

    @property
    def sdpa_mask(self) -> Tensor | None:
        """The mask, which transformers leaves out where the only query sees everything."""
        return None if self.case.decoding else self.mask

    @property
    def alive(self) -> tuple[Tensor, ...]:
        """The inputs and the prefix."""
        return self.tensors

    def leaves(self, frozen: bool) -> dict[str, Tensor]:
        """Return what gradients are taken of."""
        return dict(zip(("q", "k", "v", "prefix_k", "prefix_v"), self.tensors, strict=True))

    def keep_mask(self) -> Tensor | None:
        """Return None: nothing is dropped."""
        return None


def make_problem(case: PrefixCase, device: str | torch.device, seed: int = 0) -> PrefixProblem:
    """Return the tensors of a case, the same ones for the same seed."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, case.head_size, device=device, generator=generator)
        return drawn.to(case.torch_dtype)

    b, h, hkv, s, p = case.batch, case.heads, case.kv_heads, case.tokens, case.length
    queries = case.queries
    shapes = ((b, h, queries), (b, hkv, s), (b, hkv, s), (hkv, p), (hkv, p))
    tensors = tuple(normal(*shape).requires_grad_() for shape in shapes)
    seen = torch.ones(queries, p + s, dtype=torch.bool, device=device).tril(p + s - queries)
    return PrefixProblem(case, tensors, seen, normal(b, h, queries))


def eager_form(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Tensor | None
) -> Tensor:
    """Return attention as peft and transformers compute it, by concatenation and a dense mask.

    Heads are repeated beside a mask alone: SDPA's fast kernels group them, but take no mask then.
    """
    batch, heads = q.shape[:2]

    def whole(prefix: Tensor, own: Tensor) -> Tensor:
        joined = torch.cat((prefix.expand(batch, -1, -1, -1), own), dim=2)
        if mask is None:
            return joined
        repeated = joined[:, :, None].expand(-1, -1, heads // own.shape[1], -1, -1)
        return repeated.reshape(batch, heads, *joined.shape[2:])

    keys, values = whole(prefix_k, k), whole(prefix_v, v)
    if mask is None:
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=heads != k.shape[1])
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None, None])


def _eager(problem: PrefixProblem, keep: Tensor | None) -> Forward:
    given = (*problem.tensors, problem.sdpa_mask)
    return lambda: eager_form(*given)


def _flash(problem: PrefixProblem, keep: Tensor | None) -> Forward:
    from torch.nn.attention.bias import causal_lower_right

    q, k, v, prefix_k, prefix_v = problem.tensors
    case = problem.case
    bias = causal_lower_right(case.queries, case.length + case.tokens)

    def whole(prefix: Tensor, own: Tensor) -> Tensor:
        return torch.cat((prefix.expand(case.batch, -1, -1, -1), own), dim=2)

    return lambda: F.scaled_dot_product_attention(
        q, whole(prefix_k, k), whole(prefix_v, v), attn_mask=bias,
        enable_gqa=case.heads != case.kv_heads,
    )  # fmt: skip


def _compiled(problem: PrefixProblem, keep: Tensor | None) -> Forward:
    torch._dynamo.reset()
    compiled = torch.compile(eager_form, dynamic=False)
    given = (*problem.tensors, problem.sdpa_mask)
    return lambda: compiled(*given)


def fused(backend: str | None = None) -> Provider:
    """Return the provider of ``prefix_attention`` on a backend (None: the best)."""

    def arguments(
        problem: PrefixProblem, keep: Tensor | None
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return problem.tensors, {"causal": True}

    return packaged(prefix_attention, arguments, backend)


EAGER, FUSED = Provider("eager", _eager), fused()
FLASH = Provider("flash", _flash)


def in_another_order(problem: PrefixProblem, order: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return SDPA's results, sums made in another order.

    Args:
        problem: the problem.
        order: permutations of queries, keys and a head's features.
    """
    q, k, v, prefix_k, prefix_v = problem.tensors
    batch, heads = q.shape[:2]

    def whole(prefix: Tensor, own: Tensor) -> Tensor:
        joined = torch.cat((prefix.expand(batch, -1, -1, -1), own), dim=2)
        return joined.repeat_interleave(heads // own.shape[1], dim=1)

    keys, values, mask, dy = whole(prefix_k, k), whole(prefix_v, v), problem.mask, problem.dy
    queries, places, features = order
    q, dy = q[:, :, queries][..., features], dy[:, :, queries]
    keys, values = keys[:, :, places][..., features], values[:, :, places]
    mask = mask[queries][:, places]
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None, None])
    found = results(y, dy, problem.leaves(False))
    found["y"] = found["y"][:, :, queries.argsort()]
    return found


def truth(problem: PrefixProblem) -> dict[str, Tensor]:
    """Return the results in float64, head by head: all scores of a long sequence fill no memory."""
    case = problem.case
    q, k, v, *prefix = (each.detach().double() for each in problem.tensors)
    dy, scale, hidden = problem.dy.double(), case.head_size**-0.5, ~problem.mask
    y, dq, dk, dv = (torch.zeros_like(each) for each in (q, q, k, v))
    d_prefix = [torch.zeros_like(each) for each in prefix]
    for row in range(case.batch):
        for head in range(case.heads):
            own = head * case.kv_heads // case.heads
            keys, values = (
                torch.cat((one[own], each[row, own]))
                for one, each in zip(prefix, (k, v), strict=True)
            )
            weights = (q[row, head] @ keys.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
            y[row, head] = weights @ values
            dw = dy[row, head] @ values.mT
            ds = weights * (dw - (weights * dw).sum(-1, keepdim=True)) * scale
            dq[row, head] = ds @ keys
            both = (ds.mT @ q[row, head], weights.mT @ dy[row, head])
            for gradient, of_prefix, of_own in zip(both, d_prefix, (dk, dv), strict=True):
                of_prefix[own] += gradient[: case.length]
                of_own[row, own] += gradient[case.length :]
    names = ("dq", "dk", "dv", "dprefix_k", "dprefix_v")
    return {"y": y} | dict(zip(names, (dq, dk, dv, *d_prefix), strict=True))


def expected(problem: PrefixProblem, keep: Tensor | None, frozen: bool) -> Expected:
    """Return the results in float64, and in the case's dtype: SDPA's and other orders of sums."""
    case, device = problem.case, problem.dy.device
    generator = torch.Generator().manual_seed(0)
    sizes = (case.queries, case.length + case.tokens, case.head_size)
    orders = [
        tuple(torch.randperm(size, generator=generator).to(device) for size in sizes)
        for _ in range(OTHER_ORDERS)
    ]
    eager = [results(_eager(problem, None)(), problem.dy, problem.leaves(False))]
    return Expected(truth(problem), eager + [in_another_order(problem, each) for each in orders])


def work(case: PrefixCase, direction: str, provider: str = OURS) -> Work:
    """Return the arithmetic of what is seen, and every tensor once."""
    b, h, hkv, s, p, d = (
        case.batch, case.heads, case.kv_heads, case.tokens, case.length, case.head_size
    )  # fmt: skip
    asking = case.queries
    seen = asking * (p + s - asking) + asking * (asking + 1) // 2
    flops, size = 4 * b * h * d * seen, case.torch_dtype.itemsize
    rows, cached, shared = (n * d * size for n in (b * asking, b * s, 2 * hkv * p))
    moved = 2 * h * rows + 2 * hkv * cached + shared + 4 * b * h * asking
    if direction == BOTH:
        # Scores again, dP, dV, dQ and dK.
        flops += 10 * b * h * d * seen
        moved += 4 * h * rows + 4 * hkv * cached + 2 * shared + 4 * b * h * asking
    return Work(flops, moved)


def saved_over_out(row: Any) -> float | None:
    """Return what is saved beyond the inputs, as a multiple of out and its float32 lse."""
    case: PrefixCase = row.case
    rows = case.batch * case.heads * case.queries
    if row.saved_bytes is None:
        return None
    return float(row.saved_bytes / (rows * (case.head_size * case.torch_dtype.itemsize + 4)))


def _targets() -> tuple[Target, ...]:
    def asked(label: str, limit: float, dtype: str, length: int) -> Target:
        return Target(
            f"cpu {label}, {BOTH}: eager / ours", limit, speed_up, CPU, BOTH,
            lambda case: case.dtype == dtype and case.length == length, True,
        )  # fmt: skip

    return (
        asked("fp32 P 32", 1.0, "float32", 32),
        asked("fp32 P 128", 1.15, "float32", 128),
        asked("bf16 P 32", 1.0, "bfloat16", 32),
        asked("bf16 P 128", 1.0, "bfloat16", 128),
        Target("saved beyond the inputs: x out and lse", 1.01, saved_over_out, MEMORY, FORWARD),
        Target(
            f"gpu, {BOTH}: eager / ours", 2.0, speed_up, GPU, BOTH,
            lambda case: not case.decoding, True,
        ),
        Target(
            f"gpu decoding, {FORWARD}: eager / ours", 4.0, speed_up, GPU, FORWARD,
            lambda case: case.decoding, True,
        ),
        Target(
            f"gpu S >= 2048, {BOTH}: flash / ours", 1.0, None, GPU, BOTH,
            lambda case: case.tokens >= 2048, True, over="flash",
        ),
        Target(
            f"gpu S <= 512, {BOTH}: flash / ours", 1.3, None, GPU, BOTH,
            lambda case: case.tokens <= 512 and not case.decoding, True, over="flash",
        ),
    )  # fmt: skip


THIRD_PARTIES = usable(
    flash_attn.PREFIX, flash_attn.PREFIX_3, flex_attention.PREFIX, xformers.PREFIX
)
METHOD = Method(
    name=PrefixCase.op,
    case_type=PrefixCase,
    cases=CASES,
    quick=quick,
    make_problem=make_problem,
    expected=expected,
    providers=(EAGER, Provider(COMPILED, _compiled, poison=False), *THIRD_PARTIES, FUSED),
    work=work,
    targets=_targets(),
    seconds={CPU: 8.0, GPU: 4.0},
    gpu={MAIN: (EAGER, FLASH, *THIRD_PARTIES, replace(fused("triton"), name=OURS))},
    columns={"compile": "torch.compile", "fused": "peft_kernels"},
    title="prefix: batch, heads/kv heads, tokens, prefix length, head size, dtype",
)
