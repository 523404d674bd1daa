"""Small models and how they are trained: by one process, and by one of several."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peft_kernels import (
    LoRALinear,
    PromptEmbedding,
    add_adapters,
    attach_prefixes,
    load_adapter,
    replace,
    save_adapter,
)

VOCABULARY, BATCH, LENGTH, STEPS = 48, 4, 10, 4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama() -> nn.Module:
    """Return a frozen Llama of two layers with biases, the same on every rank."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def lora(dropout: float = 0.0) -> nn.Module:
    """Return the Llama with LoRA in every projection, A and B random."""
    model = llama()

    def build(linear: nn.Module) -> nn.Module:
        assert isinstance(linear, nn.Linear)
        layer = LoRALinear.from_linear(linear, r=3, lora_alpha=6, lora_dropout=dropout)
        nn.init.normal_(layer.lora_B, std=0.1)
        return layer

    replace(model, PROJECTIONS, build)
    return model


def adapters() -> nn.Module:
    """Return the Llama with a bottleneck behind each feed-forward layer."""
    model = llama()
    add_adapters(model, "mlp", d_model=32, reduction_factor=4)
    return model


def prefixes() -> nn.Module:
    """Return the Llama with a prefix in each attention layer."""
    model = llama()
    attach_prefixes(model, num_virtual_tokens=3)
    return model


class Prompted(nn.Module):
    """The Llama behind a trained prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()
        table = self.model.get_input_embeddings()
        self.prompt = PromptEmbedding(table, num_virtual_tokens=3, init="vocab")

    def forward(self, input_ids: Tensor, labels: Tensor) -> object:
        given = self.prompt(input_ids, torch.ones_like(input_ids), labels)
        return self.model(
            inputs_embeds=given.embeddings, attention_mask=given.attention_mask,
            position_ids=given.position_ids, labels=given.labels,
        )  # fmt: skip


METHODS = {"lora": lora, "adapters": adapters, "prefixes": prefixes, "prompt": Prompted}


def batches() -> list[Tensor]:
    """Return the token ids [BATCH, LENGTH] of each step: sequences that can be learned."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(VOCABULARY, (STEPS, BATCH, 1), generator=generator)
    return list((starts + 5 * torch.arange(LENGTH)) % VOCABULARY)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def train(
    model: nn.Module, *, part: int = 0, parts: int = 1, average: tuple[str, ...] = ()
) -> list[float]:
    """Train for STEPS steps and return the losses, over the whole batch.

    Args:
        model: what is trained, distributed or not.
        part: which rows of the batch this rank takes.
        parts: in how many parts the ranks share the batch; their losses are averaged.
        average: names of parameters whose gradients are averaged over the ranks here.
    """
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses = []
    for ids in batches():
        rows = ids.chunk(parts)[part]
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        for name in average:
            gradient = parameters[name].grad
            assert gradient is not None
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        optimizer.step()
        total = loss.detach().clone()
        if parts > 1:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(total.item())
    return losses


def train_apart(model: nn.Module, average: tuple[str, ...] = ()) -> list[float]:
    """Train as ``train`` does, each rank on its rows of the batch."""
    return train(model, part=dist.get_rank(), parts=dist.get_world_size(), average=average)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batches()[0], labels=batches()[0]).logits


def assert_same_losses(losses: list[float], expected: list[float]) -> None:
    """Compare to 1e-5, of losses that moved by far more than that."""
    assert max(expected) - min(expected) > 1e-3, expected
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-5)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def common_folder() -> Iterator[Path]:
    """Give all ranks one folder, until each is done with it."""
    names: list[str | None] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    folder = Path(str(names[0]))
    yield folder
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def saves_and_loads_adapters(
    make: Callable[[], nn.Module], distribute: Callable[[nn.Module], nn.Module]
) -> None:
    """Shards are saved as one adapter, which whole models load and sharded ones."""
    model = distribute(make())
    for parameter in trained(model).values():
        with torch.no_grad():
            parameter.add_(0.5)
    expected = logits(model)
    with common_folder() as folder:
        save_adapter(model, folder, task_type="CAUSAL_LM")
        dist.barrier()  # the first process writes
        for other in (make(), distribute(make())):
            assert (logits(other) - expected).abs().max() > 1e-3
            load_adapter(other, folder)
            torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-5)
