"""A small vision transformer for 8 x 8 images, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_kernels.demo.data import CLASSES, IMAGE_SIZE

PATCH = 2
TOKENS = (IMAGE_SIZE // PATCH) ** 2


class Attention(nn.Module):
    """Multi-head self-attention with separate q, k, v and o projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, S, D] for x [B, S, D]."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, S, d]
            for project in (self.q, self.k, self.v)
        )
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q kᵀ / sqrt(d)) v, [B, H, S, d]; prefix tuning replaces this."""
        # Written out: fused attention has no deterministic backward on every device.
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # [B, H, S, S]
        return scores.softmax(-1) @ v


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, S, D] for x [B, S, D]."""
        x = x + self.attention(self.norm_attention(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm_mlp(x))))


class DigitTransformer(nn.Module):
    """Patches of 2 x 2 pixels, a few blocks, mean pooling and a 10-way head.

    Args:
        width: D, of the residual stream.
        heads: attention heads; D must be a multiple.
        depth: number of blocks.
    """

    def __init__(self, width: int = 192, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        # Wide apart: mean pooling sees where a stroke lies only through these.
        self.position = nn.Parameter(torch.randn(TOKENS, width) * 0.5)
        # Where prompt tuning puts its rows in front of the patches.
        self.prompt: nn.Module = nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, 10] for images [B, 8, 8]."""
        patches = nn.functional.pixel_unshuffle(images.unsqueeze(1), PATCH)  # [B, 4, 4, 4]
        tokens = patches.flatten(2).transpose(1, 2).to(self.embed.weight.dtype)  # [B, S, 4]
        x = self.prompt(self.embed(tokens) + self.position)  # [B, P + S, D]
        for block in self.blocks:
            x = block(x)
        pooled = self.norm(x).mean(1)  # [B, D]
        return self.head(pooled.to(self.head.weight.dtype))


def freeze(model: DigitTransformer, dtype: torch.dtype) -> None:
    """Turn off every gradient and cast to ``dtype``; the head stays float32, as it is small."""
    model.requires_grad_(False).to(dtype)
    model.head.float()
