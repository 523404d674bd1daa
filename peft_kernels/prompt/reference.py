"""Prompt tuning in plain PyTorch: the specification of every other backend, and the last fallback.

With c the column that row b's prompt starts at, P its length and S the tokens of a row:

    token s   goes to column  s + P · [s >= c]        prompt row p  goes to column  c + p

    embeddings  the table's row of the token's id     the prompt, cast once to the table's dtype
    mask        as given                              1
    labels      as given                              -100
    positions   kept columns up to and with this one, minus 1, at least 0

``after padding``: c is the first kept token's column, S in a row that keeps nothing.

Backward adds in an order that every backend shares, so that all agree bit for bit: blocks of
``CHAIN`` rows, each from zero in ascending order, then the blocks in ascending order, in float32
(float64 for float64), rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.core.operands import wide_dtype
from peft_kernels.prompt import token_ids

CHAIN = 16
IGNORED_LABEL = -100


def first_kept(mask: Tensor) -> Tensor:
    """Return the column of the first kept token of each row, int64 [B]; S where none is kept."""
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    # A column beyond the last, so that a row of nothing (or of no columns) has a minimum too.
    end = columns.new_full((mask.shape[0], 1), mask.shape[1])
    return torch.cat([columns.masked_fill(mask == 0, mask.shape[1]), end], 1).amin(1)


def _starts(columns: Tensor | None, column: int, batch: int, device: torch.device) -> Tensor:
    """Return c of every row, [B, 1]."""
    if columns is not None:
        return columns[:, None]
    return torch.full((batch, 1), column, device=device)


def forward(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    column: int,
    embeddings: Tensor,
    mask_out: Tensor | None,
    labels_out: Tensor | None,
    positions: Tensor,
    columns: Tensor | None,
) -> None:
    """Write every output that is not None.

    Args:
        input_ids: [B, S]; on CPUs one outside the table raises IndexError.
        weight: the embedding table [V, D].
        prompt: [P, D] or [B, P, D].
        mask: [B, S] or None.
        labels: [B, S] or None.
        column: c of every row; not read where ``columns`` is given.
        embeddings: written, [B, P + S, D].
        mask_out: written, [B, P + S].
        labels_out: written, [B, P + S].
        positions: written, int64 [B, P + S].
        columns: written, int64 [B]: c of each row, after the padding that ``mask`` shows.
    """
    (batch, tokens), length = input_ids.shape, prompt.shape[-2]
    device = input_ids.device
    if device.type == "cpu":
        token_ids.check(input_ids, weight.shape[0])
    if columns is not None and mask is not None:
        columns.copy_(first_kept(mask))
    start = _starts(columns, column, batch, device)
    row = torch.arange(batch, device=device)[:, None]
    token = torch.arange(tokens, device=device)
    token_at = token + length * (token >= start)  # [B, S]
    prompt_at = start + torch.arange(length, device=device)  # [B, P]

    embeddings[row, token_at] = weight[input_ids.long()]
    embeddings[row, prompt_at] = prompt.to(embeddings.dtype)
    if labels is not None and labels_out is not None:
        labels_out[row, token_at] = labels
        labels_out[row, prompt_at] = IGNORED_LABEL
    if mask is None or mask_out is None:
        positions.copy_(torch.arange(length + tokens, device=device).expand_as(positions))
        return
    mask_out[row, token_at] = mask
    mask_out[row, prompt_at] = torch.ones((), dtype=mask.dtype, device=device)
    positions.copy_((mask_out != 0).cumsum(1).sub_(1).clamp_min_(0))


def backward(
    d_embeddings: Tensor,
    input_ids: Tensor | None,
    columns: Tensor | None,
    column: int,
    padding_idx: int,
    d_prompt: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """Write the gradients that are not None.

    Args:
        d_embeddings: [B, P + S, D].
        input_ids: [B, S]; None where ``d_weight`` is.
        columns: as forward wrote them, or None.
        column: as in forward.
        padding_idx: the table's row that gets no gradient; -1 for none.
        d_prompt: written, [P, D] (a sum over the batch) or [B, P, D].
        d_weight: written, [V, D].
    """
    if d_prompt is not None:
        _prompt_gradient(d_embeddings, columns, column, d_prompt)
    if d_weight is not None and input_ids is not None:
        _table_gradient(d_embeddings, input_ids, columns, column, padding_idx, d_weight)


def _prompt_gradient(
    d_embeddings: Tensor, columns: Tensor | None, column: int, d_prompt: Tensor
) -> None:
    batch, length = d_embeddings.shape[0], d_prompt.shape[-2]
    place = torch.arange(length, device=d_embeddings.device)

    def rows(b: int) -> Tensor:
        if columns is None:
            return d_embeddings[b, column : column + length]
        return d_embeddings[b].index_select(0, columns[b] + place)

    if d_prompt.dim() == 3:
        for b in range(batch):
            d_prompt[b] = rows(b)
        return
    total = _zeros(d_prompt.shape, d_embeddings)
    for first in range(0, batch, CHAIN):
        part = torch.zeros_like(total)
        for b in range(first, min(batch, first + CHAIN)):
            part += rows(b)
        total += part
    d_prompt.copy_(total)


def _table_gradient(
    d_embeddings: Tensor,
    input_ids: Tensor,
    columns: Tensor | None,
    column: int,
    padding_idx: int,
    d_weight: Tensor,
) -> None:
    (batch, tokens), device = input_ids.shape, input_ids.device
    d_weight.zero_()
    if batch * tokens == 0:
        return
    ids, order = torch.sort(input_ids.flatten().long(), stable=True)
    # Where token s of row b stands among the columns of d_embeddings.
    row, token = order // tokens, order % tokens
    start = _starts(columns, column, batch, device)[row, 0]
    length = d_embeddings.shape[1] - tokens
    token_at = token + length * (token >= start)

    found, segment, counts = torch.unique_consecutive(ids, return_inverse=True, return_counts=True)
    rank = torch.arange(len(ids), device=device) - (counts.cumsum(0) - counts)[segment]
    total = _zeros((len(found), d_weight.shape[1]), d_embeddings)
    for first in range(0, int(counts.max()), CHAIN):
        part = torch.zeros_like(total)
        for nth in range(first, first + CHAIN):
            (each,) = torch.where(rank == nth)
            # No id twice among these, so that the order of additions is settled.
            part[segment[each]] += d_embeddings[row[each], token_at[each]]
        total += part
    kept = found != padding_idx
    d_weight[found[kept]] = total[kept].to(d_weight.dtype)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=wide_dtype(like.dtype), device=like.device)
