"""Pre-training, scoring, and adapting two models in lockstep."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peft_kernels.demo import measure
from peft_kernels.demo.data import Digits

BATCH_SIZE = 32
_PRETRAIN_RATE = 2e-3
_ADAPT_RATE = 3e-3

# Called with the number of steps done since the last call.
Tick = Callable[[int], object]


@dataclass
class Course:
    """What one model went through: its loss and time at every step, and what a step stores."""

    saved_bytes: int
    losses: list[float] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)


class Optimiser:
    """AdamW on what is trained, its rate rising over the first fifth of the steps, then falling."""

    def __init__(self, model: nn.Module, rate: float, steps: int) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._adamw = torch.optim.AdamW(trained, lr=rate)
        rise = max(1, steps // 5)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adamw, lambda step: min((step + 1) / rise, (steps - step) / (steps - rise + 1))
        )

    def step(self, loss: Tensor) -> None:
        """Move the parameters against the gradient of ``loss``."""
        self._adamw.zero_grad()
        loss.backward()
        self._adamw.step()
        self._schedule.step()


def pretrain(model: nn.Module, digits: Digits, steps: int, seed: int, tick: Tick) -> None:
    """Train all of ``model`` on ``digits``, in place."""
    optimiser = Optimiser(model, _PRETRAIN_RATE, steps)
    model.train()
    for images, labels in digits.batches(BATCH_SIZE, steps, seed):
        _step(model, optimiser, images, labels)
        tick(1)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of held-out images that ``model`` reads right."""
    model.eval()
    read = model(digits.test_images).argmax(-1)
    return (read == digits.test_labels).float().mean().item()


def adapt(
    eager: nn.Module, fused: nn.Module, digits: Digits, steps: int, seed: int, tick: Tick
) -> tuple[Course, Course]:
    """Train both models on the same batches, in place.

    They take turns at every step, and in turning order, so that whatever else the machine does
    meets both alike.

    Args:
        eager: the one model; what does not require gradients stays frozen.
        fused: the other.
        digits: what to train on.
        steps: number of batches.
        seed: decides the batches.
        tick: is told of every batch.

    Returns:
        The course of each.
    """
    device = digits.train_labels.device
    models = (eager.train(), fused.train())
    optimisers = [Optimiser(model, _ADAPT_RATE, steps) for model in models]
    sample = next(digits.batches(BATCH_SIZE, 1, seed))
    courses = [Course(_saved_bytes(model, *sample)) for model in models]
    for index, batch in enumerate(digits.batches(BATCH_SIZE, steps, seed)):
        for side in (0, 1) if index % 2 == 0 else (1, 0):
            step = functools.partial(_step, models[side], optimisers[side], *batch)
            loss, time_ms = measure.timed_ms(step, device)
            courses[side].losses.append(loss)
            courses[side].times_ms.append(time_ms)
        tick(1)
    return courses[0], courses[1]


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def _step(model: nn.Module, optimiser: Optimiser, images: Tensor, labels: Tensor) -> float:
    loss = _loss(model, images, labels)
    optimiser.step(loss)
    return loss.item()


def _saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    return measure.saved_bytes(model, lambda: _loss(model, images, labels))
