"""``prompt_embedding``: argument checks, the autograd Function, the public function.

A call travels one way: ``prompt_embedding`` → checks → ``PromptEmbeddingFunction`` → ``dispatch`` →
the chosen backend's launcher.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from peft_kernels.core import backend as backends
from peft_kernels.core import checks
from peft_kernels.core.library import eager_apply, once_differentiable, traced_apply
from peft_kernels.core.operands import arrived
from peft_kernels.prompt.dispatch import (
    PROMPT_EMBEDDING,
    PromptSpec,
    prompt_backward,
    prompt_forward,
)

_INTEGERS = (torch.int64, torch.int32)
_POSITIONS = ("start", "after_padding")


class PromptOutput(NamedTuple):
    """What a model takes in place of ``input_ids``, each [B, P + S] with the prompt in its place.

    Attributes:
        embeddings: [B, P + S, D] in the table's dtype: the model's ``inputs_embeds``.
        attention_mask: in the dtype given, 1 at the prompt; None where none was given.
        labels: in the dtype given, -100 (ignored by the loss) at the prompt; None likewise.
        position_ids: int64, kept columns up to and with each one, minus 1, at least 0; 0, 1, 2, ...
            where no mask was given.
    """

    embeddings: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None
    position_ids: Tensor


# By this name torch.export.save writes it, and load knows it again.
_register_namedtuple(PromptOutput, serialized_type_name="peft_kernels.PromptOutput")


class PromptEmbeddingFunction(torch.autograd.Function):
    """Rows of the table with the prompt's rows between, its gradients written out.

    Saved for backward: the prompts' columns [B] where they differ by row, and ``input_ids`` where
    the table is trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        prompt: Tensor,
        weight: Tensor,
        input_ids: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        column: int,
        scan: bool,
        padding_idx: int,
        backend: str | None,
    ) -> tuple[Tensor | None, ...]:
        """Return embeddings, mask, labels and positions; ``scan`` finds the column in the mask."""
        batch, tokens = input_ids.shape
        columns_out = prompt.shape[-2] + tokens
        # Sizes one by one: a tuple of them costs half as much again.
        embeddings = weight.new_empty(batch, columns_out, weight.shape[1])
        mask_out = None if mask is None else mask.new_empty(batch, columns_out)
        labels_out = None if labels is None else labels.new_empty(batch, columns_out)
        positions = input_ids.new_empty(batch, columns_out, dtype=torch.int64)
        columns = input_ids.new_empty(batch, dtype=torch.int64) if scan else None
        prompt_forward(
            input_ids, weight, prompt, mask, labels, column, backend,
            embeddings, mask_out, labels_out, positions, columns,
        )  # fmt: skip
        ctx.save_for_backward(columns, input_ids if ctx.needs_input_grad[1] else None)
        ctx.like = prompt.shape, prompt.dtype, weight.shape
        ctx.options = column, padding_idx, backend
        ctx.set_materialize_grads(False)
        if mask_out is not None and mask_out.is_floating_point():  # integers never are
            ctx.mark_non_differentiable(mask_out)
        return embeddings, mask_out, labels_out, positions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_embeddings: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of prompt and table, each where it is needed."""
        if d_embeddings is None:
            return (None,) * 9
        d_embeddings = arrived(d_embeddings)
        columns, input_ids = ctx.saved_tensors
        need_prompt, need_weight = ctx.needs_input_grad[:2]
        shape, dtype, weight_shape = ctx.like
        d_prompt = d_embeddings.new_empty(shape, dtype=dtype) if need_prompt else None
        d_weight = d_embeddings.new_empty(weight_shape) if need_weight else None
        prompt_backward(d_embeddings, input_ids, columns, *ctx.options, d_prompt, d_weight)
        return d_prompt, d_weight, None, None, None, None, None, None, None


_apply = eager_apply(PromptEmbeddingFunction)
_traced_apply = traced_apply(PromptEmbeddingFunction)


def prompt_embedding(
    input_ids: Tensor,
    embedding_weight: Tensor,
    prompt: Tensor,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position: str | int = "start",
    backend: str | None = None,
    padding_idx: int | None = None,
) -> PromptOutput:
    """Return the embeddings of ``input_ids`` with a prompt put in, and what goes beside them.

    ``cat([prompt, embedding_weight[input_ids]])`` with attention mask, labels and position ids, in
    one launch; differentiable in the prompt and, where it requires gradients, in the table. Nothing
    is stored for backward but the prompts' columns (and ``input_ids`` for the table): the prompt's
    gradient is summed over the batch in float32 in a fixed order and rounded once to its dtype.

    Pass the result on as ``model(inputs_embeds=out.embeddings, attention_mask=out.attention_mask,
    labels=out.labels, position_ids=out.position_ids)``.

    Args:
        input_ids: token ids [B, S], int64 or int32; B, S and P may be 0.
        embedding_weight: the embedding table [V, D], any float dtype; the result has its dtype.
        prompt: trained rows [P, D], the same for every row of the batch, or [B, P, D]. May be wider
            than the table, as peft keeps it in float32: it is cast once, its gradient is not.
        attention_mask: [B, S], bool, integer or float, not zero = keep. Returned in its dtype, with
            1 at the prompt. None keeps everything, and None is returned, as peft does.
        labels: [B, S], int64 or int32. Returned with -100 at the prompt.
        position: where the prompt starts. "start": before every token, padding included, as peft
            puts it. "after_padding": before the first kept token of each row, so that left padding
            does not come between prompt and text (without a mask, and with right padding, the same
            as "start"; in a row that keeps nothing, the end). An integer 0..S: that column; 1 is
            behind a token that begins every row.
        backend: "triton", "cuda", "cpp" or "reference" to demand one; None takes the best.
        padding_idx: row of the table that gets no gradient, as in ``nn.Embedding``; None for none.

    Returns:
        A ``PromptOutput``. Its position ids count kept columns, so that padding takes up none (as
        transformers' ``generate`` counts); their values at columns that are not kept mean nothing.

    Raises:
        TypeError: an argument is not a dense tensor of an allowed dtype, or dtypes that cannot mix.
        ValueError: shapes that disagree, devices that differ, a position outside 0..S, an unknown
            backend.
        IndexError: an id outside the table, on CPU. On a GPU looking would stop the host: nothing
            outside the table is read there, and the id's row of embeddings is NaN; so it is in
            Triton's interpreter.
        BackendUnavailable: a demanded backend cannot serve this call, with every reason.

    Source: Lester et al., *The Power of Scale for Parameter-Efficient Prompt Tuning*, EMNLP 2021.

    Example:
        >>> import torch
        >>> from peft_kernels import prompt_embedding
        >>> ids, table = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.randn(10, 4)
        >>> prompt = torch.randn(2, 4, requires_grad=True)
        >>> mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        >>> out = prompt_embedding(
        ...     ids, table, prompt, attention_mask=mask, position="after_padding"
        ... )
        >>> out.embeddings.shape
        torch.Size([2, 5, 4])
        >>> out.attention_mask.tolist()
        [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
        >>> out.position_ids.tolist()
        [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    """
    _check(input_ids, embedding_weight, prompt, attention_mask, labels)
    column, scan = _column(position, input_ids.shape[1], attention_mask)
    row = _padding_row(padding_idx, embedding_weight.shape[0])
    backends.check_backend_name(backend)
    apply = _traced_apply if torch.compiler.is_compiling() else _apply
    embeddings, mask, new_labels, positions = apply(
        prompt, embedding_weight, input_ids, attention_mask, labels, column, scan, row, backend
    )
    return PromptOutput(embeddings, mask, new_labels, positions)


def _check(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
) -> None:
    checks.check_integers("input_ids", input_ids, _INTEGERS)
    if not checks.uniform(weight, prompt):
        checks.check_tensor("embedding_weight", weight)
        checks.check_tensor("prompt", prompt)
    checks.check_ndim("input_ids", input_ids, 2, "[B, S]")
    checks.check_ndim("embedding_weight", weight, 2, "[V, D]")
    batch, width = input_ids.shape[0], weight.shape[1]
    if prompt.dim() not in (2, 3) or prompt.shape[-1] != width:
        raise ValueError(
            f"prompt must have shape [P, {width}] or [B, P, {width}] to fit embedding_weight "
            f"{list(weight.shape)}, got {list(prompt.shape)}"
        )
    if prompt.dim() == 3 and prompt.shape[0] != batch:
        raise ValueError(
            f"prompt must have shape [{batch}, P, {width}], one for each row of input_ids "
            f"{list(input_ids.shape)}, or [P, {width}] for all, got {list(prompt.shape)}"
        )
    dtypes = (prompt.dtype, weight.dtype)
    if prompt.dtype != weight.dtype and torch.promote_types(*dtypes) not in dtypes:
        raise TypeError(
            f"prompt is {prompt.dtype} and embedding_weight is {weight.dtype}, which do not mix: "
            f"cast prompt to {weight.dtype} or float32"
        )
    if attention_mask is not None:
        _check_mask(attention_mask)
        _check_beside("attention_mask", attention_mask, input_ids)
    if labels is not None:
        checks.check_integers("labels", labels, _INTEGERS)
        _check_beside("labels", labels, input_ids)
    named = {
        "embedding_weight": weight,
        "prompt": prompt,
        "attention_mask": attention_mask,
        "labels": labels,
    }
    checks.check_same_device(named, input_ids.device, of="input_ids")


def _check_mask(mask: object) -> None:
    if isinstance(mask, Tensor) and mask.is_floating_point():
        checks.check_tensor("attention_mask", mask)
        return
    integers = (*_INTEGERS, torch.int16, torch.int8, torch.uint8, torch.bool)
    checks.check_integers("attention_mask", mask, integers)


def _check_beside(name: str, value: Tensor, input_ids: Tensor) -> None:
    if value.shape != input_ids.shape:
        raise ValueError(
            f"{name} must have the shape of input_ids, {list(input_ids.shape)}, got "
            f"{list(value.shape)}; columns for the prompt are added here"
        )


def _column(position: object, tokens: int, mask: Tensor | None) -> tuple[int, bool]:
    """Return the prompt's column, and whether each row's is to be found in the mask instead."""
    if position == "start":
        return 0, False
    if position == "after_padding":
        return 0, mask is not None
    if isinstance(position, bool) or not isinstance(position, int):
        raise ValueError(
            f"position must be {', '.join(map(repr, _POSITIONS))} or a column 0..{tokens}, "
            f"got {checks.describe(position)}"
        )
    if not 0 <= position <= tokens:
        raise ValueError(f"position must lie in 0..{tokens}, the length of a row, got {position}")
    return position, False


def _padding_row(padding_idx: object, vocabulary: int) -> int:
    """Return the row without a gradient, counted from 0; -1 for none."""
    if padding_idx is None:
        return -1
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx must be an integer, got {checks.describe(padding_idx)}")
    if not -vocabulary <= padding_idx < vocabulary:
        raise ValueError(
            f"padding_idx must lie in {-vocabulary}..{vocabulary - 1}, got {padding_idx}"
        )
    return padding_idx % vocabulary


def explain_call(*args: Any, **kwargs: Any) -> tuple[backends.Op, PromptSpec, str | None]:
    """Return what decides the backend of ``prompt_embedding(*args, **kwargs)``, checked alike."""
    bound = inspect.signature(prompt_embedding).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    input_ids, weight, mask = given["input_ids"], given["embedding_weight"], given["attention_mask"]
    _check(input_ids, weight, given["prompt"], mask, given["labels"])
    _column(given["position"], input_ids.shape[1], mask)
    _padding_row(given["padding_idx"], weight.shape[0])
    backends.check_backend_name(given["backend"])
    return PROMPT_EMBEDDING, PromptSpec(weight.device, weight.dtype), given["backend"]


backends.explains(prompt_embedding, explain_call)
