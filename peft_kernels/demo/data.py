"""scikit-learn's handwritten digits, split into what is known and what is to be learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 10
IMAGE_SIZE = 8
_BRIGHTEST = 16.0


@dataclass(frozen=True)
class Digits:
    """Images [n, 8, 8] float32 in [-1, 1] and labels [n] int64, held-out ones apart."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``steps`` batches, reshuffled every epoch; the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self.train_labels)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < min(size, count):
                order = torch.randperm(count, generator=generator)
            rows, order = order[:size].to(self.train_labels.device), order[size:]
            yield self.train_images[rows], self.train_labels[rows]


def load(seed: int, device: torch.device, test_share: float = 0.25) -> tuple[Digits, Digits]:
    """Return digits 0-4 (to pre-train on) and 5-9 (to adapt to).

    Args:
        seed: decides which images are held out.
        device: where the tensors are put.
        test_share: held-out share of every class.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images, labels, test_size=test_share, stratify=labels, random_state=seed
    )
    train_images, test_images, train_labels, test_labels = (
        torch.from_numpy(part) for part in split
    )
    train_images, test_images = _scaled(train_images), _scaled(test_images)

    def half(first: bool) -> Digits:
        in_train = (train_labels < CLASSES // 2) == first
        in_test = (test_labels < CLASSES // 2) == first
        return Digits(
            train_images[in_train].to(device),
            train_labels[in_train].long().to(device),
            test_images[in_test].to(device),
            test_labels[in_test].long().to(device),
        )

    return half(True), half(False)


def _scaled(pixels: Tensor) -> Tensor:
    return (pixels.float() / _BRIGHTEST * 2.0 - 1.0).view(-1, IMAGE_SIZE, IMAGE_SIZE)
