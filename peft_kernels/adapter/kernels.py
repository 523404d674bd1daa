"""The bottleneck adapter in Triton: forward in one launch, dx and dpre in one.

    pre = x downᵀ + down_bias       h = act(pre)       y = residual + c · keep * (h upᵀ + up_bias)
    dpre = act'(pre) * ((c keep * dy) up)              dx = dpre down (+ dy)

Grid (row blocks,). A program holds BLOCK_M rows: it streams D once to *contract* them to
[BLOCK_M, BLOCK_R] in registers, stores and activates that, and streams D again to *expand* it. Both
directions are these two passes; backward contracts dy with up and expands dpre with down. The
whole bottleneck lies in one block of BLOCK_R columns.

Read: x twice, the second time as residual and from L2 (dy likewise in backward), the weights once
per row block from L2. Written: y (dx) and [M, r] once. The mask is drawn again from its seed.
GROUPED: row blocks hold rows of one adapter each, named by ``order``; rows without an adapter come
first, as a group with a bottleneck of no columns.

SCALE says what c is, beside 1 / (1 - p): 0 nothing, 1 a number, 2 a pointer to one, 3 a pointer to
one for each column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.adapter.activation_kernels import activate, derivative
from peft_kernels.core.device import keep_mask, load_scale, multiply, multiply_add


@triton.jit
def _contract(
    v_ptr, w_ptr, scale, seed_ptr, rows, mask_m, C, ranks, stride_vm, stride_wc, stride_wr,
    drop_threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    """Return (keep * v · scale of the column) w of some rows, [BLOCK_M, BLOCK_R], in float32."""
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < ranks
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DROPOUT and WGMMA:
        # Of a loop that may not run, the assembler makes every product wait for the one before.
        tl.assume(C > 0)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        v = tl.load(
            v_ptr + rows[:, None] * stride_vm + offs_c[None, :],
            mask=mask_m[:, None] & mask_c[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_C]
        w = tl.load(
            w_ptr + offs_c[:, None] * stride_wc + offs_r[None, :] * stride_wr,
            mask=mask_c[:, None] & mask_r[None, :],
            other=0.0,
        )  # [BLOCK_C, BLOCK_R]
        if DROPOUT:
            seed = tl.load(seed_ptr)
            keep = keep_mask(seed, rows, c // 4, tl.cdiv(C, 4), drop_threshold, BLOCK_C)
            v = tl.where(keep, v, 0.0)
        if SCALE == 3:
            factor = tl.load(scale + offs_c, mask=mask_c, other=0.0)
            v = (v.to(tl.float32) * factor[None, :]).to(v.dtype)
        acc = multiply_add(v, w, acc, PRECISION)
    return acc


@triton.jit
def _load_added(
    added_ptr, rows, mask_m, c, C, stride_am, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """Return BLOCK_C columns from c on, [BLOCK_M, BLOCK_C]; ahead, c comes to lie before 0."""
    offs_c = c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if AHEAD:
        mask_c &= offs_c >= 0
    return tl.load(
        added_ptr + rows[:, None] * stride_am + offs_c[None, :],
        mask=mask_m[:, None] & mask_c[None, :],
        other=0.0,
    )


@triton.jit
def _expand(
    low, w_ptr, bias_ptr, added_ptr, out_ptr, scale, inverse_keep, seed_ptr, rows, mask_m,
    C, ranks, stride_wc, stride_wr, stride_am, drop_threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr, SCALE: tl.constexpr,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store out = added + scale · keep * (low wᵀ + bias) of some rows.

    AHEAD takes more registers: from the last columns to the first, since what was contracted last
    is still in L2, and with everything loaded before the product that is needed after it.
    """
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < ranks
    last = (tl.cdiv(C, BLOCK_C) - 1) * BLOCK_C
    if ADD and AHEAD:
        added = _load_added(added_ptr, rows, mask_m, last, C, stride_am, BLOCK_C, AHEAD)
    for step in range(0, C, BLOCK_C):
        c = last - step if AHEAD else step
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        w = tl.load(
            w_ptr + offs_c[None, :] * stride_wc + offs_r[:, None] * stride_wr,
            mask=mask_c[None, :] & mask_r[:, None],
            other=0.0,
        )  # [BLOCK_R, BLOCK_C]
        if AHEAD:  # the compiler prefetches only w
            if HAS_BIAS:
                bias = tl.load(bias_ptr + offs_c, mask=mask_c & (ranks > 0), other=0.0)
            if SCALE == 3:
                factor = tl.load(scale + offs_c, mask=mask_c, other=0.0)
            if ADD:
                coming = _load_added(
                    added_ptr, rows, mask_m, c - BLOCK_C, C, stride_am, BLOCK_C, AHEAD
                )
        acc = multiply(low, w, PRECISION)  # [BLOCK_M, BLOCK_C]
        if HAS_BIAS:
            if not AHEAD:
                bias = tl.load(bias_ptr + offs_c, mask=mask_c & (ranks > 0), other=0.0)
            acc += bias.to(tl.float32)[None, :]
        if DROPOUT:
            seed = tl.load(seed_ptr)
            keep = keep_mask(seed, rows, c // 4, tl.cdiv(C, 4), drop_threshold, BLOCK_C)
            acc = tl.where(keep, acc, 0.0)
        if SCALE == 3:
            if not AHEAD:
                factor = tl.load(scale + offs_c, mask=mask_c, other=0.0)
            acc *= (factor * inverse_keep)[None, :]
        elif SCALE > 0:
            acc *= load_scale(scale, SCALE == 2) * inverse_keep
        if ADD:
            if not AHEAD:
                added = _load_added(added_ptr, rows, mask_m, c, C, stride_am, BLOCK_C, AHEAD)
            acc += added.to(tl.float32)
            if AHEAD:
                added = coming
        tl.store(
            out_ptr + rows[:, None] * C + offs_c[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=mask_m[:, None] & mask_c[None, :],
        )


@triton.jit
def _tile_of_group(
    order_ptr, offsets_ptr, tiles_ptr, E1, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Return (group, rows, mask) of this program's tile; group 0 has no adapter."""
    pid = tl.program_id(0)
    offs_g = tl.arange(0, GROUPS)
    first_tiles = tl.load(tiles_ptr + offs_g, mask=offs_g < E1, other=2147483647)
    group = tl.sum((first_tiles <= pid).to(tl.int32), axis=0) - 1
    first = tl.load(offsets_ptr + group) + (pid - tl.load(tiles_ptr + group)) * BLOCK_M
    offs = first + tl.arange(0, BLOCK_M)
    mask_m = offs < tl.load(offsets_ptr + group + 1)
    return group, tl.load(order_ptr + offs, mask=mask_m, other=0), mask_m


@triton.jit(do_not_specialize=["drop_threshold"])
def _adapter_forward_kernel(
    x_ptr, down_ptr, up_ptr, down_bias_ptr, up_bias_ptr, residual_ptr, y_ptr, pre_ptr, seed_ptr,
    order_ptr, offsets_ptr, tiles_ptr, E1,
    scale, inverse_keep, M, D, R, stride_xm, stride_rm, drop_threshold,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, SCALE: tl.constexpr,
    GROUPS: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks,); GROUPS is 0, or a power of two of at least the number of groups."""
    ranks = R
    if GROUPS > 0:
        group, rows, mask_m = _tile_of_group(order_ptr, offsets_ptr, tiles_ptr, E1, BLOCK_M, GROUPS)
        ranks = tl.where(group > 0, R, 0)
        contracted = mask_m & (group > 0)  # an infinity times no weight would be no number
        adapter = tl.maximum(group - 1, 0).to(tl.int64)
        down_ptr += adapter * R * D
        up_ptr += adapter * D * R
        down_bias_ptr += adapter * R
        up_bias_ptr += adapter * D
    else:
        rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        contracted = mask_m
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < ranks
    acc = _contract(
        x_ptr, down_ptr, scale, seed_ptr, rows, contracted, D, ranks, stride_xm, 1, D,
        drop_threshold, BLOCK_M, BLOCK_D, BLOCK_R, False, 0, PRECISION, False,
    )  # fmt: skip
    if HAS_DOWN_BIAS:
        bias = tl.load(down_bias_ptr + offs_r, mask=mask_r, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    pre = acc.to(pre_ptr.dtype.element_ty)
    tl.store(
        pre_ptr + rows[:, None] * R + offs_r[None, :], pre, mask=mask_m[:, None] & mask_r[None, :]
    )
    hidden = activate(pre.to(tl.float32), ACTIVATION).to(pre.dtype)
    _expand(
        hidden, up_ptr, up_bias_ptr, residual_ptr, y_ptr, scale, inverse_keep, seed_ptr, rows,
        mask_m, D, ranks, R, 1, stride_rm, drop_threshold,
        BLOCK_M, BLOCK_D, BLOCK_R, HAS_UP_BIAS, RESIDUAL, DROPOUT, SCALE, AHEAD, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["drop_threshold"])
def _adapter_backward_kernel(
    dy_ptr, up_ptr, down_ptr, pre_ptr, dpre_ptr, hidden_ptr, dx_ptr, seed_ptr,
    order_ptr, offsets_ptr, tiles_ptr, E1,
    scale, inverse_keep, M, D, R, stride_dym, drop_threshold,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr, NEED_DPRE: tl.constexpr, NEED_HIDDEN: tl.constexpr,
    NEED_DX: tl.constexpr, INPUT_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
    WGMMA: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks,): dpre and dx, and h again for the gradients of the weights.

    WGMMA: products are those of warp groups, Hopper's, which run beside what follows them.
    """
    ranks = R
    if GROUPS > 0:
        group, rows, mask_m = _tile_of_group(order_ptr, offsets_ptr, tiles_ptr, E1, BLOCK_M, GROUPS)
        ranks = tl.where(group > 0, R, 0)
        contracted = mask_m & (group > 0)  # an infinity times no weight would be no number
        adapter = tl.maximum(group - 1, 0).to(tl.int64)
        down_ptr += adapter * R * D
        up_ptr += adapter * D * R
    else:
        rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        contracted = mask_m
    offs_r = tl.arange(0, BLOCK_R)
    offs_low = rows[:, None] * R + offs_r[None, :]
    mask_low = mask_m[:, None] & (offs_r < ranks)[None, :]
    if NEED_DPRE:
        acc = _contract(
            dy_ptr, up_ptr, scale, seed_ptr, rows, contracted, D, ranks, stride_dym, R, 1,
            drop_threshold, BLOCK_M, BLOCK_D, BLOCK_R, DROPOUT, SCALE, PRECISION, WGMMA,
        )  # fmt: skip
    pre = tl.load(pre_ptr + offs_low, mask=mask_low, other=0.0).to(tl.float32)
    if NEED_HIDDEN:
        hidden = activate(pre, ACTIVATION).to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + offs_low, hidden, mask=mask_low)
    if NEED_DPRE:
        factor = inverse_keep
        if SCALE != 3:
            factor *= load_scale(scale, SCALE == 2)
        dpre = (derivative(pre, ACTIVATION) * (acc * factor)).to(dpre_ptr.dtype.element_ty)
        tl.store(dpre_ptr + offs_low, dpre, mask=mask_low)
        if NEED_DX:
            _expand(
                dpre, down_ptr, dy_ptr, dy_ptr, dx_ptr, scale, inverse_keep, seed_ptr, rows,
                mask_m, D, ranks, 1, D, stride_dym, drop_threshold,
                BLOCK_M, BLOCK_D, BLOCK_R, False, INPUT_RESIDUAL, False, 0, AHEAD, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["drop_threshold"])
def _keep_mask_kernel(
    keep_ptr, seed_ptr, M, C, drop_threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Grid (row blocks, column blocks): the keep mask itself, for the library's products."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    first_c = tl.program_id(1) * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    seed = tl.load(seed_ptr)
    keep = keep_mask(seed, rows, first_c // 4, tl.cdiv(C, 4), drop_threshold, BLOCK_C)
    mask = (rows < M)[:, None] & (offs_c < C)[None, :]
    tl.store(keep_ptr + rows[:, None] * C + offs_c[None, :], keep, mask=mask)
