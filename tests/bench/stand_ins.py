"""Stand-ins for peers that are not installed: their signatures and layouts, the right results.

Each refuses what the peer refuses, and saves, recomputes and returns gradients in the peer's
layouts. ``wrong`` makes one part of the result wrong, as a broken kernel would.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def install(patch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """Make ``name`` and what it lies in importable; return the module that holds ``members``."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        parent = ".".join(parts[:end])
        if parent not in sys.modules:
            patch.setitem(sys.modules, parent, ModuleType(parent))
    module = ModuleType(name)
    vars(module).update(members)
    patch.setitem(sys.modules, name, module)
    return module


def axolotl(patch: pytest.MonkeyPatch, wrong: float = 1.0) -> None:
    class LoRA_O(torch.autograd.Function):
        @staticmethod
        def forward(ctx, X, X_drop, W, b, W_quant, A, B, s, lora_bias, magnitude):  # type: ignore[no-untyped-def]
            batch, length, size = X.shape
            assert W_quant is None and lora_bias is None and magnitude is None
            assert W.shape[1] == size == A.shape[1] and B.shape == (W.shape[0], A.shape[0])
            rows = X.reshape(-1, size)
            dropped = rows if X_drop is None else X_drop.reshape(-1, size)
            y = rows @ W.t()
            y += s * dropped @ A.t() @ B.t()
            if b is not None:
                y += b
            ctx.save_for_backward(A, B, X, X if X_drop is None else X_drop)
            ctx.held = (W, s, X_drop is not None)
            return y.view(batch, length, -1)

        @staticmethod
        def backward(ctx, dY):  # type: ignore[no-untyped-def]
            (A, B, X, X_drop), (W, s, has_dropout) = ctx.saved_tensors, ctx.held
            batch, length, size = X.shape
            rows, dropped = dY.reshape(-1, dY.shape[-1]), X_drop.reshape(-1, size)
            dS = rows @ B
            dA = wrong * s * (dropped.t() @ dS)  # [in, rank]
            dB = s * (A @ dropped.t() @ rows)  # [rank, out]
            dX, d_drop = rows @ W, (s * dS @ A).view_as(X)
            if not has_dropout:
                dX, d_drop = dX + d_drop.view_as(dX), None
            none = None
            return dX.view_as(X), d_drop, none, none, none, dA.t(), dB.t(), none, none, none

    install(patch, "axolotl.kernels.lora", LoRA_O=LoRA_O)


def nemo_automodel(patch: pytest.MonkeyPatch, wrong: float = 1.0) -> None:
    class LoRATritonFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, lora_A, lora_B, scale, res):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, lora_A, lora_B)
            ctx.scale = scale
            y = (x @ lora_A.t() * scale) @ lora_B.t()
            y.add_(res)
            return y

        @staticmethod
        def backward(ctx, d_y):  # type: ignore[no-untyped-def]
            x, lora_A, lora_B = ctx.saved_tensors
            ds = ctx.scale * (d_y @ lora_B)
            db = (x @ lora_A.t() * ctx.scale).t() @ d_y
            return ds @ lora_A, ds.t() @ x, wrong * db.t(), None, d_y

    def apply_memory_efficient_lora(x, lora_A, lora_B, scale, use_triton_kernel, res=None):  # type: ignore[no-untyped-def]
        assert use_triton_kernel and res is not None
        assert x.dtype == lora_A.dtype == lora_B.dtype == res.dtype
        assert lora_A.shape == (lora_B.shape[1], x.shape[1])
        assert res.shape == (x.shape[0], lora_B.shape[0])
        return LoRATritonFunction.apply(x, lora_A, lora_B, scale, res)

    install(
        patch, "nemo_automodel.components._peft.lora",
        apply_memory_efficient_lora=apply_memory_efficient_lora,
    )  # fmt: skip


def lorafusion(patch: pytest.MonkeyPatch, wrong: float = 1.0) -> ModuleType:
    def seeded_dropout(x, p, seed=None, *, store_mask=True):  # type: ignore[no-untyped-def]
        assert store_mask and seed is not None
        mask = torch.rand(x.shape) > p
        return torch.where(mask, x / (1 - p), 0.0).to(x.dtype), mask

    class FusedLinearLoRA(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, linear_w, lora_a, lora_b, alpha, dropout_p, seed, linear_bias):  # type: ignore[no-untyped-def]
            batch, length, size = x.shape  # of two dimensions it knows no batch
            rows, mask = x.reshape(-1, size), None
            dropped = rows
            if dropout_p > 0:
                # Looked up in the module at every call, and called by name.
                dropped, mask = module.seeded_dropout(
                    x=rows, p=dropout_p, seed=seed, store_mask=True
                )
            s = dropped @ lora_a.T
            y = F.linear(rows, linear_w, linear_bias) + s @ (lora_b * alpha).T
            ctx.save_for_backward(dropped, linear_w, lora_a, lora_b, mask, s)
            ctx.held = (alpha, dropout_p)
            return y.reshape(batch, length, -1)

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            (dropped, w, a, b, mask, s), (alpha, p) = ctx.saved_tensors, ctx.held
            assert mask.shape == dropped.shape  # None without dropout: it fails there
            batch, length, size = dy.shape
            rows = dy.reshape(-1, size)
            ds = alpha * (rows @ b)
            dx = rows @ w + torch.where(mask, wrong * (ds @ a) / (1 - p), 0.0)
            db = alpha * (rows.T @ s)
            return dx.reshape(batch, length, -1), None, ds.T @ dropped, db, None, None, None, None

    def fused_linear_lora(
        x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None
    ):  # type: ignore[no-untyped-def]
        seed = 7 if seed is None else seed
        return FusedLinearLoRA.apply(
            x, linear_w, lora_a, lora_b, alpha, dropout_p, seed, linear_bias
        )

    install(patch, "lorafusion.ops.triton_ops.config", HARDWARE_CONFIGS={"h100-80gb-hbm3": "tiles"})
    install(patch, "lorafusion.utils.common", get_device_short_name=lambda: "h200")
    module = install(
        patch, "lorafusion.ops.lora_v1", seeded_dropout=seeded_dropout,
        fused_linear_lora=fused_linear_lora,
    )  # fmt: skip
    return module


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """Return float32 scores [B, heads, queries, keys] of [B, sequence, heads, size]."""
    repeated = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), repeated.float()) * q.shape[-1] ** -0.5
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def _causal(queries: int, keys: int, *, bottom_right: bool) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).triu(
        keys - queries + 1 if bottom_right else 1
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, bottom_right: bool) -> Tensor:
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and k.shape == v.shape
    assert q.shape[2] % k.shape[2] == 0 and q.shape[::3] == k.shape[::3]
    hidden = _causal(q.shape[1], k.shape[1], bottom_right=bottom_right) if causal else None
    weights = _scores(q, k, hidden).softmax(-1)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2).float()
    return torch.einsum("bhqk,bkhd->bqhd", weights, values).to(q.dtype)


def flash_attn(patch: pytest.MonkeyPatch, wrong: float = 1.0) -> None:
    def flash_attn_func(  # type: ignore[no-untyped-def]
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert dropout_p == 0.0 and softmax_scale is None and window_size == (-1, -1)
        return _flash(q, k, v, causal, bottom_right=wrong == 1.0)

    install(patch, "flash_attn", flash_attn_func=flash_attn_func)


def flash_attn_interface(patch: pytest.MonkeyPatch, wrong: float = 1.0) -> None:
    """Version 3, of a build that returns the log-sum-exp too."""

    def flash_attn_func(  # type: ignore[no-untyped-def]
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert softmax_scale is None and qv is None and attention_chunk == 0
        out = _flash(q, k, v, causal, bottom_right=wrong == 1.0)
        return out, torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    install(patch, "flash_attn_interface", flash_attn_func=flash_attn_func)


def xformers(patch: pytest.MonkeyPatch, wrong: float = 1.0) -> None:
    """Gradients take MSLK's way: merged output and log-sum-exp go back as "gradients" of theirs."""

    class LowerTriangularFromBottomRightMask:
        pass

    class PartialFunc(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, attn_bias):  # type: ignore[no-untyped-def]
            assert query.shape[::2] == key.shape[::2] == value.shape[::2], "equally many heads"
            hidden = None
            if attn_bias is not None:
                assert type(attn_bias) is LowerTriangularFromBottomRightMask
                hidden = _causal(query.shape[1], key.shape[1], bottom_right=True)
            scores = _scores(query, key, hidden)
            ctx.save_for_backward(query, key, value)
            ctx.hidden = hidden
            out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.float())
            return out.to(query.dtype), scores.logsumexp(-1), torch.empty_like(query)

        @staticmethod
        def backward(ctx, grad, lse, out):  # type: ignore[no-untyped-def]
            query, key, value = ctx.saved_tensors
            scale = query.shape[-1] ** -0.5
            weights = (_scores(query, key, ctx.hidden) - lse[..., None]).exp()
            dw = torch.einsum("bqhd,bkhd->bhqk", grad.float(), value.float())
            delta = (grad.float() * out.float()).sum(-1).transpose(1, 2)[..., None]
            ds = weights * (dw - delta) * scale
            dq = torch.einsum("bhqk,bkhd->bqhd", ds, key.float())
            dk = torch.einsum("bhqk,bqhd->bkhd", ds, query.float())
            dv = torch.einsum("bhqk,bqhd->bkhd", weights, grad.float())
            return dq.to(query.dtype), wrong * dk.to(key.dtype), dv.to(value.dtype), None

    class MergeFunc(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
            ctx.parts = len(inputs) // 3
            lse = torch.stack(inputs[1::3]).logsumexp(0)
            parts = zip(inputs[::3], inputs[1::3], strict=True)
            out = sum((own - lse).exp().transpose(1, 2)[..., None] * each for each, own in parts)
            out = out.to(inputs[0].dtype)
            ctx.save_for_backward(out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            out, lse = ctx.saved_tensors
            return (grad, lse, out) * ctx.parts

    class Partial:
        def __init__(self, attn: Tensor, lse: Tensor, placeholder: Tensor) -> None:
            self.parts = attn, lse, placeholder

        def apply(self, fn):  # type: ignore[no-untyped-def]
            attn, lse, placeholder = self.parts
            moved = fn(lse.permute(0, 2, 1).unsqueeze(-1)).squeeze(-1).permute(0, 2, 1)
            return Partial(fn(attn), moved, fn(placeholder))

    def memory_efficient_attention_partial_autograd(  # type: ignore[no-untyped-def]
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        assert p == 0.0 and scale is None and op is None and output_dtype is None
        return Partial(*PartialFunc.apply(query, key, value, attn_bias))

    def merge_attentions_autograd(*partials: Partial) -> Tensor:
        merged: Tensor = MergeFunc.apply(*(part for each in partials for part in each.parts))
        return merged

    install(
        patch, "xformers.ops.fmha.attn_bias",
        LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask,
    )  # fmt: skip
    install(
        patch, "xformers.ops.fmha.merge_training",
        memory_efficient_attention_partial_autograd=memory_efficient_attention_partial_autograd,
        merge_attentions_autograd=merge_attentions_autograd,
    )  # fmt: skip


def without_tensors(case: Any, device: str = "cuda") -> Any:
    """Return a problem as ``why_not`` sees it."""
    return SimpleNamespace(case=case, dy=SimpleNamespace(device=torch.device(device)))
