"""``VirtualTokens``: the parameters behind a prefix, and how it is made of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PREFIX_STD = 0.02


class VirtualTokens(nn.Module):
    """A trained prefix of keys and values for one attention layer, no forward of its own.

    Args:
        width: E, of the rows that the MLP is given.
        num_heads: Hq.
        num_kv_heads: Hkv, a divisor of Hq.
        head_dim: d.
        num_virtual_tokens: P, may be 0.
        gated: whether the prefix has a softmax of its own and a gate for each head, from 0.
        prefix_projection: train the prefix through an MLP (Linear, Tanh, Linear) on [P, E].
        projection_hidden: the MLP's hidden size; None takes E.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Attributes:
        prefix_key: [Hkv, P, d], or None where there is a projection.
        prefix_value: likewise.
        prefix: [P, E], the rows that the MLP is given, or None.
        projection: the MLP, or None.
        gate: [Hq], or None.

    Raises:
        ValueError: sizes below 1 (``num_virtual_tokens``: 0), or one of an MLP that there is not.
    """

    prefix_key: nn.Parameter | None
    prefix_value: nn.Parameter | None
    prefix: nn.Parameter | None
    gate: nn.Parameter | None
    projection: nn.Sequential | None

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_virtual_tokens: int,
        gated: bool = False,
        prefix_projection: bool = False,
        projection_hidden: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters, freshly initialised."""
        super().__init__()
        self._make_virtual_tokens(
            width, num_heads, num_kv_heads, head_dim, num_virtual_tokens, gated, prefix_projection,
            projection_hidden, device, dtype,
        )  # fmt: skip
        self.reset_parameters()

    def _make_virtual_tokens(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_virtual_tokens: int,
        gated: bool,
        prefix_projection: bool,
        projection_hidden: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Register the parameters, without values yet."""
        check_count("num_virtual_tokens", num_virtual_tokens, least=0)
        if projection_hidden is not None and not prefix_projection:
            raise ValueError(
                f"projection_hidden is the size of the MLP behind the prefix, got "
                f"{projection_hidden!r} without prefix_projection=True"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.num_virtual_tokens = num_virtual_tokens

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        for name in ("prefix_key", "prefix_value"):
            shape = (num_kv_heads, num_virtual_tokens, head_dim)
            self.register_parameter(name, parameter(not prefix_projection, *shape))
        self.register_parameter("prefix", parameter(prefix_projection, num_virtual_tokens, width))
        self.register_parameter("gate", parameter(gated, num_heads))
        self.projection = None
        if prefix_projection:
            hidden = width if projection_hidden is None else projection_hidden
            check_count("projection_hidden", hidden, least=1)
            self.projection = nn.Sequential(
                nn.Linear(width, hidden, device=device, dtype=dtype),
                nn.Tanh(),
                nn.Linear(hidden, 2 * num_kv_heads * head_dim, device=device, dtype=dtype),
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise what is trained: N(0, 0.02), as BERT's embeddings; a gate by zeros."""
        for each in (self.prefix_key, self.prefix_value, self.prefix):
            if each is not None:
                nn.init.normal_(each, std=PREFIX_STD)
        for module in self.projection or ():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def virtual_tokens(self) -> tuple[Tensor, Tensor]:
        """Return the prefix of keys and of values, [Hkv, P, d] each, from the MLP if there is one.

        Of the MLP's outputs the first half are the keys, one head after the other.
        """
        if self.projection is None or self.prefix is None:
            assert self.prefix_key is not None and self.prefix_value is not None
            return self.prefix_key, self.prefix_value
        both = self.projection(self.prefix).unflatten(-1, (2, self.num_kv_heads, self.head_dim))
        prefix_key, prefix_value = both.permute(1, 2, 0, 3)  # [2, Hkv, P, d]
        return prefix_key, prefix_value

    @torch.no_grad()
    def fold(self) -> None:
        """Replace the MLP by the prefix that it gives, which is trained on from there.

        An optimizer that was made before holds the parameters that are gone: make a new one.

        Raises:
            RuntimeError: there is no MLP.
        """
        if self.projection is None:
            raise RuntimeError(f"this {type(self).__name__} has no projection (left) to fold")
        prefix_key, prefix_value = self.virtual_tokens()
        self.prefix_key = nn.Parameter(prefix_key.contiguous())
        self.prefix_value = nn.Parameter(prefix_value.contiguous())
        self.prefix = self.projection = None

    def extra_repr(self) -> str:
        """Return what ``print(layer)`` shows."""
        text = f"num_heads={self.num_heads}, num_virtual_tokens={self.num_virtual_tokens}"
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        text += ", gated=True" if self.gate is not None else ""
        return text + (", prefix_projection=True" if self.projection is not None else "")


def check_count(name: str, value: object, *, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
