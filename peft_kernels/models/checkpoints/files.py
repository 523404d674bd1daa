"""The two files of an adapter: read as a whole before anything is changed, and refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_kernels.core.files import write_pair

SETTINGS = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
# adapters' names, of its two kinds of files
ADAPTERS_TENSORS = "adapter.safetensors"
_PICKLES = ("adapter_model.bin", "pytorch_adapter.bin")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def write(folder: Path, name: str, settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write an adapter's settings and, under ``name``, its tensors.

    Where torch.distributed runs, every process calls it and the first one writes.
    """
    from safetensors.torch import save

    whole = {key: _whole(tensor) for key, tensor in tensors.items()}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_rank() != 0:
            return
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    write_pair(folder, (SETTINGS, text.encode()), (name, save(whole, {"format": "pt"})))


def _whole(tensor: Tensor) -> Tensor:
    """Return a copy of a parameter's values on the CPU, all shards of them."""
    full = getattr(tensor, "full_tensor", None)
    values = tensor if full is None else full()
    # Of a copy each: safetensors refuses two names for one memory.
    return values.detach().to("cpu", copy=True).contiguous()


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the adapter in ``folder``.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is not a JSON object.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {SETTINGS}: it is not the folder of an adapter")
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(settings).__name__}")
    return settings


def read_tensors(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    allowed: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, which must be those that are expected.

    Args:
        path: the file.
        expected: the shape of each tensor, by name.
        allowed: likewise of those that may be there too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a whole safetensors file; missing, surplus or misshapen tensors, or some of
            a type that is not floating-point: all of them are listed.
    """
    from safetensors import SafetensorError, safe_open

    _check_there(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    problems = [f"missing: {name} {list(expected[name])}" for name in expected.keys() - tensors]
    shapes = {**(allowed or {}), **expected}
    for name, tensor in tensors.items():
        if name not in shapes:
            problems.append(f"surplus: {name} {list(tensor.shape)}")
        elif tuple(tensor.shape) != tuple(shapes[name]):
            problems.append(
                f"misshapen: {name} {list(tensor.shape)}, expected {list(shapes[name])}"
            )
        elif tensor.dtype not in _DTYPES:
            problems.append(f"not floating-point: {name} is {tensor.dtype}")
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise ValueError(f"{path} does not fit the model, nothing was changed:\n  {listed}")
    return tensors


def tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors of a safetensors file; raises as ``read_tensors`` does."""
    from safetensors import SafetensorError, safe_open

    _check_there(path)
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _check_there(path: Path) -> None:
    if path.is_file():
        return
    pickles = [name for name in _PICKLES if (path.parent / name).exists()]
    if pickles:
        raise ValueError(
            f"{path.parent} holds its tensors as a pickle, {pickles[0]}, which can run any code "
            f"and is never loaded: load it with the library that wrote it, where you trust it, and "
            f"save it again as safetensors (peft: save_pretrained(folder, "
            f"safe_serialization=True))"
        )
    raise FileNotFoundError(f"{path.parent} holds no {path.name}")


def sharded(value: Tensor) -> bool:
    """Return whether a tensor is a DTensor, which each process holds a part of."""
    return hasattr(value, "device_mesh")


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy values of the file into a parameter; of a sharded one each process takes its part."""
    if sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        to: Any = parameter
        # Nobody sends anything: every process has read the file.
        values = distribute_tensor(
            values.to(to.device), to.device_mesh, to.placements, src_data_rank=None
        )
    parameter.copy_(values)


def option(settings: Mapping[str, Any], name: str, kinds: tuple[type, ...], default: Any) -> Any:
    """Return an entry of the settings, checked for its type; the default where it is null.

    Raises:
        ValueError: a value of another type.
    """
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{SETTINGS}: {name} must be {wanted}, got {value!r}")
    return value
