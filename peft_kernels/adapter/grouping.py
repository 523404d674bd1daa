"""Rows sorted by adapter, as kernels that serve many adapters in one launch take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """Rows sorted by adapter, for E of them in one launch.

    Attributes:
        order: int64 [M], row numbers, those without an adapter first.
        offsets: int64 [E + 2], where in ``order`` the rows without an adapter, those of adapter 0
            and so on start, and the last ones end.
        tiles: int64 [E + 1], the first tile of each of them.
    """

    order: Tensor
    offsets: Tensor
    tiles: Tensor

    @staticmethod
    def of(index: Tensor, adapters: int, block_m: int) -> Grouping:
        """Sort rows by ``index`` [M]; nothing here waits for the device."""
        in_order, order = torch.sort(index, stable=True)
        bounds = torch.arange(-1, adapters + 1, device=index.device)
        offsets = torch.searchsorted(in_order, bounds)
        ends = ((offsets.diff() + (block_m - 1)) // block_m).cumsum(0)
        return Grouping(order, offsets, torch.cat([ends.new_zeros(1), ends[:-1]]))

    @property
    def count(self) -> int:
        """Number of groups, the rows without an adapter included."""
        return self.tiles.shape[0]
