"""Scores of prefix attention, what makes probabilities of them, and how gates enter."""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.core.device import multiply

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x, like):
    """Return what makes probabilities of scores: 2^x, or in float32 e^x."""
    if like.dtype == tl.float32:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def scores(
    q, k, offs_n, stop, first, last, mask_ptr, stride_mask,
    MASK: tl.constexpr, BOUNDED: tl.constexpr, KEY_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return q kᵀ of a block of keys, -inf where a key is not seen, [BLOCK_M, BLOCK_N].

    MASK: whether any is unseen: those from ``stop`` on, or BOUNDED those outside of each row's
    [first, last), and under KEY_MASK those that it hides.
    """
    s = multiply(q, tl.trans(k), PRECISION)
    if MASK:
        if BOUNDED:
            seen = (offs_n[None, :] >= first[:, None]) & (offs_n[None, :] < last[:, None])
        else:
            seen = (offs_n < stop)[None, :]
        if KEY_MASK:
            kept = tl.load(mask_ptr + offs_n * stride_mask, mask=offs_n < stop, other=0)
            seen = seen & (kept != 0)[None, :]
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def negated(block, NEGATE: tl.constexpr):
    """Return the block, or minus it: how a negative scale enters scores that must only grow."""
    if NEGATE:
        return (-(block.to(tl.float32))).to(block.dtype)
    else:
        return block


@triton.jit
def load_lse(lse_ptr, rows, exists, like):
    """Return lse in the base of the scores; +inf, which makes p 0, of rows with nothing to see."""
    lse = tl.load(lse_ptr + rows, mask=exists, other=float("inf"))
    return lse_of_scores(tl.where(lse == float("-inf"), float("inf"), lse), like)


@triton.jit
def lse_of_scores(lse, like):
    """Return lse in the base of the scores."""
    if like.dtype == tl.float32:
        return lse
    else:
        return lse * LOG2E


@triton.jit
def log_sum(row_max, row_sum, like):
    """Return the natural logarithm of the sum of e^s, -inf of nothing."""
    something = row_sum > 0.0
    some = tl.where(something, row_sum, 1.0)
    if like.dtype == tl.float32:
        log = row_max + tl.log(some)
    else:
        log = (row_max + tl.log2(some)) * LN2
    return tl.where(something, log, float("-inf"))


@triton.jit
def tanh(x):
    """Return tanh in float32: a series near 0, where the quotient would cancel."""
    z = x * x
    series = 21844.0 / 6081075.0 - z * (929569.0 / 638512875.0)
    series = 62.0 / 2835.0 + z * (-1382.0 / 155925.0 + z * series)
    series = 1.0 + z * (-1.0 / 3.0 + z * (2.0 / 15.0 + z * (-17.0 / 315.0 + z * series)))
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(z < 0.25, x * series, tl.where(x < 0, -far, far))


@triton.jit
def power_of_two(x):
    """Return the power of two next to x towards 0, without its sign: at least 2**-60, and 1 for 0.

    What x multiplies is divided by it before it is rounded to 16 bits and multiplied with it after
    its sum in float32, so that a small x does not underflow and nothing else changes.
    """
    below = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(x == 0.0, 1.0, tl.maximum(below, 8.673617379884035e-19))
