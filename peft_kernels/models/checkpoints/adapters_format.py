"""Bottlenecks in adapters' words: where they are in a model, and what their options are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from peft_kernels.models.checkpoints import files

# Of the plain model: what is adapted, the part of it that is on loading, adapters' layer, its
# switch. BERT's layers adapt what their dropout returns, a Llama's what attention and MLP do.
_PLACES = (
    (r"(?P<layer>(?:.*\.)?layer\.(?P<index>\d+)\.attention\.output)\.(?:dense|dropout)",
     "dropout", "{}", "mh_adapter"),
    (r"(?P<layer>(?:.*\.)?layer\.(?P<index>\d+)\.output)\.(?:dense|dropout)",
     "dropout", "{}", "output_adapter"),
    (r"(?P<layer>(?:.*\.)?layers\.(?P<index>\d+))\.self_attn(?:\.o_proj)?",
     "self_attn.o_proj", "{}.attention_adapters", "mh_adapter"),
    (r"(?P<layer>(?:.*\.)?layers\.(?P<index>\d+))\.mlp(?:\.down_proj)?",
     "mlp.down_proj", "{}.output_adapters", "output_adapter"),
)  # fmt: skip
ACTIVATIONS = {
    "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "identity": "linear",
    "leaky_relu": "leakyrelu", "mish": "mish", "quick_gelu": "quick_gelu", "relu": "relu",
    "relu6": "relu6", "sigmoid": "sigmoid", "silu": "swish", "tanh": "tanh",
}  # fmt: skip
OF_ADAPTERS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
    "gelu_fast": "gelu_tanh", "gelu_new": "gelu_tanh", "leaky_relu": "leaky_relu", "silu": "silu",
}  # fmt: skip

# What an AdaptedModule is, in adapters' words; other values are refused.
FIXED: dict[str, Any] = {
    "cross_adapter": False, "inv_adapter": None, "is_parallel": False, "original_ln_after": True,
    "original_ln_before": False, "phm_layer": False, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip


class Place(NamedTuple):
    """Where adapters keeps a bottleneck: key, number of the layer, switch, what is wrapped."""

    key: str
    number: str
    switch: str
    wrapped: str


def place_of(name: str) -> Place | None:
    """Return the place of an adapter on the module of this name in the plain model."""
    for pattern, wrapped, key, switch in _PLACES:
        found = re.fullmatch(pattern, name)
        if found is not None:
            layer = found["layer"]
            return Place(key.format(layer), found["index"], switch, f"{layer}.{wrapped}")
    return None


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of adapters' settings, as far as an ``AdaptedModule`` has them.

    Raises:
        ValueError: others, all listed.
    """
    given = files.option(settings, "config", (dict,), {})
    odd = {k: given.get(k, v) for k, v in FIXED.items() if given.get(k, v) != v}
    if given.get("architecture") is not None:
        odd["architecture"] = given["architecture"]
    if given.get("non_linearity") not in OF_ADAPTERS:
        odd["non_linearity"] = given.get("non_linearity")
    if given.get("residual_before_ln") not in (True, False):
        odd["residual_before_ln"] = given.get("residual_before_ln")
    if given.get("ln_after") and not given.get("adapter_residual_before_ln"):
        odd["adapter_residual_before_ln"] = given.get("adapter_residual_before_ln")
    if not isinstance(given.get("reduction_factor"), (int, float)):
        odd["reduction_factor"] = given.get("reduction_factor")
    if not str(settings.get("version", "")).startswith("adapters."):
        odd["version"] = settings.get("version")
    if odd:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(odd.items()))
        raise ValueError(
            f"{files.SETTINGS}: an AdaptedModule has no {listed}; load the adapter with adapters "
            f"and call peft_kernels.accelerate on the model"
        )
    return {
        "dropout": files.option(given, "dropout", (int, float), 0.0),
        "leave_out": files.option(given, "leave_out", (list,), []),
        "ln_after": files.option(given, "ln_after", (bool,), False),
        "ln_before": files.option(given, "ln_before", (bool,), False),
        "mh_adapter": files.option(given, "mh_adapter", (bool,), False),
        "non_linearity": given["non_linearity"],
        "output_adapter": files.option(given, "output_adapter", (bool,), False),
        "reduction_factor": given["reduction_factor"],
        "scaling": files.option(given, "scaling", (int, float, str), 1.0),
    }
