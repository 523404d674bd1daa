"""``@triton.jit`` helpers that the kernels of several methods share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_scale(scale, SCALE_IS_POINTER: tl.constexpr):
    """Return a scale that is given as a number or as a pointer to one."""
    # With a return after the branch, the compiler would find two types of result.
    if SCALE_IS_POINTER:
        return tl.load(scale)
    else:
        return scale


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """Return x as a product reads it: under "tf32" float32 is rounded."""
    if x.dtype == tl.float32 and PRECISION == "tf32":
        x = _round_to_tf32(x)
    return x


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr):
    """Return a b in float32: ``multiply_add`` onto zero."""
    return tl.dot(operand(a, PRECISION), operand(b, PRECISION), input_precision=PRECISION)


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b in float32; PRECISION is of float32 operands.

    Exact products of float32 ("ieee") are summed by themselves and then added: in one chain over
    all steps of a loop, which is what the compiler makes of a product and a sum, the error would
    grow with their number.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        # Any bound but zero keeps the two sums apart; the product itself takes no notice of it.
        acc += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        acc = tl.dot(
            operand(a, PRECISION), operand(b, PRECISION), acc, input_precision=PRECISION
        )  # fmt: skip
    return acc


@triton.jit
def _round_to_tf32(x):
    """Return float32 rounded to tf32: tensor cores cut the last bits off, which shrinks results."""
    bits = tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
    )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def keep_mask(seed, rows, group0, groups, drop_threshold, BLOCK_C: tl.constexpr):
    """Return the keep mask of dropout, [len(rows), BLOCK_C]: ``core.rng.dropout_mask``, one tile.

    Args:
        seed: int64 scalar.
        rows: absolute row numbers, [BLOCK_M].
        group0: first column of the tile / 4.
        groups: ceil(columns / 4) of the whole matrix.
        drop_threshold: the uint32 bound, shifted down by 2**31 so that it always is an int32.
        BLOCK_C: columns of the tile, a multiple of 4.
    """
    offs_g = group0 + tl.arange(0, BLOCK_C // 4)
    counter = rows.to(tl.int64)[:, None] * groups + offs_g[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    # One call gives the words of four neighbouring columns.
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(rows.shape[0], BLOCK_C)
    bound = (drop_threshold.to(tl.int64) + 2147483648).to(tl.uint32)
    return words >= bound


@triton.jit
def last_to_arrive(counter_ptr, expected):
    """Return whether this program is the last of ``expected`` to come here; it resets the counter.

    Everything that the others stored before they came is visible to the last one afterwards.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    last = arrived == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def grouped_tile(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Return (pid_m, pid_n) of an output tile, GROUP_M row blocks at a time for L2 reuse."""
    width = GROUP_M * num_n
    first_m = (tile // width) * GROUP_M
    size_m = min(num_m - first_m, GROUP_M)
    return first_m + (tile % width) % size_m, (tile % width) // size_m
