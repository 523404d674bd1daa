"""The fine-tuning methods that the demo compares, each in its eager and its fused form.

A further method is one more ``Method`` in ``METHODS``. Its two forms must use the same parameter
names, so that one state dict fits both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import peft_kernels
from peft_kernels.demo.model import TOKENS, Attention, DigitTransformer


@dataclass(frozen=True)
class Options:
    """Size of what is added: rank or bottleneck, numerator alpha of its scaling, dropout.

    The rank is what the method has one of: prompt and prefix tuning's number of virtual tokens.
    """

    rank: int
    alpha: float
    dropout: float


@dataclass(frozen=True)
class Method:
    """A way to fine-tune a frozen ``DigitTransformer``.

    Attributes:
        name: what tables show; in lower case the name of the adapter's file.
        apply_eager: puts the method's plain PyTorch form into a frozen model, in place; only what
            it adds requires gradients.
        apply_fused: likewise with this package's layers.
        explain: says on which backend every fused layer of a model would run, for a batch size.
        has_dropout: whether the method has a dropout of its own.
    """

    name: str
    apply_eager: Callable[[DigitTransformer, Options], None]
    apply_fused: Callable[[DigitTransformer, Options], None]
    explain: Callable[[DigitTransformer, int], list[peft_kernels.Explanation]]
    has_dropout: bool = True


class EagerLoRALinear(nn.Module):
    """LoRA as Hugging Face peft computes it: ``base(x) + B(A(dropout(x))) * scaling``."""

    def __init__(self, base: nn.Linear, options: Options) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scaling = options.alpha / options.rank
        # peft's own choice: no dropout, no module for it.
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()
        # float32 beside a narrower base, too: peft's default.
        self.lora_A = nn.Parameter(torch.empty(options.rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, options.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.to(base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., N] for x [..., K]."""
        y = nn.functional.linear(x, self.weight, self.bias)
        dropped = self.dropout(x.to(self.lora_A.dtype))
        s = nn.functional.linear(dropped, self.lora_A)  # [..., r]
        y = y + nn.functional.linear(s, self.lora_B) * self.scaling
        return y.to(x.dtype)


LORA_TARGETS = ("q", "k", "v", "o", "up", "down")


def _apply_eager_lora(model: DigitTransformer, options: Options) -> None:
    peft_kernels.replace(model, LORA_TARGETS, lambda old: EagerLoRALinear(_linear(old), options))


def _apply_fused_lora(model: DigitTransformer, options: Options) -> None:
    def build(old: nn.Module) -> nn.Module:
        return peft_kernels.LoRALinear.from_linear(
            _linear(old),
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            dtype=torch.float32,
        )

    peft_kernels.replace(model, LORA_TARGETS, build)


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"LoRA's targets are torch.nn.Linear, got {type(module).__name__}")
    return module


class EagerAdapter(nn.Module):
    """A bottleneck adapter behind a layer, as one writes it in PyTorch.

    Its parameters are an ``AdaptedModule``'s, by name.
    """

    def __init__(self, base: nn.Linear, options: Options) -> None:
        super().__init__()
        self.module = base
        # Only its parameters are used: the form is below.
        self.adapter = _adapter(base, options)
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., D] for x [..., K]."""
        below = self.module(x)
        its, wide = self.adapter, below.to(self.adapter.down_weight.dtype)
        hidden = nn.functional.gelu(nn.functional.linear(wide, its.down_weight, its.down_bias))
        branch = self.dropout(nn.functional.linear(hidden, its.up_weight, its.up_bias))
        return (wide + branch * its.scale).to(below.dtype)


ADAPTER_TARGETS = ("o", "down")


def _adapter(base: nn.Linear, options: Options) -> peft_kernels.Adapter:
    return peft_kernels.Adapter(
        base.out_features,
        bottleneck=options.rank,
        activation="gelu",
        scale=options.alpha / options.rank,
        dropout=options.dropout,
        device=base.weight.device,
        dtype=torch.float32,
    )


def _apply_eager_adapter(model: DigitTransformer, options: Options) -> None:
    peft_kernels.replace(model, ADAPTER_TARGETS, lambda old: EagerAdapter(_linear(old), options))


def _apply_fused_adapter(model: DigitTransformer, options: Options) -> None:
    def build(old: nn.Module) -> nn.Module:
        return peft_kernels.AdaptedModule(old, _adapter(_linear(old), options))

    peft_kernels.replace(model, ADAPTER_TARGETS, build)


def _explain_fused(model: DigitTransformer, batch_size: int) -> list[peft_kernels.Explanation]:
    explanations = []
    for layer in model.modules():
        if isinstance(layer, peft_kernels.LoRALinear):
            x = layer.weight.new_empty(batch_size, TOKENS, layer.in_features)
            explanations.append(peft_kernels.explain(layer, x))
        elif isinstance(layer, peft_kernels.AdaptedModule):
            weight = _linear(layer.module).weight
            x = weight.new_empty(batch_size, TOKENS, weight.shape[0])
            explanations.append(peft_kernels.explain(layer.adapter, x))
    return explanations


LORA = Method("LoRA", _apply_eager_lora, _apply_fused_lora, _explain_fused)
ADAPTER = Method("Adapter", _apply_eager_adapter, _apply_fused_adapter, _explain_fused)


class EagerPrompt(nn.Module):
    """Trained rows in front of the patches, copied for every image: as peft computes it."""

    def __init__(self, width: int, options: Options) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(options.rank, width) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, P + S, D] for x [B, S, D]."""
        prompts = self.prompt.expand(x.shape[0], -1, -1).to(x.dtype)
        return torch.cat([prompts, x], 1)


class FusedPrompt(EagerPrompt):
    """The same by ``prompt_embedding``: the patches' embeddings are its table, counted through."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, P + S, D] for x [B, S, D]."""
        return peft_kernels.prompt_embedding(*self.arguments(x)).embeddings

    def arguments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what ``prompt_embedding`` is called with."""
        table = x.flatten(0, 1)  # [B * S, D]
        ids = torch.arange(len(table), device=x.device).view(x.shape[:2])
        return ids, table, self.prompt


def _apply_eager_prompt(model: DigitTransformer, options: Options) -> None:
    model.prompt = EagerPrompt(model.position.shape[1], options).to(model.position.device)


def _apply_fused_prompt(model: DigitTransformer, options: Options) -> None:
    model.prompt = FusedPrompt(model.position.shape[1], options).to(model.position.device)


def _explain_prompt(model: DigitTransformer, batch_size: int) -> list[peft_kernels.Explanation]:
    x = model.position.expand(batch_size, -1, -1)
    prompts = [each for each in model.modules() if isinstance(each, FusedPrompt)]
    return [
        peft_kernels.explain(peft_kernels.prompt_embedding, *each.arguments(x)) for each in prompts
    ]


PROMPT = Method(
    "Prompt", _apply_eager_prompt, _apply_fused_prompt, _explain_prompt, has_dropout=False
)


class EagerPrefix(Attention):
    """Trained keys and values in front of the patches', copied for every image, as peft copies.

    The projections are those of the attention that it replaces.
    """

    prefix_key: nn.Parameter
    prefix_value: nn.Parameter

    def __init__(self, base: nn.Module, options: Options) -> None:
        nn.Module.__init__(self)
        if not isinstance(base, Attention):
            raise TypeError(f"a prefix goes before an Attention, got {type(base).__name__}")
        self.heads = base.heads
        self.q, self.k, self.v, self.o = base.q, base.k, base.v, base.o
        weight = base.k.weight
        size = (base.heads, options.rank, weight.shape[0] // base.heads)  # [H, P, d]
        for name in ("prefix_key", "prefix_value"):
            values = torch.randn(size, device=weight.device) * 0.5
            self.register_parameter(name, nn.Parameter(values))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention over [prefix ; patches], [B, H, S, d]."""

        def whole(prefix: Tensor, own: Tensor) -> Tensor:
            return torch.cat([prefix.expand(len(own), -1, -1, -1).to(own.dtype), own], 2)

        return nn.functional.scaled_dot_product_attention(
            q, whole(self.prefix_key, k), whole(self.prefix_value, v)
        )


class FusedPrefix(EagerPrefix):
    """The same by ``prefix_attention``."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention over [prefix ; patches], [B, H, S, d]."""
        return peft_kernels.prefix_attention(q, k, v, self.prefix_key, self.prefix_value)


PREFIX_TARGETS = "attention"


def _apply_eager_prefix(model: DigitTransformer, options: Options) -> None:
    peft_kernels.replace(model, PREFIX_TARGETS, lambda old: EagerPrefix(old, options))


def _apply_fused_prefix(model: DigitTransformer, options: Options) -> None:
    peft_kernels.replace(model, PREFIX_TARGETS, lambda old: FusedPrefix(old, options))


def _explain_prefix(model: DigitTransformer, batch_size: int) -> list[peft_kernels.Explanation]:
    explanations = []
    for each in (layer for layer in model.modules() if isinstance(layer, FusedPrefix)):
        heads, _, size = each.prefix_key.shape
        q = each.q.weight.new_empty(batch_size, heads, TOKENS, size)
        prefix = each.prefix_key, each.prefix_value
        explanations.append(peft_kernels.explain(peft_kernels.prefix_attention, q, q, q, *prefix))
    return explanations


PREFIX = Method(
    "Prefix", _apply_eager_prefix, _apply_fused_prefix, _explain_prefix, has_dropout=False
)

METHODS = (LORA, ADAPTER, PROMPT, PREFIX)


def apply(
    model: DigitTransformer, form: Callable[[DigitTransformer, Options], None], options: Options
) -> None:
    """Put one form of a method into a frozen model, in place, and have the head trained too."""
    form(model, options)
    # Classes that pre-training never saw need their rows of the head: peft's ``modules_to_save``.
    model.head.requires_grad_(True)


def build_pair(
    frozen: DigitTransformer, method: Method, options: Options
) -> tuple[DigitTransformer, DigitTransformer]:
    """Return the eager and the fused model, both in one state; ``frozen`` stays as it is."""
    eager, fused = copy.deepcopy(frozen), copy.deepcopy(frozen)
    apply(eager, method.apply_eager, options)
    apply(fused, method.apply_fused, options)
    fused.load_state_dict(eager.state_dict())
    return eager, fused


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what is trained, by name: all that must be kept beside the frozen model."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def trainable_share(model: nn.Module) -> float:
    """Return the trained share of all parameters."""
    trained = sum(tensor.numel() for tensor in trained_tensors(model).values())
    return trained / sum(parameter.numel() for parameter in model.parameters())
