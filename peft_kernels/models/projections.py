"""Layers that read the same x, run as one op: q, k and v of attention, gate and up of an MLP.

Their parent calls them one after another with the same tensor. The first call computes all of them
by ``lora_projections``, and the others find their result waiting. What waits is handed out only for
the very tensor it was made of, unchanged, under the same grad mode and with the same factors; a
layer that turns out to be called with something else leaves the group alone from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.lora.projections import lora_projections

# Under this name a layer knows its group: no submodule, no entry of the state dict.
GROUP = "_peft_kernels_projections"
# How models call layers of one x.
NAMES = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, OPT, CLIP
    ("query", "key", "value"),  # BERT, ViT
    ("q", "k", "v"),  # T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("to_q", "to_k", "to_v"),  # diffusers
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),  # Llama, Qwen, Mistral, Gemma
    ("wi_0", "wi_1"),  # T5 v1.1
    ("w1", "w3"),  # Mixtral
)


class Projection(NamedTuple):
    """What ``lora_linear`` is given beside x."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scale: float
    dropout_p: float


class Projections:
    """A group of accelerated layers of one parent.

    Attributes:
        members: the layers, in the order of the parent's calls.
        active: whether they were called with the same x so far.
    """

    def __init__(self, members: list[Any]) -> None:
        """Take the layers in."""
        self.members = members
        self.active = True
        self._ready: dict[int, Tensor] = {}
        self._key: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Leave what waits behind: a copy computes its own."""
        return self.__dict__ | {"_ready": {}, "_key": ()}

    def result(self, member: nn.Module, x: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        """Return y of ``member``, None where it must be computed by itself."""
        if not self.active or args or any(value is not None for value in kwargs.values()):
            return None
        # A replica of nn.DataParallel shares the group, and is not in it.
        index = next((i for i, each in enumerate(self.members) if each is member), None)
        if index is None or not isinstance(x, Tensor):
            return None
        key = (x._version, torch.is_grad_enabled(), member.training, *self._versions())
        if index in self._ready:
            if self._key[0] is x and self._key[1:] == key:
                return self._take(index)
            # Cross-attention: keys and values are of another tensor than queries.
            self.active = self._key[0] is x
            self._forget()
            if not self.active:
                return None
        self._forget()
        ys = self._compute(x)
        if ys is None:
            return None
        self._ready, self._key = dict(enumerate(ys)), (x, *key)
        return self._take(index)

    def _take(self, index: int) -> Tensor:
        y = self._ready.pop(index)
        if not self._ready:
            self._forget()
        return y

    def _forget(self) -> None:
        self._ready, self._key = {}, ()

    def _versions(self) -> Iterator[int]:
        for member in self.members:
            for factor in (*member.lora_A.parameters(), *member.lora_B.parameters()):
                yield factor._version

    def _compute(self, x: Tensor) -> tuple[Tensor, ...] | None:
        given = [member.projection(x) for member in self.members]
        if any(each is None for each in given):
            return None
        weights, lora_as, lora_bs, biases, scales, dropout_ps = zip(*given, strict=True)
        return lora_projections(
            x, weights, lora_as, lora_bs, biases, scales=scales, dropout_p=dropout_ps
        )


def group(model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, ...]]:
    """Make groups of the layers of class ``kind`` and return the full names of each group's."""
    found = []
    for parent_name, parent in model.named_modules():
        for names in NAMES:
            members: list[Any] = [getattr(parent, name, None) for name in names]
            if any(type(each) is not kind for each in members):
                continue
            if len({each.in_features for each in members}) > 1 or len(set(members)) < len(members):
                continue
            held = members[0].__dict__.get(GROUP)
            if held is None or held.members != members:
                held = Projections(members)
            for each in members:
                each.__dict__[GROUP] = held
            found.append(tuple(f"{parent_name}.{name}".lstrip(".") for name in names))
    return found


def ungroup(model: nn.Module) -> None:
    """Let every layer compute by itself again."""
    for module in model.modules():
        module.__dict__.pop(GROUP, None)
