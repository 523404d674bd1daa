"""``PromptEmbedding``: ``nn.Embedding`` with a frozen table and a trained prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peft_kernels.core import backend as backends
from peft_kernels.core.checks import describe
from peft_kernels.prompt import op

_SAMPLED_ROWS = 4096  # of the table, whose spread a random prompt takes


class PromptEmbedding(nn.Module):
    """Token embeddings with a trained prompt, mask, labels and positions fitted to it.

    The table is shared with ``embedding`` and frozen; ``prompt`` is trained. Where the table is to
    be trained too, set ``layer.embedding.weight.requires_grad_(True)``; its ``padding_idx`` gets no
    gradient.

    Keys of the state dict: ``prompt`` [P, D] and ``embedding.weight``; with ``prompt_projection``
    also ``projection.0``, ``.2`` and ``.4`` (``.weight``, ``.bias``), which ``fold`` removes.

    Args:
        embedding: an ``nn.Embedding``; its parameter becomes this layer's, not a copy.
        num_virtual_tokens: P, at least 1.
        init: what the prompt starts from. "random": normal with the table's standard deviation.
            "vocab": rows of the table drawn at random, never ``padding_idx``. A float tensor
            [P, D]: its values. Token ids (an integer tensor or a sequence): their rows of the
            table, repeated or cut to P as peft does with a text.
        position: where the prompt goes, as in ``prompt_embedding``: "start", "after_padding" or an
            integer column.
        prompt_projection: train the prompt through an MLP (P-tuning; Linear, ReLU, Linear, ReLU,
            Linear, as peft's ``PromptEncoder``), which runs once a step on [P, D], not once a row.
        projection_hidden: the MLP's hidden size; None takes D.
        dtype: dtype of prompt and MLP; None takes the table's. float32 beside a bfloat16 table is
            peft's default.

    Attributes:
        prompt: [P, D].
        embedding: the wrapped ``nn.Embedding``.
        projection: the MLP, or None.
        position: may be changed between calls.
        backend: None, or the name of a backend to demand.

    Raises:
        TypeError: not exactly an ``nn.Embedding``, or an ``init`` of another kind.
        ValueError: an embedding with ``max_norm``, ``scale_grad_by_freq`` or ``sparse``; no virtual
            tokens; an ``init`` of another shape, or ids outside the vocabulary; the size of an MLP
            that there is not.

    Source: Lester et al., *The Power of Scale for Parameter-Efficient Prompt Tuning*, EMNLP 2021;
        Liu et al., *GPT Understands, Too* (P-tuning), 2021.

    Example:
        >>> import torch
        >>> from peft_kernels import PromptEmbedding
        >>> layer = PromptEmbedding(torch.nn.Embedding(10, 4), num_virtual_tokens=3, init="vocab")
        >>> layer(torch.tensor([[1, 2], [3, 4]])).embeddings.shape
        torch.Size([2, 5, 4])
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['prompt']
    """

    projection: nn.Sequential | None

    def __init__(
        self,
        embedding: nn.Embedding,
        *,
        num_virtual_tokens: int,
        init: str | Tensor | Sequence[int] = "random",
        position: str | int = "start",
        prompt_projection: bool = False,
        projection_hidden: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Wrap ``embedding`` and make the prompt."""
        _check_embedding(embedding)
        _check_size("num_virtual_tokens", num_virtual_tokens)
        if projection_hidden is not None and not prompt_projection:
            raise ValueError(
                f"projection_hidden is the size of the MLP behind the prompt, got "
                f"{projection_hidden!r} without prompt_projection=True"
            )
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self.position = position
        self.backend: str | None = None
        values, weight = _initial(init, embedding, num_virtual_tokens), embedding.weight
        self.prompt = nn.Parameter(values.to(weight.device, dtype or weight.dtype))
        self.projection = None
        if prompt_projection:
            width = embedding.embedding_dim
            hidden = width if projection_hidden is None else projection_hidden
            _check_size("projection_hidden", hidden)
            self.projection = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(),
                nn.Linear(hidden, hidden), nn.ReLU(),
                nn.Linear(hidden, width),
            ).to(self.prompt.device, self.prompt.dtype)  # fmt: skip
        # Last: an embedding that was refused stays as it was.
        self.embedding = embedding.requires_grad_(False)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        num_virtual_tokens: int,
        init: str | Tensor | Sequence[int] = "random",
        position: str | int = "start",
        prompt_projection: bool = False,
        projection_hidden: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> PromptEmbedding:
        """Wrap ``embedding`` as the constructor does, in its training mode.

        Args:
            embedding: as in the constructor, and so are the others.
            num_virtual_tokens: P.
            init: what the prompt starts from.
            position: where the prompt goes.
            prompt_projection: whether an MLP stands behind the prompt.
            projection_hidden: the MLP's hidden size.
            dtype: dtype of prompt and MLP.
        """
        layer = cls(
            embedding,
            num_virtual_tokens=num_virtual_tokens,
            init=init,
            position=position,
            prompt_projection=prompt_projection,
            projection_hidden=projection_hidden,
            dtype=dtype,
        )
        return layer.train(embedding.training)

    def virtual_tokens(self) -> Tensor:
        """Return the rows that are put in, [P, D]: the prompt, through the MLP if there is one."""
        if self.projection is None:
            return self.prompt
        # Autocast gives its own dtype, which may not mix with the table's.
        return self.projection(self.prompt).to(self.prompt.dtype)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> op.PromptOutput:
        """Return embeddings, mask, labels, positions for ids [B, S]; see ``prompt_embedding``."""
        return op.prompt_embedding(
            input_ids,
            self.embedding.weight,
            self.virtual_tokens(),
            attention_mask=attention_mask,
            labels=labels,
            position=self.position,
            backend=self.backend,
            padding_idx=self.embedding.padding_idx,
        )

    @torch.no_grad()
    def fold(self) -> None:
        """Put the MLP's result into ``prompt`` and drop the MLP, after training.

        Optimisers made before still hold the MLP's parameters.

        Raises:
            RuntimeError: there is no MLP.
        """
        if self.projection is None:
            raise RuntimeError("this PromptEmbedding has no projection to fold")
        self.prompt.copy_(self.virtual_tokens())
        self.projection = None

    def extra_repr(self) -> str:
        """Return what ``print(layer)`` shows."""
        return f"num_virtual_tokens={self.num_virtual_tokens}, position={self.position!r}"


def _check_size(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _check_embedding(embedding: object) -> None:
    if type(embedding) is not nn.Embedding:
        kind = type(embedding)
        raise TypeError(
            f"embedding must be a torch.nn.Embedding, got {kind.__module__}.{kind.__name__}, whose "
            f"forward may differ (a scaled one multiplies its rows); call prompt_embedding with a "
            f"table of the rows that it would give"
        )
    refused = {
        "max_norm": embedding.max_norm is not None,
        "scale_grad_by_freq": embedding.scale_grad_by_freq,
        "sparse": embedding.sparse,
    }
    for name, is_set in refused.items():
        if is_set:
            raise ValueError(
                f"embedding has {name}={getattr(embedding, name)}, which the fused kernels do not "
                f"do; make it without {name}"
            )


def _initial(init: object, embedding: nn.Embedding, count: int) -> Tensor:
    """Return the prompt's first values, [P, D]."""
    weight = embedding.weight.detach()
    if isinstance(init, str):
        if init == "random":
            sample = weight[:: max(1, len(weight) // _SAMPLED_ROWS)].float()
            return torch.randn(count, weight.shape[1], device=weight.device) * sample.std()
        if init == "vocab":
            return weight[_drawn_ids(embedding, count)].clone()
    elif isinstance(init, Tensor) and init.is_floating_point():
        if init.shape != (count, weight.shape[1]):
            raise ValueError(
                f"init must have shape [{count}, {weight.shape[1]}], got {list(init.shape)}"
            )
        return init.detach().clone()
    elif isinstance(init, (Tensor, Sequence)):
        return weight[_given_ids(init, len(weight), count).to(weight.device)].clone()
    raise TypeError(
        f"init must be 'random', 'vocab', a float tensor [{count}, {weight.shape[1]}] or token "
        f"ids, got {describe(init)}"
    )


def _drawn_ids(embedding: nn.Embedding, count: int) -> Tensor:
    """Return ids drawn at random, the padding row left out."""
    vocabulary, padding = embedding.num_embeddings, embedding.padding_idx
    candidates = vocabulary - (padding is not None)
    if candidates < 1:
        raise ValueError("init='vocab' needs an embedding with a row that is not padding_idx")
    ids = torch.randint(candidates, (count,), device=embedding.weight.device)
    return ids if padding is None else ids + (ids >= padding)


def _given_ids(init: Tensor | Sequence[int], vocabulary: int, count: int) -> Tensor:
    """Return ``count`` ids, those given repeated or cut."""
    ids = init if isinstance(init, Tensor) else torch.as_tensor(init, device="cpu")
    if ids.numel() == 0 or ids.dim() != 1:
        raise ValueError(f"init must be a list of token ids, at least one, got {describe(init)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"init must hold integer token ids, got {describe(init)}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(
            f"init must hold ids in 0..{vocabulary - 1}, got {int(ids.min())}..{int(ids.max())}"
        )
    return ids.long().repeat(-(-count // len(ids)))[:count]


def _explain(
    layer: PromptEmbedding,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[backends.Op, op.PromptSpec, str | None]:
    return op.explain_call(
        input_ids,
        layer.embedding.weight,
        layer.prompt,
        attention_mask=attention_mask,
        labels=labels,
        position=layer.position,
        backend=layer.backend,
    )


backends.explains(PromptEmbedding, _explain)
