"""Other packages that compute what the benchmarks measure: one module per peer.

Each module names its ``Peer`` and gives a ``Provider``. Like every provider it must pass the
numerics gate before it is timed. Nothing of a peer is imported before its provider is asked for;
a peer that is absent has no rows, and is listed as absent. README.md says how to install each and
which version its calls were read from.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.method import Forward, Provider


@dataclass(frozen=True)
class Peer:
    """A package that may be installed.

    Attributes:
        name: what tables show.
        module: what is imported for its provider.
        distribution: what its version is asked of.
        needs_cuda: has no kernels for a CPU.
    """

    name: str
    module: str
    distribution: str
    needs_cuda: bool = False

    @property
    def installed(self) -> bool:
        """Whether there is such a package; it is not imported for that."""
        package = self.module.split(".")[0]
        if package in sys.modules:
            return sys.modules[package] is not None
        return importlib.util.find_spec(package) is not None

    @property
    def version(self) -> str | None:
        """Return its version, "unknown" of a bare checkout, None if it is absent."""
        if not self.installed:
            return None
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def load(self) -> Any:
        """Import and return its module."""
        return importlib.import_module(self.module)

    def why_not(self, device: torch.device) -> str | None:
        """Return why nothing of it can run on ``device``, or None."""
        if not self.installed:
            return f"{self.name} is not installed"
        if self.needs_cuda and device.type != "cuda":
            return "needs CUDA"
        try:
            self.load()
        except Exception as error:  # a peer may want other versions of torch, Triton, anything
            reason = str(error).partition("\n")[0][:120]
            return f"{self.name} cannot be imported: {type(error).__name__}: {reason}"
        return None

    def provider(
        self,
        build: Callable[[Any, Tensor | None], Forward],
        unsuited: Callable[[Any], str | None] = lambda problem: None,
        *,
        poison: bool = True,
    ) -> Provider:
        """Return its provider; ``unsuited`` says why a problem is not for it, or None."""

        def why_not(problem: Any) -> str | None:
            return self.why_not(problem.dy.device) or unsuited(problem)

        return Provider(self.name, build, why_not, poison=poison)


PEFT = Peer("peft", "peft.tuners.lora", "peft")
AXOLOTL = Peer("axolotl", "axolotl.kernels.lora", "axolotl")
NEMO = Peer("nemo_automodel", "nemo_automodel.components._peft.lora", "nemo_automodel", True)
LORAFUSION = Peer("LoRAFusion", "lorafusion.ops.lora_v1", "lorafusion", True)
FLASH_ATTN = Peer("flash-attn", "flash_attn", "flash-attn", True)
FLASH_ATTN_3 = Peer("flash-attn 3", "flash_attn_interface", "flash-attn-3", True)
FLEX = Peer("FlexAttention", "torch.nn.attention.flex_attention", "torch", True)
XFORMERS = Peer("xFormers", "xformers.ops.fmha.merge_training", "xformers", True)
ADAPTERS = Peer("adapters", "adapters.methods.modeling", "adapters")
PEERS = (
    PEFT, AXOLOTL, NEMO, LORAFUSION, FLASH_ATTN, FLASH_ATTN_3, FLEX, XFORMERS, ADAPTERS,
)  # fmt: skip


def present() -> dict[str, str | None]:
    """Return every peer's version, None of an absent one."""
    return {each.name: each.version for each in PEERS}


def listed() -> str:
    """Return which peers are here and which are absent, in a line."""
    found = present()
    here = [f"{name} {version}" for name, version in found.items() if version is not None]
    absent = [name for name, version in found.items() if version is None]
    line = f"third parties: {', '.join(here) or 'none'}"
    return f"{line}; absent: {', '.join(absent)}" if absent else line


def usable(*providers: Provider) -> tuple[Provider, ...]:
    """Return those providers whose peers this machine can run: the others would fill no row."""
    peers = {each.name: each for each in PEERS}
    has_gpu = torch.cuda.is_available()
    return tuple(
        each
        for each in providers
        if peers[each.name].installed and (has_gpu or not peers[each.name].needs_cuda)
    )


def give(module: nn.Module, **tensors: Tensor | None) -> None:
    """Set parameters of ``module`` to these very tensors, so that gradients flow to them."""
    for name, tensor in tensors.items():
        delattr(module, name)
        setattr(module, name, tensor)
