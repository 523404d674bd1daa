"""``adapter_grouped``: many adapters, each on the rows that carry its number, in one launch."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal

import torch
from torch import Tensor

from peft_kernels.adapter import check
from peft_kernels.adapter.activations import check_activation
from peft_kernels.adapter.dispatch import ADAPTER_GROUPED, AdapterSpec
from peft_kernels.adapter.op import call
from peft_kernels.core import backend as backends
from peft_kernels.core import checks


def adapter_grouped(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    index: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str = "relu",
    scale: float = 1.0,
    residual: Tensor | Literal["input"] | None = "input",
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``adapter`` of every row with the parameters that its index names, differentiable.

    Equal, to rounding, to a loop over the E adapters with each on its own rows; rows with index -1
    have no adapter, y is the residual there (0 without one). The rows are sorted by adapter on
    the device, without waiting for it; forward is one launch and backward two, whatever E is. Every
    adapter gets its own gradient, the same bits on every run.

    Args:
        x: activations [..., D], as for ``adapter``.
        down_weight: [E, r, D].
        up_weight: [E, D, r].
        index: int64, on x's device: one number from -1 to E - 1 for each row (the shape of x
            without D, or flat), or for each sample, [B] beside x [B, ..., D]. Checked on CPUs; on a
            GPU, which would have to be waited for, rows with another number are left undefined.
        down_bias: [E, r] or None.
        up_bias: [E, D] or None.
        activation: as for ``adapter``.
        scale: a number, for all adapters.
        residual: "input", a tensor of x's shape, or None, as for ``adapter``.
        dropout_p: drop probability in [0, 1).
        training: dropout is the identity when False.
        seed: as for ``adapter``; one mask for all rows.
        backend: "triton", "cuda", "cpp" or "reference" to demand one; None takes the best.

    Returns:
        y [..., D] in the dtype that is computed in.

    Raises:
        TypeError: an argument is not a dense tensor of the dtype it should have.
        ValueError: shapes that disagree, an index out of range (on CPUs), and as ``adapter``.
        BackendUnavailable: a demanded backend cannot serve this call, with every reason.

    Source: Houlsby et al., *Parameter-Efficient Transfer Learning for NLP*, ICML 2019; in the
    library adapters, rows of several adapters are the composition ``BatchSplit``.

    Example:
        >>> import torch
        >>> from peft_kernels import adapter, adapter_grouped
        >>> x, down, up = torch.randn(4, 32), torch.randn(3, 8, 32), torch.randn(3, 32, 8)
        >>> y = adapter_grouped(x, down, up, torch.tensor([2, -1, 0, 2]))
        >>> torch.equal(y[1], x[1])
        True
        >>> torch.allclose(y[[0, 3]], adapter(x[[0, 3]], down[2], up[2]), atol=1e-5)
        True
    """
    rows, own_residual, factor, probability, dtype = _check(
        x, down_weight, up_weight, index, down_bias, up_bias, activation, scale, residual,
        dropout_p, backend,
    )  # fmt: skip
    return call(
        (x, down_weight, up_weight, down_bias, up_bias, own_residual, factor),
        isinstance(residual, str), activation, probability if training else 0.0, seed, backend,
        rows, dtype,
    )  # fmt: skip


def _check(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    index: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    scale: object,
    residual: Tensor | str | None,
    dropout_p: float,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, float, float, torch.dtype]:
    """Check a call; return the index of every row, the residual of its own, and three numbers."""
    check.check_weights(x, down_weight, up_weight, down_bias, up_bias, grouped=True)
    rows = _by_row(index, x)
    check_activation(activation)
    own_residual = check.check_residual(residual, x)
    if isinstance(scale, Tensor):
        raise TypeError(
            "scale must be one number for all adapters, got a tensor; multiply up_weight and "
            "up_bias by it instead"
        )
    factor = checks.check_scale("scale", scale)
    probability = checks.check_probability("dropout_p", dropout_p)
    backends.check_backend_name(backend)
    dtype = check.check_dtypes(
        x, own_residual, down_weight=down_weight, up_weight=up_weight, down_bias=down_bias,
        up_bias=up_bias,
    )  # fmt: skip
    return rows, own_residual, factor, probability, dtype


def _by_row(index: object, x: Tensor) -> Tensor:
    """Return the index of every row, int64 [M], its numbers not looked at."""
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be an int64 tensor, got {checks.describe(index)}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be an int64 tensor, got {index.dtype}; write index.long()")
    checks.check_same_device({"index": index}, x.device)
    leading = x.shape[:-1]
    by_row = index.shape == leading or index.shape == (math.prod(leading),)
    if not by_row and (not leading or index.shape != leading[:1]):
        raise ValueError(
            f"index must have one number for each row, shape {list(leading)}, or for each sample, "
            f"shape {list(leading[:1])}, got {list(index.shape)}"
        )
    if not by_row:
        index = index.view(-1, *(1 for _ in leading[1:])).expand(leading)
    return index.reshape(-1).contiguous()


def explain_call(*args: Any, **kwargs: Any) -> tuple[backends.Op, AdapterSpec, str | None]:
    """Return what decides the backend of ``adapter_grouped(*args, **kwargs)``, checked alike."""
    bound = inspect.signature(adapter_grouped).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    training = given.pop("training")
    given.pop("seed")
    *_, probability, dtype = _check(**given)
    x, dropout = given["x"], training and probability > 0.0
    _, bottleneck, features = given["down_weight"].shape
    tokens = math.prod(x.shape[:-1])
    spec = AdapterSpec(x.device, dtype, tokens, features, bottleneck, dropout)
    return ADAPTER_GROUPED, spec, given["backend"]


backends.explains(adapter_grouped, explain_call)
