"""Fine-tune by LoRA in a plain PyTorch loop: mixed precision, accumulation, checkpointing, compile.

    python examples/finetune_pytorch.py --precision bf16 --checkpoint
    python examples/finetune_pytorch.py --precision fp16 --accumulate 4 --compile

A small Llama with random weights reads the documentation of Python's standard library as bytes. No
peft is needed: ``replace`` swaps the projections for ``LoRALinear``.
"""

from __future__ import annotations

import argparse
import time

import torch
from documentation import VOCABULARY, sequences
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kernels import LoRALinear, replace

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA update")
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of one step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32", help="of autocast")
    parser.add_argument("--checkpoint", choices=("no", "saved", "reentrant"), default="no")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the whole model")
    return parser.parse_args()


def adapted_model(given: argparse.Namespace) -> LlamaForCausalLM:
    """Return the frozen model with LoRA in every projection."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=given.length,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)

    def build(linear: nn.Module) -> nn.Module:
        assert isinstance(linear, nn.Linear)
        return LoRALinear.from_linear(
            linear, r=given.rank, lora_alpha=2 * given.rank, lora_dropout=0.05
        )

    replace(model, PROJECTIONS, build)
    if given.checkpoint != "no":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": given.checkpoint == "reentrant"})
    return model.train()


def main() -> None:
    """Adapt and train, printing the loss."""
    given = options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = adapted_model(given).to(device)
    run = torch.compile(model) if given.compile else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=given.precision == "fp16")
    batches = sequences(given.steps * given.accumulate * given.batch, given.length)
    start = time.perf_counter()
    for step, part in enumerate(batches.split(given.accumulate * given.batch), start=1):
        total = 0.0
        for ids in part.to(device).split(given.batch):
            with torch.autocast(
                device.type, DTYPES[given.precision], enabled=given.precision != "fp32"
            ):
                loss = run(input_ids=ids, labels=ids).loss / given.accumulate
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 1 or step % max(1, given.steps // 10) == 0:
            rate = step * part.numel() / (time.perf_counter() - start)
            print(f"step {step:5d}  loss {total:.4f}  {rate:8.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
