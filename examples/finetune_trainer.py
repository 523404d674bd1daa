"""Fine-tune by LoRA with transformers' Trainer: peft builds the model, ``accelerate`` speeds it up.

    python examples/finetune_trainer.py
    python examples/finetune_trainer.py --model PATH --bf16 --gradient-checkpointing

Without ``--model`` a small Llama with random weights reads bytes. The text is the documentation of
Python's standard library. The adapter is saved as peft saves it.
"""

from __future__ import annotations

import argparse
from typing import Any

from documentation import VOCABULARY, sequences
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from peft_kernels import accelerate


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder of a causal language model; default: small, random")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA update")
    parser.add_argument("--batch", type=int, default=8, help="sequences a device takes at a time")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of one step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the whole model")
    parser.add_argument("--eager", action="store_true", help="peft's own layers, to compare")
    parser.add_argument("--out", default="out/finetune_trainer")
    return parser.parse_args()


def base_model(given: argparse.Namespace) -> PreTrainedModel:
    """Return the model that is adapted."""
    if given.model is not None:
        return AutoModelForCausalLM.from_pretrained(given.model)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=given.length,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Sequences(Dataset[dict[str, Tensor]]):
    """Token ids, which are their own labels."""

    def __init__(self, given: argparse.Namespace) -> None:
        """Read the text."""
        count = given.steps * given.batch * given.accumulate
        self.ids = sequences(count, given.length)
        if given.model is not None:
            tokenizer = AutoTokenizer.from_pretrained(given.model)
            text = bytes(self.ids.flatten().tolist()).decode(errors="ignore")
            ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
            rows = len(ids) // given.length
            self.ids = ids[: rows * given.length].reshape(rows, given.length)

    def __len__(self) -> int:
        """Return how many sequences there are."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sequence."""
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def main() -> None:
    """Adapt, accelerate, train, save."""
    given = options()
    arguments = TrainingArguments(
        output_dir=given.out, max_steps=given.steps, per_device_train_batch_size=given.batch,
        gradient_accumulation_steps=given.accumulate, learning_rate=2e-3, bf16=given.bf16,
        gradient_checkpointing=given.gradient_checkpointing, torch_compile=given.compile,
        logging_steps=max(1, given.steps // 10), save_strategy="no", report_to="none", seed=0,
    )  # fmt: skip
    config = LoraConfig(
        task_type="CAUSAL_LM", r=given.rank, lora_alpha=2 * given.rank, lora_dropout=0.05,
        target_modules="all-linear",
    )  # fmt: skip
    model = get_peft_model(base_model(given), config)
    if not given.eager:
        print(accelerate(model))
    trainer = Trainer(model, arguments, train_dataset=Sequences(given))
    trainer.train()
    model.save_pretrained(given.out)


if __name__ == "__main__":
    main()
