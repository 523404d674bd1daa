"""Prompt learning of peft on fused kernels: the same ``PeftModel`` with another forward.

Prefix tuning runs on ``prefix_attention`` (see ``peft_prefixes``), prompt tuning and P-tuning on
``prompt_embedding``. What a call brings that they do not take goes to peft's forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.prompt_tuning import PromptEmbedding
from torch import Tensor, nn

from peft_kernels.models.fused import peft_prefixes
from peft_kernels.models.fused.found import PLAIN, Found
from peft_kernels.models.fused.peft_prompt_calls import (
    PLAIN_TENSORS,
    WITHOUT_PREFIX,
    adjust_inputs,
    keeps_own,
    op_of,
    plain_class,
    takes_generation,
    types_of,
    uncover,
    wants_attentions,
    why_not_words,
)
from peft_kernels.prompt.op import prompt_embedding

_INTEGERS = (torch.int64, torch.int32)
_GENERATING = "_peft_kernels_generating"


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
        uncover(self)
        if op_of(self) == "prefix_attention":
            peft_prefixes.acquire(self)

    def _peft_kernels_released(self: Any) -> None:
        uncover(self)
        peft_prefixes.release(self)

    @contextmanager
    def disable_adapter(self: Any) -> Iterator[None]:
        """Let the base model be called as if there were no prompt, in a ``with`` statement."""
        try:
            with peft_prefixes.plain_attention(self), super().disable_adapter():  # type: ignore[misc]
                yield
        finally:
            uncover(self)

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
        op = op_of(self)
        if op == "prefix_attention":
            return peft_prefixes.fits(self) and not wants_attentions(self, inputs)
        return op is not None and self._takes_prompt(ids, inputs)

    def _fused_forward(self: Any, inputs: dict[str, Any]) -> Any:
        inputs = {name: value for name, value in inputs.items() if name not in self.ignored}
        adjust_inputs(self, inputs, self.keeps_token_types)
        if op_of(self) == "prefix_attention":
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
            return self.get_prompt(batch, task_ids)
        prompt = encoder.embedding.weight
        if type(encoder) is not PromptEmbedding and not config.inference_mode:
            prompt = self.get_prompt(1)[0]
        return prompt[: config.num_virtual_tokens]

    def _takes_prompt(self: Any, ids: Tensor, inputs: dict[str, Any]) -> bool:
        config, words = self.active_peft_config, self.word_embeddings
        if why_not_words(words) or words.weight.device != ids.device:
            return False
        encoder = self.prompt_encoder[self.active_adapter].embedding.weight
        dtypes = (encoder.dtype, words.weight.dtype)
        if type(encoder) not in PLAIN_TENSORS or encoder.device != ids.device:
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


class FusedCausalLM(_Fused, peft.PeftModelForCausalLM):
    """``PeftModelForCausalLM`` on our kernels; ``generate`` too, for a prefix."""

    extends_labels = True
    forward = _forward_of(peft.PeftModelForCausalLM)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base model generates behind the prompt."""
        if op_of(self) != "prefix_attention" or self._adapters_disabled:
            return super().generate(*args, **kwargs)
        if not peft_prefixes.fits(self) or not takes_generation(self, kwargs):
            with peft_prefixes.plain_attention(self):
                return super().generate(*args, **kwargs)
        with torch.no_grad(), peft_prefixes.opened(self) as prefixes:
            self.__dict__[_GENERATING] = prefixes
            try:
                return super().generate(*args, **kwargs)
            finally:
                del self.__dict__[_GENERATING]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the arguments of the base model's next call."""
        prefixes = self.__dict__.get(_GENERATING)
        if prefixes is None:
            return super().prepare_inputs_for_generation(*args, **kwargs)
        kwargs.pop("task_ids", None)
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        adjust_inputs(self, inputs, self.keeps_token_types)
        cache = inputs.get("past_key_values")
        if cache is not None:
            setattr(cache, WITHOUT_PREFIX, True)
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = peft_prefixes.positions(
                self.base_model, inputs["input_ids"], self.active_peft_config.num_virtual_tokens,
                0 if cache is None else cache.get_seq_length(),
            )  # fmt: skip
        return inputs | prefixes.argument()


class FusedSequenceClassification(_Fused, peft.PeftModelForSequenceClassification):
    """``PeftModelForSequenceClassification`` on our kernels."""

    keeps_token_types = True
    forward = _forward_of(peft.PeftModelForSequenceClassification)


class FusedTokenClassification(_Fused, peft.PeftModelForTokenClassification):
    """``PeftModelForTokenClassification`` on our kernels."""

    keeps_token_types = True
    forward = _forward_of(peft.PeftModelForTokenClassification)


class FusedQuestionAnswering(_Fused, peft.PeftModelForQuestionAnswering):
    """``PeftModelForQuestionAnswering`` on our kernels."""

    ignored = ("token_type_ids", "position_ids")
    keeps_token_types = True
    forward = _forward_of(peft.PeftModelForQuestionAnswering)


class FusedFeatureExtraction(_Fused, peft.PeftModelForFeatureExtraction):
    """``PeftModelForFeatureExtraction`` on our kernels."""

    forward = _forward_of(peft.PeftModelForFeatureExtraction)


class FusedSeq2SeqLM(_Fused, peft.PeftModelForSeq2SeqLM):
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
            op = op_of(module) or ""
            reason = _why_not(module)
            fused = None if reason else _SERVED[plain_class(module)]
            yield Found(name, module, op, fused, reason or "")


def _why_not(model: Any) -> str | None:
    plain = plain_class(model)
    if plain is peft.PeftModel:
        return "without a task_type, peft gives the model no prompt"
    if plain not in _SERVED:
        return f"a {plain.__qualname__} has a forward of its own"
    op = op_of(model)
    if op is None:
        return f"no kernel for {', '.join(types_of(model)) or 'no active adapter'}"
    if "forward" in model.__dict__ and not keeps_own(model, "forward"):
        return "its forward was replaced (call accelerate first)"
    if op == "prefix_attention":
        return peft_prefixes.why_not(model)
    if plain is peft.PeftModelForSeq2SeqLM and "MULTITASK_PROMPT_TUNING" in types_of(model):
        return "a prompt for the decoder too has no kernel"
    return why_not_words(model.word_embeddings)
