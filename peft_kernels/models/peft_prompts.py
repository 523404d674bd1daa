"""Prompt learning of peft on fused kernels: the same ``PeftModel`` with another forward.

Prefix tuning runs on ``prefix_attention`` (see ``peft_prefixes``), prompt tuning and P-tuning on
``prompt_embedding``. What a call brings that they do not take goes to peft's forward.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.prompt_tuning import PromptEmbedding
from torch import Tensor, nn

from peft_kernels.models import peft_prefixes
from peft_kernels.models.found import PLAIN, Found
from peft_kernels.prompt.op import prompt_embedding

_OPS = {
    "PREFIX_TUNING": "prefix_attention",
    "PROMPT_TUNING": "prompt_embedding",
    "P_TUNING": "prompt_embedding",
    "MULTITASK_PROMPT_TUNING": "prompt_embedding",
}
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_INTEGERS = (torch.int64, torch.int32)
_GENERATING = "_peft_kernels_generating"
# Set on a cache that was filled behind prefixes which are not in it.
_WITHOUT_PREFIX = "_peft_kernels_without_prefix"


def _forward_of(plain: Any) -> Callable[..., Any]:
    """Return the forward of a fused class, with the signature of the plain one."""
    names = list(inspect.signature(plain.forward).parameters)[1:]

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        if self._takes(inputs):
            return self._fused_forward(inputs)
        with peft_prefixes.plain_attention(self):
            return plain.forward(self, *args, **kwargs)

    return forward


class _Fused:
    """What the fused classes have in common, beside a plain class of peft.

    Attributes:
        ignored: arguments that peft's forward takes and makes nothing of.
        keeps_token_types: whether peft's forward passes ``token_type_ids`` on.
        extends_labels: whether there is a label for every token.
    """

    ignored: tuple[str, ...] = ()
    keeps_token_types = False
    extends_labels = False

    def _peft_kernels_acquired(self: Any) -> None:
        _uncover(self)
        if _op(self) == "prefix_attention":
            peft_prefixes.acquire(self)

    def _peft_kernels_released(self: Any) -> None:
        _uncover(self)
        peft_prefixes.release(self)

    @contextmanager
    def disable_adapter(self: Any) -> Iterator[None]:
        """Let the base model be called as if there were no prompt, in a ``with`` statement."""
        try:
            with peft_prefixes.plain_attention(self), super().disable_adapter():  # type: ignore[misc]
                yield
        finally:
            _uncover(self)

    def _takes(self: Any, inputs: dict[str, Any]) -> bool:
        """Return whether a call is computed by our kernels, as they take it."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in _INTEGERS:
            return False
        for name in ("inputs_embeds", "past_key_values"):
            if inputs.get(name) is not None:
                return False
        mask = inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            return False
        op = _op(self)
        if op == "prefix_attention":
            return peft_prefixes.fits(self) and not _wants_attentions(self, inputs)
        return op is not None and self._takes_prompt(ids, inputs)

    def _fused_forward(self: Any, inputs: dict[str, Any]) -> Any:
        inputs = {name: value for name, value in inputs.items() if name not in self.ignored}
        _adjust(self, inputs, self.keeps_token_types)
        if _op(self) == "prefix_attention":
            return self._with_prefix(inputs)
        return self._with_prompt(inputs)

    def _with_prefix(self: Any, inputs: dict[str, Any]) -> Any:
        inputs.pop("task_ids", None)
        if inputs.get("position_ids") is None:
            virtual = self.active_peft_config.num_virtual_tokens
            inputs["position_ids"] = peft_prefixes.positions(
                self.base_model, inputs["input_ids"], virtual
            )
        with peft_prefixes.opened(self) as prefixes:
            return self.base_model(**inputs, **prefixes.argument())

    def _with_prompt(self: Any, inputs: dict[str, Any]) -> Any:
        config, words = self.active_peft_config, self.word_embeddings
        ids = inputs.pop("input_ids")
        inputs.pop("inputs_embeds", None)
        prompt = self._prompt(len(ids), inputs.pop("task_ids", None))
        out = prompt_embedding(
            ids, words.weight, prompt, attention_mask=inputs.pop("attention_mask", None),
            labels=inputs.pop("labels", None) if self.extends_labels else None,
            padding_idx=words.padding_idx,
        )  # fmt: skip
        types = inputs.get("token_type_ids")
        if types is not None:
            inputs["token_type_ids"] = nn.functional.pad(types, (config.num_virtual_tokens, 0))
        if out.labels is not None:
            inputs["labels"] = out.labels
        return self.base_model(
            inputs_embeds=out.embeddings, attention_mask=out.attention_mask, **inputs
        )

    def _prompt(self: Any, batch: int, task_ids: Tensor | None) -> Tensor:
        """Return the rows [P, D] that peft would repeat, or those of each task, [B, P, D]."""
        config, encoder = self.active_peft_config, self.prompt_encoder[self.active_adapter]
        if config.peft_type == "MULTITASK_PROMPT_TUNING":
            return self.get_prompt(batch, task_ids)  # type: ignore[no-any-return]
        prompt = encoder.embedding.weight
        if type(encoder) is not PromptEmbedding and not config.inference_mode:
            prompt = self.get_prompt(1)[0]
        return prompt[: config.num_virtual_tokens]  # type: ignore[no-any-return]

    def _takes_prompt(self: Any, ids: Tensor, inputs: dict[str, Any]) -> bool:
        config, words = self.active_peft_config, self.word_embeddings
        if _why_not_words(words) or words.weight.device != ids.device:
            return False
        encoder = self.prompt_encoder[self.active_adapter].embedding.weight
        dtypes = (encoder.dtype, words.weight.dtype)
        if type(encoder) not in _PLAIN_TENSORS or encoder.device != ids.device:
            return False
        if torch.promote_types(*dtypes) not in dtypes:
            return False
        labels = inputs.get("labels")
        if self.extends_labels and labels is not None:
            if labels.shape != ids.shape or labels.dtype not in _INTEGERS:
                return False
        if config.peft_type == "MULTITASK_PROMPT_TUNING":
            return inputs.get("task_ids") is not None
        return True


class FusedCausalLM(_Fused, peft.PeftModelForCausalLM):  # type: ignore[misc]
    """``PeftModelForCausalLM`` on our kernels; ``generate`` too, for a prefix."""

    extends_labels = True
    forward = _forward_of(peft.PeftModelForCausalLM)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base model generates behind the prompt."""
        if _op(self) != "prefix_attention" or self._adapters_disabled:
            return super().generate(*args, **kwargs)
        if not peft_prefixes.fits(self) or not _takes_generation(self, kwargs):
            with peft_prefixes.plain_attention(self):
                return super().generate(*args, **kwargs)
        with torch.no_grad(), peft_prefixes.opened(self) as prefixes:
            self.__dict__[_GENERATING] = prefixes
            try:
                return super().generate(*args, **kwargs)
            finally:
                del self.__dict__[_GENERATING]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Return the arguments of the base model's next call."""
        prefixes = self.__dict__.get(_GENERATING)
        if prefixes is None:
            return super().prepare_inputs_for_generation(*args, **kwargs)
        kwargs.pop("task_ids", None)
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        _adjust(self, inputs, self.keeps_token_types)
        cache = inputs.get("past_key_values")
        if cache is not None:
            setattr(cache, _WITHOUT_PREFIX, True)
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = peft_prefixes.positions(
                self.base_model, inputs["input_ids"], self.active_peft_config.num_virtual_tokens,
                0 if cache is None else cache.get_seq_length(),
            )  # fmt: skip
        return inputs | prefixes.argument()


class FusedSequenceClassification(_Fused, peft.PeftModelForSequenceClassification):  # type: ignore[misc]
    """``PeftModelForSequenceClassification`` on our kernels."""

    keeps_token_types = True
    forward = _forward_of(peft.PeftModelForSequenceClassification)


class FusedTokenClassification(_Fused, peft.PeftModelForTokenClassification):  # type: ignore[misc]
    """``PeftModelForTokenClassification`` on our kernels."""

    keeps_token_types = True
    forward = _forward_of(peft.PeftModelForTokenClassification)


class FusedQuestionAnswering(_Fused, peft.PeftModelForQuestionAnswering):  # type: ignore[misc]
    """``PeftModelForQuestionAnswering`` on our kernels."""

    ignored = ("token_type_ids", "position_ids")
    keeps_token_types = True
    forward = _forward_of(peft.PeftModelForQuestionAnswering)


class FusedFeatureExtraction(_Fused, peft.PeftModelForFeatureExtraction):  # type: ignore[misc]
    """``PeftModelForFeatureExtraction`` on our kernels."""

    forward = _forward_of(peft.PeftModelForFeatureExtraction)


class FusedSeq2SeqLM(_Fused, peft.PeftModelForSeq2SeqLM):  # type: ignore[misc]
    """``PeftModelForSeq2SeqLM`` whose encoder reads the prompt."""

    forward = _forward_of(peft.PeftModelForSeq2SeqLM)


_SERVED: dict[type, Any] = {
    peft.PeftModelForCausalLM: FusedCausalLM,
    peft.PeftModelForSequenceClassification: FusedSequenceClassification,
    peft.PeftModelForTokenClassification: FusedTokenClassification,
    peft.PeftModelForQuestionAnswering: FusedQuestionAnswering,
    peft.PeftModelForFeatureExtraction: FusedFeatureExtraction,
    peft.PeftModelForSeq2SeqLM: FusedSeq2SeqLM,
}
for _plain, _fused in _SERVED.items():
    setattr(_fused, PLAIN, _plain)


def find(model: nn.Module) -> Iterator[Found]:
    """Yield every model of peft whose active adapter is a prompt."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, peft.PeftModel) and module._is_prompt_learning:
            op = _op(module) or ""
            reason = _why_not(module)
            fused = None if reason else _SERVED[_plain_class(module)]
            yield Found(name, module, op, fused, reason or "")


def _why_not(model: Any) -> str | None:
    plain = _plain_class(model)
    if plain is peft.PeftModel:
        return "without a task_type, peft gives the model no prompt"
    if plain not in _SERVED:
        return f"a {plain.__qualname__} has a forward of its own"
    op = _op(model)
    if op is None:
        return f"no kernel for {', '.join(_types(model)) or 'no active adapter'}"
    if "forward" in model.__dict__ and not _is_own(model, "forward"):
        return "its forward was replaced (call accelerate first)"
    if op == "prefix_attention":
        return peft_prefixes.why_not(model)
    if plain is peft.PeftModelForSeq2SeqLM and "MULTITASK_PROMPT_TUNING" in _types(model):
        return "a prompt for the decoder too has no kernel"
    return _why_not_words(model.word_embeddings)


def _plain_class(model: nn.Module) -> type:
    return type(model).__dict__.get(PLAIN, type(model))  # type: ignore[no-any-return]


def _types(model: Any) -> list[str]:
    """Return the name of the active adapter's method, none where all adapters were deleted."""
    active = model.active_adapter
    return [model.peft_config[active].peft_type.value] if isinstance(active, str) else []


def _op(model: Any) -> str | None:
    return next((_OPS.get(each) for each in _types(model)), None)


def _why_not_words(words: Any) -> str | None:
    """Return why rows of the word embeddings cannot be read without calling them."""
    if type(words) is not nn.Embedding:
        return f"its word embeddings are a {type(words).__module__}.{type(words).__qualname__}"
    trained = words.weight.requires_grad
    if words.max_norm is not None or (trained and (words.sparse or words.scale_grad_by_freq)):
        return "its word embeddings have max_norm, or sparse or scaled gradients"
    hooks = [*words._forward_hooks.values()]
    others = words._forward_pre_hooks or words._backward_hooks or words._backward_pre_hooks
    # Hooks for checkpointing make the result need gradients, as it does behind a trained prompt.
    if others or "forward" in words.__dict__ or not all(map(_requires_gradients, hooks)):
        return "its word embeddings have hooks or a forward of their own (offloading)"
    if type(words.weight) not in _PLAIN_TENSORS:
        return f"its word embeddings are a {type(words.weight).__qualname__}"
    return None


def _requires_gradients(hook: Any) -> bool:
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")


def _wants_attentions(model: Any, inputs: dict[str, Any]) -> bool:
    wanted = inputs.get("output_attentions")
    return bool(model.base_model.config.output_attentions if wanted is None else wanted)


def _takes_generation(model: Any, given: dict[str, Any]) -> bool:
    """Return whether ``generate`` may keep the prefix out of the cache."""
    mask, cache = given.get("attention_mask"), given.get("past_key_values")
    if given.get("inputs_embeds") is not None or (mask is not None and mask.dim() != 2):
        return False
    configs = given.get("generation_config"), model.base_model.generation_config
    if any(getattr(each, "output_attentions", False) for each in configs):
        return False
    if cache is not None and cache.get_seq_length() and not hasattr(cache, _WITHOUT_PREFIX):
        return False
    return not _wants_attentions(model, given)


def _adjust(model: Any, inputs: dict[str, Any], keeps_token_types: bool) -> None:
    """Do to positions and token types what this version of peft does."""
    adjust = getattr(model, "_adjust_prompt_learning_kwargs", None)
    if adjust is not None:
        adjust(model.active_peft_config, kwargs=inputs, remove_token_type_ids=not keeps_token_types)
        return
    for name in ("position_ids",) if keeps_token_types else ("position_ids", "token_type_ids"):
        if inputs.get(name) is not None:
            warnings.warn(f"peft takes no {name} beside a prompt: ignored", stacklevel=4)
            inputs[name] = None


def _uncover(model: Any) -> None:
    """Remove what ``disable_adapter`` leaves behind: methods of the class, kept by the model."""
    for name in ("forward", "prepare_inputs_for_generation"):
        if _is_own(model, name):
            del model.__dict__[name]


def _is_own(model: Any, name: str) -> bool:
    """Return whether the model keeps a method that its class, or its plain class, has anyway."""
    method = model.__dict__.get(name)
    if not inspect.ismethod(method) or method.__self__ is not model:
        return False
    owners = type(model), _plain_class(model)
    return any(method.__func__ is getattr(each, name, None) for each in owners)
