"""Random adapter problems, and what float64 and eager PyTorch make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import adapter
from peft_kernels.core import rng
from tests.numerics import assert_as_accurate_as_eager, eager_forms

OTHER_ORDERS = 4  # in which eager PyTorch adds, when it is the measure
# Written with torch's own functions, so that autograd has its derivatives.
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "mish": F.mish,
    "identity": lambda x: x,
}
RESIDUALS = ("input", "own", None)
SCALES = ("number", "learned", "channel")


@dataclass(frozen=True)
class Problem:
    """Tensors of one call, in the dtype they are given in, by the names of the arguments."""

    tensors: dict[str, Tensor]
    dy: Tensor
    activation: str
    scale: float
    input_residual: bool
    dropout_p: float
    seed: Tensor

    @property
    def x(self) -> Tensor:
        return self.tensors["x"]

    def inputs(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return fresh leaves of the differentiable inputs, in ``dtype`` where it is given."""
        # detach() keeps strides, which clone() would not for every layout.
        return {
            name: (t if dtype is None else t.to(dtype)).detach().requires_grad_()
            for name, t in self.tensors.items()
        }


def problem(
    tokens: int | tuple[int, ...],
    features: int,
    bottleneck: int,
    *,
    activation: str = "gelu",
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    bias: bool = True,
    scale: str = "number",
    residual: str | None = "input",
    seed: int = 0,
) -> Problem:
    """Return a random problem whose results are of order one."""
    generator = torch.Generator().manual_seed(seed)
    leading = (tokens,) if isinstance(tokens, int) else tokens
    small = parameter_dtype or dtype

    def normal(*size: int, kind: torch.dtype = small, fan: int = 1) -> Tensor:
        return (torch.randn(size, generator=generator) / fan**0.5).to(kind)

    tensors = {
        "x": normal(*leading, features, kind=dtype),
        "down_weight": normal(bottleneck, features, fan=features) * 1.5,
        "up_weight": normal(features, bottleneck, fan=bottleneck),
    }
    if bias:
        tensors |= {"down_bias": normal(bottleneck), "up_bias": normal(features)}
    if residual == "own":
        tensors["residual"] = normal(*leading, features, kind=dtype)
    if scale != "number":
        tensors["scale"] = 1.0 + normal(*(() if scale == "learned" else (features,)), fan=4)
    return Problem(
        tensors=tensors,
        dy=normal(*leading, features, kind=dtype),
        activation=activation,
        scale=1.5,
        input_residual=residual == "input",
        dropout_p=dropout_p,
        seed=torch.randint(-(2**62), 2**62, (1,), generator=generator),
    )


def mask_of(given: Problem) -> Tensor:
    features = given.x.shape[-1]
    tokens = given.x.numel() // features
    return rng.dropout_mask(given.seed, tokens, features, given.dropout_p).view(given.x.shape)


def eager(given: Problem, inputs: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """Return y as one writes it in PyTorch, under the mask of the seed, or another."""
    x = inputs["x"]
    hidden = F.linear(x, inputs["down_weight"], inputs.get("down_bias"))
    hidden = ACTIVATIONS[given.activation](hidden)
    branch = F.linear(hidden, inputs["up_weight"], inputs.get("up_bias"))
    if given.dropout_p:
        branch = branch * (mask_of(given) if mask is None else mask) / (1.0 - given.dropout_p)
    branch = branch * inputs.get("scale", given.scale)
    residual = x if given.input_residual else inputs.get("residual")
    return branch if residual is None else residual + branch


def fused(given: Problem, inputs: dict[str, Tensor], backend: str | None) -> Tensor:
    """Return y of the package."""
    tensors = {"scale": given.scale, "residual": "input" if given.input_residual else None}
    return adapter(
        **(tensors | inputs),  # type: ignore[arg-type]
        activation=given.activation,
        dropout_p=given.dropout_p,
        seed=given.seed if given.dropout_p else None,
        backend=backend,
    )


def results(y: Tensor, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Return y and every gradient by name."""
    gradients = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype))
    named = dict(zip((f"d {name}" for name in inputs), gradients, strict=True))
    return {"y": y.detach()} | named


def eager_in_another_order(given: Problem, dtype: torch.dtype, order: int) -> dict[str, Tensor]:
    """Return y and every gradient of eager PyTorch, all sums added in an order drawn from a seed.

    Tokens, features and bottleneck are permuted before, and the results permuted back; y, dx and
    the gradient of the residual have one row for each token.
    """
    generator = torch.Generator().manual_seed(order)

    def permutation(size: int) -> Tensor:
        return torch.randperm(size, generator=generator).to(given.x.device)

    x = given.x.flatten(0, -2)
    tokens, features = permutation(x.shape[0]), permutation(x.shape[1])
    inner = permutation(given.tensors["down_weight"].shape[0])
    places = {
        "x": (tokens, features),
        "residual": (tokens, features),
        "down_weight": (inner, features),
        "up_weight": (features, inner),
        "down_bias": (inner,),
        "up_bias": (features,),
        "scale": (features,) if "scale" in given.tensors and given.tensors["scale"].dim() else (),
    }

    def permuted(value: Tensor, place: tuple[Tensor, ...], back: bool = False) -> Tensor:
        for dim, order in enumerate(place):
            value = value.index_select(dim, order.argsort() if back else order)
        return value

    def flat(value: Tensor) -> Tensor:
        return value.flatten(0, -2) if value.dim() > 2 else value

    other = replace(
        given,
        tensors={name: permuted(flat(t), places[name]) for name, t in given.tensors.items()},
        dy=permuted(flat(given.dy), places["x"]),
    )
    mask = permuted(flat(mask_of(given)), places["x"]) if given.dropout_p else None
    inputs = other.inputs(dtype)
    found = results(eager(other, inputs, mask), inputs, other.dy)
    return {
        name: permuted(value, places["x" if name == "y" else name.removeprefix("d ")], back=True)
        for name, value in found.items()
    }


def check(given: Problem, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Judge y and every gradient of a backend by the 1.5x rule; return them."""
    own = given.inputs()
    actual = results(fused(given, own, backend), own, given.dy)
    judge(given, actual, dtype)
    return actual


def judge(given: Problem, actual: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Judge y and gradients, named as in ``results``, by the 1.5x rule."""
    wide = given.inputs(torch.float64)
    exact = results(eager(given, wide), wide, given.dy)
    narrow = given.inputs(dtype)
    device = given.dy.device
    same_dtype = eager_forms(lambda: results(eager(given, narrow), narrow, given.dy), device)
    same_dtype += [eager_in_another_order(given, dtype, order) for order in range(OTHER_ORDERS)]
    if "scale" in given.tensors and not given.tensors["scale"].dim():
        same_dtype += _spread_of_a_learned_scale(given, dtype, same_dtype[0], exact["d scale"])
    for name, value in actual.items():
        judged = [each[name].view(value.shape) for each in same_dtype]
        assert_as_accurate_as_eager(name, value, judged, exact[name], dtype)


def _spread_of_a_learned_scale(
    given: Problem, dtype: torch.dtype, like: dict[str, Tensor], exact: Tensor
) -> list[dict[str, Tensor]]:
    """Return eager's results with the gradient of the scale as wrong as one expects it to be.

    The gradient is one number, a sum over the features: a single draw of its error may be next to
    nothing. The size that it has over draws is the root of the features' squared errors.
    """
    features = given.x.shape[-1]
    channel = given.tensors["scale"].expand(features)
    by_channel = replace(given, tensors=given.tensors | {"scale": channel})
    found = []
    for kind in (torch.float64, dtype):
        inputs = by_channel.inputs(kind)
        inputs["scale"] = inputs["scale"].detach().clone().requires_grad_()
        found.append(results(eager(by_channel, inputs), inputs, given.dy)["d scale"].double())
    return [like | {"d scale": exact + (found[0] - found[1]).norm()}]
