"""The bottleneck of ``adapters``, ``adapters.methods.modeling.Adapter``; read in 1.3.0.

``Adapter(adapter_name, input_size, down_sample, config)`` is called as ``(x, residual_input)`` and
returns the output first. adapters needs an older transformers than peft, and so an environment of
its own (``make test-adapters``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.method import Forward
from bench.third_party import ADAPTERS, give

if TYPE_CHECKING:
    from bench.adapter.cases import AdapterProblem


class Masked(nn.Module):
    """Dropout by a given mask."""

    def __init__(self, p: float, keep: Tensor) -> None:
        super().__init__()
        self.p, self.keep = p, keep

    def forward(self, x: Tensor) -> Tensor:
        """Return what is kept of x, scaled."""
        return x * self.keep / (1.0 - self.p)


def _build(problem: AdapterProblem, keep: Tensor | None) -> Forward:
    from adapters import BnConfig

    case = problem.case
    x, down, up, down_bias, up_bias = problem.tensors
    config = BnConfig(
        mh_adapter=False, output_adapter=True, reduction_factor=case.features / case.bottleneck,
        non_linearity=case.activation, scaling=problem.scale, dropout=case.dropout_p,
    )  # fmt: skip
    with torch.device("meta"):
        module = ADAPTERS.load().Adapter("bench", case.features, case.bottleneck, config)
    give(module.adapter_down[0], weight=down, bias=down_bias)
    give(module.adapter_up, weight=up, bias=up_bias)
    if keep is not None:
        module.dropout = Masked(case.dropout_p, keep)
    return lambda: module(x, x)[0]


ADAPTER = ADAPTERS.provider(_build)
