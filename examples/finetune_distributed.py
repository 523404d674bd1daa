"""Fine-tune a causal language model by LoRA on one process or many, by PyTorch's own engines.

    python examples/finetune_distributed.py
    torchrun --nproc-per-node 4 examples/finetune_distributed.py --parallel fsdp
    torchrun --nproc-per-node 2 examples/finetune_distributed.py --parallel tp --model PATH

NCCL where there are GPUs, Gloo on CPUs. Without ``--model`` a small Llama with random weights reads
bytes. The text is real: the documentation strings of Python's standard library. At the end the
first rank writes the adapter as peft writes one: ``PeftModel.from_pretrained(base, OUT)`` loads it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from documentation import VOCABULARY, sequences
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_kernels import LoRAColwiseParallel, LoRALinear, LoRARowwiseParallel, replace

# Of Llama and its relatives; the first group is cut by output features, the second by input.
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder of a Llama-like model; default: small and random")
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "tp"), default="ddp")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA update")
    parser.add_argument("--dropout", type=float, default=0.05, help="of the LoRA branch's input")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, of all ranks")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("out/finetune_distributed"))
    return parser.parse_args()


def start_process_group() -> torch.device:
    """Join the other processes that ``torchrun`` started, if any; return this one's device."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if backend == "gloo":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def adapted_model(given: argparse.Namespace, device: torch.device) -> nn.Module:
    """Return the frozen model with LoRA in every projection, the same on every rank."""
    torch.manual_seed(0)
    if given.model is None:
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=given.length,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype)
    model.requires_grad_(False)

    def build(linear: nn.Module) -> nn.Module:
        assert isinstance(linear, nn.Linear)
        return LoRALinear.from_linear(
            linear, r=given.rank, lora_alpha=2 * given.rank, lora_dropout=given.dropout
        )

    replace(model, COLUMNS + ROWS, build)
    return model.to(device).train()


def distribute(model: nn.Module, parallel: str, mesh: DeviceMesh) -> nn.Module:
    """Return the model as the ranks of the mesh run it together."""
    if parallel == "ddp":
        return DistributedDataParallel(model)
    if parallel == "fsdp":
        for layer in model.get_submodule("model.layers").children():
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    styles = {name: LoRAColwiseParallel for name in COLUMNS} | {
        name: LoRARowwiseParallel for name in ROWS
    }
    plan = {
        name: styles[name.rpartition(".")[2]]()
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }
    return parallelize_module(model, mesh, plan)


def train(model: nn.Module, given: argparse.Namespace, device: torch.device) -> None:
    """Train for the given number of steps; the first rank prints the loss of the whole batch."""
    # Tensor-parallel ranks work on the same sequences, the others share them.
    parts, part = dist.get_world_size(), dist.get_rank()
    if given.parallel == "tp":
        parts, part = 1, 0
    if given.batch % parts:
        raise SystemExit(f"--batch must be divisible by the {parts} ranks, got {given.batch}")
    # The random model reads bytes, one from a folder has a tokenizer of its own.
    tokenizer = None if given.model is None else AutoTokenizer.from_pretrained(given.model)
    data = sequences(given.steps * given.batch, given.length, tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=given.lr)
    torch.manual_seed(1 + part)  # of the dropout masks
    start = time.perf_counter()
    for step, batch in enumerate(data.split(given.batch), start=1):
        ids = batch.chunk(parts)[part].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % max(1, given.steps // 10) == 0:
            total = loss.detach()
            dist.all_reduce(total)
            if dist.get_rank() == 0:
                tokens = step * batch.numel() / (time.perf_counter() - start)
                loss_value = total.item() / dist.get_world_size()
                print(f"step {step:5d}  loss {loss_value:.4f}  {tokens:8.0f} tokens/s", flush=True)


def save(model: nn.Module, given: argparse.Namespace) -> None:
    """Write the adapter in peft's format, from the first rank."""
    # Collective: every rank gives its shards.
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=gather)
    if dist.get_rank() != 0:
        return
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": given.model,
        "r": given.rank,
        "lora_alpha": 2 * given.rank,
        "lora_dropout": given.dropout,
        "target_modules": [*COLUMNS, *ROWS],
        "bias": "none",
    }
    given.out.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}.weight": each for name, each in state.items()}
    temporary = given.out / "adapter_model.safetensors.new"
    save_file({name: each.contiguous() for name, each in tensors.items()}, temporary)
    temporary.replace(given.out / "adapter_model.safetensors")
    (given.out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {given.out}: {len(tensors)} tensors", flush=True)


def adapt(given: argparse.Namespace, device: torch.device, mesh: DeviceMesh) -> None:
    """Adapt, distribute, train, save."""
    model = distribute(adapted_model(given, device), given.parallel, mesh)
    train(model, given, device)
    save(model, given)
    dist.barrier()  # Who left while the first rank writes would tear connections down under it.


def main() -> None:
    """Do it, and end the threads of the process group with the group."""
    given = options()
    device = start_process_group()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    try:
        adapt(given, device, mesh)
    finally:
        # A thread of Gloo's that frees a tensor while Python ends aborts the process. Such threads
        # live until the last reference to their group is gone: the model's are in cycles, and the
        # mesh, which has one too, stays in DTensor's caches (pytorch/pytorch#179291).
        gc.collect()
        vars(mesh).clear()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
