"""Checks that ranks run together: models under tensor parallelism, and its mixture with FSDP2."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from peft_kernels import LoRAColwiseParallel, LoRARowwiseParallel
from tests.distributed.data_parallel import BROADCAST, FULL, shard
from tests.distributed.models import (
    assert_same_losses,
    common_folder,
    logits,
    lora,
    saves_and_loads_adapters,
    train,
    trained,
    whole,
)

PLAN = {
    "model.layers.*.self_attn.[qkv]_proj": LoRAColwiseParallel,
    "model.layers.*.self_attn.o_proj": LoRARowwiseParallel,
    "model.layers.*.mlp.gate_proj": LoRAColwiseParallel,
    "model.layers.*.mlp.up_proj": LoRAColwiseParallel,
    "model.layers.*.mlp.down_proj": LoRARowwiseParallel,
}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def two_dimensions() -> DeviceMesh:
    shape = (dist.get_world_size() // 2, 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))


def tensor_parallel(model: nn.Module, over: DeviceMesh | None = None) -> nn.Module:
    return parallelize_module(model, over or mesh(), {key: style() for key, style in PLAN.items()})


def losses() -> None:
    one, model = lora(), tensor_parallel(lora())
    assert_same_losses(train(model), train(one))
    for name, parameter in trained(model).items():
        assert isinstance(parameter, DTensor) and not parameter.grad.placements[0].is_partial()
        torch.testing.assert_close(whole(parameter), trained(one)[name], rtol=0, atol=1e-4)


def losses_with_checkpointing() -> None:
    expected = train(lora())
    model = tensor_parallel(lora())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_losses(train(model), expected)


def losses_beside_fsdp() -> None:
    """Two dimensions: the ranks of a row share the layers, the rows share the batch."""
    expected = train(lora())
    both = two_dimensions()
    model = shard(tensor_parallel(lora(), both["tp"]), mesh=both["dp"])
    part, parts = both.get_local_rank("dp"), both["dp"].size()
    assert_same_losses(train(model, part=part, parts=parts), expected)


def adapter_files() -> None:
    saves_and_loads_adapters(lora, tensor_parallel)


def adapter_files_beside_fsdp() -> None:
    saves_and_loads_adapters(lora, _in_two_dimensions)


def _in_two_dimensions(model: nn.Module) -> nn.Module:
    both = two_dimensions()
    return shard(tensor_parallel(model, both["tp"]), mesh=both["dp"])


def checkpoints_of_one_process() -> None:
    """What tensor-parallel ranks trained loads into one process, and back."""
    one, model = lora(), tensor_parallel(lora())
    train(model)
    state = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        one.load_state_dict(state)
    state = [one.state_dict()]
    dist.broadcast_object_list(state)
    one.load_state_dict(state[0])
    torch.testing.assert_close(logits(one), logits(model), rtol=0, atol=1e-5)
    again = tensor_parallel(lora())
    assert (logits(again) - logits(one)).abs().max() > 1e-3
    set_model_state_dict(again, one.state_dict() if dist.get_rank() == 0 else {}, options=BROADCAST)
    torch.testing.assert_close(logits(again), logits(one), rtol=0, atol=1e-5)


def checkpoints_between_engines() -> None:
    """``torch.distributed.checkpoint``: written by tensor-parallel ranks, read under FSDP2."""
    model = tensor_parallel(lora())
    train(model)
    other = shard(lora())
    assert (logits(other) - logits(model)).abs().max() > 1e-3
    with common_folder() as folder:
        dcp.save(get_model_state_dict(model), checkpoint_id=folder)
        state = get_model_state_dict(other)
        dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-5)


CHECKS: dict[str, Callable[[], None]] = {
    f"tp_{check.__name__}": check
    for check in (
        losses,
        losses_with_checkpointing,
        losses_beside_fsdp,
        adapter_files,
        adapter_files_beside_fsdp,
        checkpoints_of_one_process,
        checkpoints_between_engines,
    )
}
