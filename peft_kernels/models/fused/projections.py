"""Layers that read the same x, run as one op: q, k and v of attention, gate and up of an MLP.

Their parent calls them one after another with the same tensor. The first call computes all of them
by ``lora_projections``, and the others find their result waiting. What waits is handed out only for
the very tensor it was made of, unchanged, under the same grad mode and autocast and to a layer in
the same state, until one of the results has been differentiated; a layer that turns out to be
called with something else leaves the group alone from then on. What one thread computed waits for
that thread alone.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.core import checks, projections_tiles
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
    scale: float | Tensor
    dropout_p: float


class _Ready(dict[int, tuple[Tensor, list[Any]]]):
    """Results that wait, by place, each with the state of its layer when it was made."""

    def forget_with(self, node: Any) -> None:
        """Leave nothing here once a node of autograd has run: what it saved is gone by then."""
        held = weakref.ref(self)

        def forget(*_: Any) -> None:
            ready = held()
            if ready is not None:
                ready.clear()

        node.register_prehook(forget)


class _Waiting(threading.local):
    """What the calls of one thread left for its next ones.

    Attributes:
        ready: what waits.
        key: of all of them: x and its version, the modes, and the tensors that they were made of,
            so that none of those can be another one at the same address.
    """

    def __init__(self) -> None:
        """Start empty, in every thread."""
        self.ready = _Ready()
        self.key: tuple[Any, ...] = ()


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
        self._waiting = _Waiting()

    def __getstate__(self) -> dict[str, Any]:
        """Leave what waits behind: a copy computes its own."""
        return {"members": self.members, "active": self.active}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become that copy."""
        self.__dict__.update(state, _waiting=_Waiting())

    def result(self, member: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        """Return y of ``member``, None where it must be computed by itself."""
        if not self.active or args or (kwargs and any(v is not None for v in kwargs.values())):
            return None
        index = self._place(member)
        if index is None:  # A replica of nn.DataParallel shares the group, and is not in it.
            return None
        waiting = self._waiting
        if index in waiting.ready:
            y, state = waiting.ready.pop(index)
            made_of, version, modes = waiting.key[:3]
            if made_of is x:
                same = version == x._version and modes == _modes(x)
                if same and state == member.state():
                    if not waiting.ready:
                        self._forget()
                    return y
            else:
                # Cross-attention: keys and values are of another tensor than queries.
                self.active = False
                self._forget()
                return None
        self._forget()
        if not isinstance(x, Tensor) or not projections_tiles.serves(x.device):
            return None
        if x.is_inference():  # Whether it changed is not counted.
            return None
        return self._compute(index, x)

    def _place(self, member: Any) -> int | None:
        for index, each in enumerate(self.members):
            if each is member:
                return index
        return None

    def _forget(self) -> None:
        self._waiting.ready, self._waiting.key = _Ready(), ()

    def _compute(self, index: int, x: Tensor) -> Tensor | None:
        """Return y of one member and let those of the others wait."""
        given = []
        for member in self.members:
            each = member.projection(x)
            if each is None:
                return None
            given.append(each)
        weights, lora_as, lora_bs, biases, scales, dropout_ps = zip(*given, strict=True)
        if any(dropout_ps):
            tokens = x.numel() // max(1, x.shape[-1])
            size = tokens, x.shape[-1], sum(weight.shape[0] for weight in weights)
            if not projections_tiles.pays_dropped(x.device, x.dtype, *size):
                return None
        ys = lora_projections(
            x, weights, lora_as, lora_bs, biases, scales=scales, dropout_p=dropout_ps
        )
        self._waiting.ready = ready = _Ready()
        for place, (member, y) in enumerate(zip(self.members, ys, strict=True)):
            if place != index:
                ready[place] = (y, member.state())
        self._waiting.key = (x, x._version, _modes(x), given)
        if ys[index].grad_fn is not None:
            ready.forget_with(ys[index].grad_fn)
        return ys[index]


def _modes(x: Tensor) -> tuple[Any, ...]:
    """Return what a result depends on beside tensors: the grad mode, and autocast's dtype."""
    autocast = checks.autocast_enabled(x.device)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else None
    return torch.is_grad_enabled(), dtype


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
