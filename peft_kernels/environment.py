"""The report of ``python -m peft_kernels env``: what is installed and which backend serves what.

It is what a bug report starts with, so it must come out on a broken machine: nothing is imported
at the top, and every line is looked up on its own, with the error's text in its place where that
fails.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "float64")
PACKAGES = ("torch", "triton", "numpy", "peft", "transformers", "safetensors")
# A typical call: 2048 tokens through a 4096 x 4096 projection.
SIZES = {"tokens": 2048, "in_features": 4096, "out_features": 4096, "rank": 16}


def report() -> dict[str, dict[str, Any]]:
    """Return the report as sections of labelled lines; never raises.

    Returns:
        "versions", "devices", "extension", "cuda library", "environment" and "backends", each a
        dict. A line that could not be found out holds ``"error: ..."``.
    """
    return {
        "versions": _versions(),
        "devices": _section(_devices),
        "extension": _section(_extension),
        "cuda library": _section(_cuda_library),
        "environment": _section(_variables),
        "backends": _section(_backends),
    }


def render(sections: dict[str, dict[str, Any]]) -> str:
    """Return the report as text, nested lines indented below their label."""
    lines: list[str] = []
    for title, entries in sections.items():
        lines += ["", title] if lines else [title]
        lines += _indented(entries, 2) or ["  none"]
    return "\n".join(lines)


def _indented(entries: dict[str, Any], depth: int) -> list[str]:
    lines: list[str] = []
    width = max(
        (len(label) for label, value in entries.items() if not isinstance(value, dict)), default=0
    )
    for label, value in _merged(entries).items():
        if isinstance(value, dict):
            lines += [" " * depth + label, *_indented(value, depth + 2)]
        else:
            text = str(value).replace("\n", "\n" + " " * (depth + width + 2))
            lines.append(f"{'':{depth}}{label:<{width}}  {text}")
    return lines


def _merged(entries: dict[str, Any]) -> dict[str, Any]:
    """Put neighbours that say the same under one label: "float32, bfloat16"."""
    merged: dict[str, Any] = {}
    previous: str | None = None
    for label, value in entries.items():
        if previous is not None and isinstance(value, dict) and merged[previous] == value:
            del merged[previous]
            label = f"{previous}, {label}"
        merged[label] = value
        previous = label
    return merged


def _guarded(find: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Broken installs raise whatever they like, SystemExit included; only Ctrl-C is the user's own.
    try:
        return find(*args, **kwargs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"error: {type(error).__name__}: {error}"


def _section(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    found = _guarded(find)
    return found if isinstance(found, dict) else {"failed": found}


def _versions() -> dict[str, Any]:
    found = {
        "peft_kernels": _guarded(_package_version),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": _guarded(lambda: f"{platform.platform()}, {' '.join(platform.libc_ver())}"),
    }
    return found | {name: _guarded(_installed, name) for name in PACKAGES}


def _package_version() -> str:
    from peft_kernels.version import __version__

    return f"{__version__} ({os.path.dirname(os.path.abspath(__file__))})"


def _installed(name: str) -> str:
    """Return a package's version, and whether torch and triton, which all else needs, import."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    if name not in ("torch", "triton"):
        return version
    module = _guarded(lambda: importlib.import_module(name))
    if isinstance(module, str):
        return f"{version}, fails to import ({module})"
    if name == "torch":
        version = module.__version__
        built_for = f"CUDA {module.version.cuda}" if module.version.cuda else "CPU only"
        return f"{version} ({built_for})"
    return version


def _devices() -> dict[str, Any]:
    return {
        "cpu": _guarded(_cpu),
        "driver": _guarded(_driver),
        **_section(_gpus),
    }


def _cpu() -> str:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
        model = names[0] if names else model
    threads = _guarded(lambda: importlib.import_module("torch").get_num_threads())
    return f"{model}, {os.cpu_count()} logical cores, torch threads: {threads}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return "no nvidia-smi"
    if done.returncode:
        return f"nvidia-smi: {(done.stdout + done.stderr).strip()}"
    return ", ".join(sorted(set(done.stdout.split())))


def _gpus() -> dict[str, Any]:
    cuda = importlib.import_module("torch").cuda
    if not cuda.is_available():
        return {"gpu": "none that torch can use"}
    return {f"cuda:{index}": _guarded(_gpu, cuda, index) for index in range(cuda.device_count())}


def _gpu(cuda: Any, index: int) -> str:
    properties = cuda.get_device_properties(index)
    return (
        f"{properties.name}, capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.1f} GiB, "
        f"{properties.multi_processor_count} multiprocessors"
    )


def _extension() -> dict[str, Any]:
    extension = importlib.import_module("peft_kernels.core.extension")
    return _library(extension.why_not, extension.build_info)


def _cuda_library() -> dict[str, Any]:
    library = importlib.import_module("peft_kernels.core.cuda_library")
    return _library(library.why_not_loaded, library.build_info)


def _library(why_not: Callable[[], str | None], build_info: Callable[[], Any]) -> dict[str, Any]:
    reason, info = _guarded(why_not), _guarded(build_info)
    return {
        "loads": "yes" if reason is None else f"no: {reason}",
        **(info if isinstance(info, dict) else {"built with": info or "nothing"}),
    }


def _variables() -> dict[str, str]:
    names = sorted(
        name
        for name in os.environ
        if name.startswith(("PEFT_KERNELS_", "TRITON_")) or name in ("CUDA_VISIBLE_DEVICES",)
    )
    return {name: os.environ[name] for name in names}


def _backends() -> dict[str, Any]:
    cuda = importlib.import_module("torch").cuda
    gpus = _guarded(lambda: cuda.device_count() if cuda.is_available() else 0)
    devices = ["cpu", *(f"cuda:{index}" for index in range(gpus if isinstance(gpus, int) else 0))]
    return {
        f"{op} on {device}": {
            dtype: _section(partial(_served, op, device, dtype)) for dtype in DTYPES
        }
        for op in EXPLAINED
        for device in devices
    }


def _served(op: str, device: str, dtype: str) -> dict[str, str]:
    explanation = EXPLAINED[op](device=device, dtype=dtype, **SIZES)
    runs_on = explanation.backend or "nothing: the demanded backend cannot serve this"
    return {
        "runs on": runs_on + (f" ({explanation.plan})" if explanation.plan else ""),
        **{f"not {name}": reason for name, reason in explanation.reasons.items()},
    }


def explain_lora_linear(
    *,
    device: str,
    dtype: str,
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Any:
    """Return the Explanation of ``lora_linear`` for these sizes, without allocating them."""
    import torch

    from peft_kernels import explain, lora_linear

    def shaped(*shape: int) -> torch.Tensor:
        return torch.empty((), device=device, dtype=getattr(torch, dtype)).expand(shape)

    return explain(
        lora_linear,
        shaped(tokens, in_features),
        shaped(out_features, in_features),
        shaped(rank, in_features),
        shaped(out_features, rank),
        dropout_p=dropout,
        backend=backend,
    )


def explain_prompt_embedding(
    *,
    device: str,
    dtype: str,
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Any:
    """Return the Explanation of ``prompt_embedding``, without allocating anything.

    ``rank`` virtual tokens before one row of ``tokens`` ids, a table [out_features, in_features].
    """
    import torch

    from peft_kernels import explain, prompt_embedding

    if dropout:
        raise ValueError(f"prompt_embedding has no dropout, got {dropout}")
    values = torch.empty((), device=device, dtype=getattr(torch, dtype))
    return explain(
        prompt_embedding,
        torch.empty((), device=device, dtype=torch.int64).expand(1, tokens),
        values.expand(out_features, in_features),
        values.expand(rank, in_features),
        backend=backend,
    )


def explain_adapter(
    *,
    device: str,
    dtype: str,
    tokens: int,
    in_features: int,
    rank: int,
    dropout: float = 0.0,
    backend: str | None = None,
    **_: int,
) -> Any:
    """Return the Explanation of ``adapter`` for these sizes, without allocating them.

    D is ``in_features`` and the bottleneck is ``rank``; other sizes mean nothing to an adapter.
    """
    import torch

    from peft_kernels import adapter, explain

    def shaped(*shape: int) -> torch.Tensor:
        return torch.empty((), device=device, dtype=getattr(torch, dtype)).expand(shape)

    return explain(
        adapter,
        shaped(tokens, in_features),
        shaped(rank, in_features),
        shaped(in_features, rank),
        dropout_p=dropout,
        backend=backend,
    )


def explain_prefix_attention(
    *,
    device: str,
    dtype: str,
    tokens: int,
    in_features: int,
    rank: int,
    dropout: float = 0.0,
    backend: str | None = None,
    **_: int,
) -> Any:
    """Return the Explanation of ``prefix_attention`` for these sizes, without allocating them.

    Causal attention of ``tokens`` queries and keys after ``rank`` virtual tokens, with heads of 128
    features (64 below 2048) that make up ``in_features``; another size means nothing to it.
    """
    import torch

    from peft_kernels import explain, prefix_attention

    size = min(in_features, 64 if in_features < 2048 else 128)
    heads = max(1, in_features // size)
    values = torch.empty((), device=device, dtype=getattr(torch, dtype))
    sequence, prefix = values.expand(1, heads, tokens, size), values.expand(heads, rank, size)
    return explain(
        prefix_attention, sequence, sequence, sequence, prefix, prefix, causal=True,
        dropout_p=dropout, backend=backend,
    )  # fmt: skip


# A method that joins the package adds its line here, for `env` and `explain` both.
EXPLAINED: dict[str, Callable[..., Any]] = {
    "adapter": explain_adapter,
    "lora_linear": explain_lora_linear,
    "prefix_attention": explain_prefix_attention,
    "prompt_embedding": explain_prompt_embedding,
}
