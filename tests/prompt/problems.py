"""Random prompt problems, and what eager PyTorch makes of them with gather, cat and autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_kernels import PromptOutput, prompt_embedding
from tests.numerics import assert_as_accurate_as_eager


@dataclass(frozen=True)
class Problem:
    """Tensors of one call, in the dtype they are given in."""

    input_ids: Tensor
    weight: Tensor
    prompt: Tensor
    mask: Tensor | None
    labels: Tensor | None
    position: str | int
    padding_idx: int | None
    d_embeddings: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return fresh leaves of prompt and table, in ``dtype`` where it is given."""
        both = (self.prompt, self.weight)
        return [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in both]


def problem(
    batch: int,
    tokens: int,
    length: int,
    width: int,
    *,
    vocabulary: int = 11,
    dtype: torch.dtype = torch.float32,
    prompt_dtype: torch.dtype | None = None,
    per_sample: bool = False,
    padding: str | None = "left",
    mask_dtype: torch.dtype = torch.int64,
    labels: bool = True,
    position: str | int = "start",
    padding_idx: int | None = None,
    seed: int = 0,
) -> Problem:
    """Return a random problem; a small vocabulary, so that ids repeat.

    ``padding`` is "left", "right", "holes" (kept or not at random, also whole rows) or None for no
    mask.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator).to(kind)

    def below(bound: int, *size: int) -> Tensor:
        return torch.randint(bound, size, generator=generator)

    mask = None
    if padding is not None:
        padded, column = below(tokens + 1, batch, 1), torch.arange(tokens)
        mask = {
            "left": column >= padded,
            "right": column < tokens - padded,
            "holes": below(2, batch, tokens) * below(2, batch, 1) != 0,
        }[padding].to(mask_dtype)
    shape = (batch, length, width) if per_sample else (length, width)
    return Problem(
        input_ids=below(vocabulary, batch, tokens),
        weight=normal(vocabulary, width),
        prompt=normal(*shape, kind=prompt_dtype or dtype),
        mask=mask,
        labels=below(vocabulary, batch, tokens) if labels else None,
        position=position,
        padding_idx=padding_idx,
        d_embeddings=normal(batch, length + tokens, width),
    )


def columns(given: Problem) -> list[int]:
    """Return the column of each row's prompt, found by looking."""
    batch, tokens = given.input_ids.shape
    if isinstance(given.position, int):
        return [given.position] * batch
    if given.position == "start" or given.mask is None:
        return [0] * batch
    found = []
    for row in given.mask.tolist():
        kept = [column for column, value in enumerate(row) if value]
        found.append(kept[0] if kept else tokens)
    return found


def eager(given: Problem, leaves: list[Tensor]) -> PromptOutput:
    """Return the output as a user writes it: gather, cut and cat, row by row."""
    prompt, weight = leaves
    batch, length = given.input_ids.shape[0], prompt.shape[-2]
    prompts = prompt.expand(batch, length, -1).to(weight.dtype)
    ones = None if given.mask is None else torch.ones(batch, length, dtype=given.mask.dtype)
    ignored = torch.full((batch, length), -100)
    tokens = F.embedding(given.input_ids, weight, given.padding_idx)
    starts = columns(given)

    def joined(rows: Tensor | None, prompt_rows: Tensor | None) -> Tensor | None:
        if rows is None or prompt_rows is None:
            return None
        if not batch:
            return torch.cat([prompt_rows, rows], 1)
        each = zip(rows, prompt_rows, starts, strict=True)
        return torch.stack([torch.cat([row[:c], p, row[c:]]) for row, p, c in each])

    embeddings, mask = joined(tokens, prompts), joined(given.mask, ones)
    assert embeddings is not None
    size = embeddings.shape[:2]
    kept = torch.ones(size, dtype=torch.bool) if mask is None else mask != 0
    positions = (kept.long().cumsum(1) - 1).clamp_min(0)
    labels = None if given.labels is None else joined(given.labels, ignored.to(given.labels.dtype))
    return PromptOutput(embeddings, mask, labels, positions)


def fused(given: Problem, leaves: list[Tensor], backend: str | None) -> PromptOutput:
    """Return the output of the package."""
    prompt, weight = leaves
    return prompt_embedding(
        given.input_ids,
        weight,
        prompt,
        attention_mask=given.mask,
        labels=given.labels,
        position=given.position,
        backend=backend,
        padding_idx=given.padding_idx,
    )


def gradients(given: Problem, output: PromptOutput, leaves: list[Tensor]) -> dict[str, Tensor]:
    """Return the gradient of each leaf that requires one, by name."""
    named = {n: t for n, t in zip(("prompt", "weight"), leaves, strict=True) if t.requires_grad}
    dy = given.d_embeddings.to(output.embeddings.dtype)
    found = torch.autograd.grad(output.embeddings, list(named.values()), dy)
    return dict(zip(named, found, strict=True))


def assert_same(actual: Tensor | None, expected: Tensor | None, name: str) -> None:
    """Assert equality in dtype, shape and every element."""
    if expected is None or actual is None:
        assert actual is None and expected is None, name
        return
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    assert torch.equal(actual, expected), name


def check(given: Problem, backend: str) -> dict[str, Tensor]:
    """Judge every output for equality with eager, gradients by the 1.5x rule; return those.

    Gradients must also have the bits of the reference: all backends add in one order.
    """
    own = given.leaves()
    output = fused(given, own, backend)
    expected = eager(given, given.leaves())
    for name in PromptOutput._fields:
        assert_same(getattr(output, name), getattr(expected, name), name)
    found = gradients(given, output, own)

    wide, narrow = given.leaves(torch.float64), given.leaves()
    exact = gradients(given, eager(given, wide), wide)
    same_dtype = gradients(given, eager(given, narrow), narrow)
    specified = given.leaves()
    reference = gradients(given, fused(given, specified, "reference"), specified)
    for name, value in found.items():
        assert value.dtype == narrow[name == "weight"].dtype, name
        assert_same(value, reference[name], f"gradient of {name}")
        if exact[name].count_nonzero():
            assert_as_accurate_as_eager(
                name, value, [same_dtype[name]], exact[name], given.weight.dtype
            )
        else:
            assert value.count_nonzero() == 0, name
    return found
