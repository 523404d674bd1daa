"""Checks that ranks run together: DDP and FSDP2 train what one process trains."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_kernels import attach_prefixes, load_adapter, save_adapter
from tests.distributed.models import (
    METHODS,
    assert_same_losses,
    batches,
    common_folder,
    llama,
    logits,
    lora,
    saves_and_loads_adapters,
    train,
    train_apart,
    trained,
)

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def shard(model: nn.Module, **options: object) -> nn.Module:
    """Shard the model: each decoder layer by itself, the rest together."""
    for module in list(model.modules()):
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def ddp(method: str) -> None:
    expected = train(METHODS[method]())
    model = DistributedDataParallel(METHODS[method]())
    assert_same_losses(train_apart(model), expected)


def fsdp(method: str) -> None:
    """Losses, and the state dict of what was trained, go back into one process."""
    one = METHODS[method]()
    expected = train(one)
    model = shard(METHODS[method]())
    assert all(isinstance(each, DTensor) for each in model.parameters())
    assert_same_losses(train_apart(model), expected)
    state = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        fresh = METHODS[method]()
        assert (logits(fresh) - logits(one)).abs().max() > 1e-3
        fresh.load_state_dict(state)
        torch.testing.assert_close(logits(fresh), logits(one), rtol=0, atol=1e-5)


def fsdp_loads_what_one_process_trained() -> None:
    one = lora()
    train(one)
    model = shard(lora())
    state = one.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=BROADCAST)
    torch.testing.assert_close(logits(model), logits(one), rtol=0, atol=1e-5)


def shifted_prefixes() -> nn.Module:
    """Return the Llama with prefixes as peft has them."""
    model = llama()
    attach_prefixes(model, num_virtual_tokens=3, shift_positions=True)
    return model


FILED = {"lora": lora, "prefixes": shifted_prefixes, "prompt": METHODS["prompt"]}


def layers_that_are_sharded_already_get_no_lora() -> None:
    with common_folder() as folder:
        save_adapter(lora(), folder)
        dist.barrier()
        with pytest.raises(ValueError, match="q_proj' is sharded already: load the adapter, or"):
            load_adapter(shard(llama()), folder)


def fsdp_with_whole_adapters() -> None:
    """Adapters left out of the sharding, their gradients averaged by the training loop."""
    expected = train(lora())
    model = lora()
    kept = trained(model)
    shard(model, ignored_params=set(kept.values()))
    assert not any(isinstance(each, DTensor) for each in kept.values())
    assert isinstance(model.get_parameter("model.layers.0.mlp.up_proj.weight"), DTensor)
    assert_same_losses(train_apart(model, average=tuple(kept)), expected)


def fsdp_in_mixed_precision() -> None:
    """float32 parameters, bfloat16 computation, float32 sums of gradients."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(lora(), mp_policy=policy)
    losses = train_apart(model)
    assert all(each.dtype == torch.float32 for each in model.parameters())
    expected = _one_process_in_mixed_precision(lora())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-5)
    assert max(expected) - min(expected) > 1e-3


def _one_process_in_mixed_precision(model: nn.Module) -> list[float]:
    """Return the losses of the same arithmetic without FSDP: each rank's rows, one by one."""
    wide = trained(model)
    optimizer = torch.optim.AdamW(wide.values(), lr=1e-2)
    losses = []
    for ids in batches():
        narrow = copy.deepcopy(model)
        for parameter in narrow.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        sums = {name: torch.zeros_like(parameter) for name, parameter in wide.items()}
        total = 0.0
        for rows in ids.chunk(dist.get_world_size()):
            narrow.zero_grad()
            loss = narrow(input_ids=rows, labels=rows).loss
            loss.backward()
            total += loss.item() / dist.get_world_size()
            for name, parameter in trained(narrow).items():
                sums[name] += parameter.grad.float() / dist.get_world_size()
        for name, parameter in wide.items():
            parameter.grad = sums[name]
        optimizer.step()
        losses.append(total)
    return losses


def fsdp_with_checkpointing_and_dropout() -> None:
    """Recomputed layers draw the masks again that forward drew."""
    gradients = []
    for recompute in (False, True):
        model = lora(dropout=0.5)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        shard(model)
        torch.manual_seed(7 + dist.get_rank())
        rows = batches()[0].chunk(dist.get_world_size())[dist.get_rank()]
        model(input_ids=rows, labels=rows).loss.backward()
        gradients.append([each.grad.full_tensor() for each in trained(model).values()])
    assert max(each.abs().max() for each in gradients[0]) > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)


CHECKS: dict[str, Callable[[], None]] = {
    **{f"ddp_{method}": functools.partial(ddp, method) for method in METHODS},
    **{f"fsdp_{method}": functools.partial(fsdp, method) for method in METHODS},
    "fsdp_loads_what_one_process_trained": fsdp_loads_what_one_process_trained,
    **{
        f"fsdp_saves_and_loads_{name}": functools.partial(saves_and_loads_adapters, make, shard)
        for name, make in FILED.items()
    },
    "layers_that_are_sharded_already_get_no_lora": layers_that_are_sharded_already_get_no_lora,
    "fsdp_with_whole_adapters": fsdp_with_whole_adapters,
    "fsdp_in_mixed_precision": fsdp_in_mixed_precision,
    "fsdp_with_checkpointing_and_dropout": fsdp_with_checkpointing_and_dropout,
}
