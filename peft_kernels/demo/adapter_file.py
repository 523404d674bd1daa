"""An adapter as a safetensors file: saved, and loaded beside a frozen model."""

from __future__ import annotations

import copy
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save as to_bytes

from peft_kernels.core.files import write_atomically
from peft_kernels.demo import methods
from peft_kernels.demo.methods import Method, Options
from peft_kernels.demo.model import DigitTransformer


def save(path: Path, model: DigitTransformer, method: Method, options: Options) -> None:
    """Write what is trained in ``model``, and nothing of the frozen part.

    Args:
        path: the file.
        model: an adapted model.
        method: how it was adapted; goes into the metadata with ``options``.
        options: likewise.
    """
    metadata = {
        "method": method.name,
        "r": str(options.rank),
        "alpha": str(options.alpha),
        "dropout": str(options.dropout),
    }
    write_atomically(path, to_bytes(methods.trained_tensors(model), metadata))


def load(path: Path, frozen: DigitTransformer, method: Method) -> DigitTransformer:
    """Return a new model: a copy of ``frozen`` with the adapter in ``path`` on fused layers.

    Args:
        path: a file that ``save`` wrote.
        frozen: the model that was adapted, as it was before; stays as it is.
        method: the file's method.

    Raises:
        ValueError: the file is another method's, or its tensors are not those of the method.
    """
    device = frozen.position.device
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if metadata["method"] != method.name:
        raise ValueError(f"{path} holds {metadata['method']}, not {method.name}")
    model = copy.deepcopy(frozen)
    rank, alpha, dropout = int(metadata["r"]), float(metadata["alpha"]), float(metadata["dropout"])
    methods.apply(model, method.apply_fused, Options(rank, alpha, dropout))
    expected = set(methods.trained_tensors(model))
    if set(tensors) != expected:
        odd = sorted(expected.symmetric_difference(tensors))
        raise ValueError(f"{path} does not fit the model: missing or unknown {', '.join(odd)}")
    model.load_state_dict(tensors, strict=False)
    return model
