"""Fine-tune BERT by LoRA with Hugging Face Accelerate: does a text document a module or a function?

    python examples/finetune_accelerate.py
    accelerate launch examples/finetune_accelerate.py --mixed-precision bf16

Without ``--model`` a small BERT with random weights reads bytes. The texts are the documentation of
Python's standard library, the classes what they document. Prints the accuracy on texts not seen.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from documentation import KINDS, PADDING, VOCABULARY, labelled
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import peft_kernels


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA update")
    parser.add_argument("--batch", type=int, default=16, help="texts a device takes at a time")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of one step")
    parser.add_argument("--length", type=int, default=96, help="bytes of a text that are read")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--eager", action="store_true", help="peft's own layers, to compare")
    parser.add_argument("--out", default="out/finetune_accelerate")
    return parser.parse_args()


def adapted_model(given: argparse.Namespace) -> nn.Module:
    """Return the frozen BERT with LoRA in every projection and a trained classifier."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=given.length, num_labels=len(KINDS),
        pad_token_id=PADDING,
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(
        BertForSequenceClassification(config),
        LoraConfig(
            task_type="SEQ_CLS", r=given.rank, lora_alpha=2 * given.rank, lora_dropout=0.05,
            target_modules="all-linear",
        ),
    )  # fmt: skip
    if not given.eager:
        print(peft_kernels.accelerate(model))
    return model


def main() -> None:
    """Adapt, accelerate, train, score, save."""
    given = options()
    runner = Accelerator(
        mixed_precision=given.mixed_precision, gradient_accumulation_steps=given.accumulate
    )
    model = adapted_model(given)
    texts = TensorDataset(*labelled(given.steps * given.batch * given.accumulate, given.length))
    unseen = TensorDataset(*(each[-256:] for each in labelled(len(texts) + 256, given.length)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model, optimizer, train, test = runner.prepare(
        model, optimizer, DataLoader(texts, given.batch), DataLoader(unseen, given.batch)
    )
    every = max(1, len(train) // 10)
    for step, (ids, mask, kinds) in enumerate(train, start=1):
        with runner.accumulate(model):
            loss = model(input_ids=ids, attention_mask=mask, labels=kinds).loss
            runner.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if step % every == 0:
            runner.print(f"batch {step:5d}  loss {loss.item():.4f}")
    model.eval()
    right = total = 0
    for ids, mask, kinds in test:
        with torch.no_grad():
            found = model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
        found, kinds = runner.gather_for_metrics((found, kinds))
        right, total = right + int((found == kinds).sum()), total + len(kinds)
    runner.print(f"accuracy on {total} unseen texts: {right / total:.3f}")
    if runner.is_main_process:
        runner.unwrap_model(model).save_pretrained(given.out)


if __name__ == "__main__":
    main()
