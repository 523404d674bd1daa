"""Tensor parallelism of LoRA layers: styles for ``parallelize_module``.

Each rank runs the layer's own forward on its shard, so that it is the fused op that runs; the
collectives stand around it. Per token, with W, A, B, x and y whole and the index r for a rank:

    column:  y_r = x W_rᵀ + s · drop(x) Aᵀ B_rᵀ         A is on every rank, dA and dx are summed
    row:     y = Σ_r x_r W_rᵀ + s · drop(x_r) A_rᵀ Bᵀ    B is on every rank, dB is summed

The row form is linear in the rank's part, so drop(x) Aᵀ needs no collective of its own: one sum,
that of y, serves both terms. A parameter is a DTensor, as under torch's own styles, so that
optimizers, state dicts and ``torch.distributed.checkpoint`` see whole tensors.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from peft_kernels.models.parallel.layers import check_layer, parameters
from peft_kernels.models.parallel.local_forward import LocalForward, awaited

# Where each tensor of a LoRA layer is cut, by what it is.
_BY_COLUMN: dict[str, Placement] = {
    "weight": Shard(0),
    "bias": Shard(0),
    "lora_A": Replicate(),
    "lora_B": Shard(0),
}
_BY_ROW: dict[str, Placement] = {
    "weight": Shard(1),
    "bias": Replicate(),
    "lora_A": Shard(1),
    "lora_B": Replicate(),
}


class LoRAColwiseParallel(ParallelStyle):
    """Cut a LoRA layer by output features: torch's ``ColwiseParallel`` for LoRA layers.

    For ``LoRALinear`` and for the LoRA ``Linear`` of peft on an ``nn.Linear``. ``weight``,
    ``lora_B`` and ``bias`` become DTensors cut on dimension 0; ``lora_A`` is on every rank, and
    its gradient summed over the ranks. Build the optimizer afterwards, as with torch's styles.

    With dropout, every rank uses the mask of the mesh's first rank: its seed is sent to the others
    in each training step, whatever the state of their generators. It is the mask that one process
    draws from the same state.

    Args:
        input_layouts: placement of the input when it is a plain tensor; None: replicated.
        output_layouts: placement of the output; None: cut on the last dimension.
        use_local_output: return the rank's tensor instead of a DTensor.

    Raises:
        TypeError: when applied to a module that is no LoRA layer.
        ValueError: when applied to features that the ranks do not divide, to a mesh of more than
            one dimension, or to a layer of peft that is more than LoRA (DoRA, a quantised base).

    Example:
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from peft_kernels import LoRAColwiseParallel, LoRARowwiseParallel
        >>> plan = {"mlp.up_proj": LoRAColwiseParallel(), "mlp.down_proj": LoRARowwiseParallel()}
        >>> def shard(block, mesh):
        ...     return parallelize_module(block, mesh, plan)  # under torchrun
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        """Keep the layouts."""
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Shard(-1)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def same_seed(seed: Tensor) -> Tensor:
            return awaited(collectives.broadcast(seed, 0, device_mesh))

        _distribute(module, device_mesh, _BY_COLUMN, "out_features", self.src_data_rank)
        LocalForward(
            device_mesh, self.use_local_output, same_seed,
            given=self.input_layouts, wanted=Replicate(),
            made=Shard(-1), returned=self.output_layouts,
        ).attach(module)  # fmt: skip
        return module


class LoRARowwiseParallel(ParallelStyle):
    """Cut a LoRA layer by input features: torch's ``RowwiseParallel`` for LoRA layers.

    For ``LoRALinear`` and for the LoRA ``Linear`` of peft on an ``nn.Linear``. ``weight`` and
    ``lora_A`` become DTensors cut on dimension 1; ``lora_B`` and ``bias`` are on every rank, and
    the gradient of ``lora_B`` is summed over the ranks. The outputs of the ranks are summed (or
    reduced and scattered, by ``output_layouts``), the bias among them once. The sum rounds once a
    rank more than one process does. Build the optimizer afterwards, as with torch's styles.

    With dropout, each rank draws a mask for its own columns, another one on each rank even where
    their generators agree. It is not the mask of one process.

    Args:
        input_layouts: placement of the input when it is a plain tensor; None: cut on the last
            dimension.
        output_layouts: placement of the output; None: replicated.
        use_local_output: return the rank's tensor instead of a DTensor.

    Raises:
        TypeError: when applied to a module that is no LoRA layer.
        ValueError: as ``LoRAColwiseParallel`` raises.

    Example:
        >>> from torch.distributed.tensor import Shard
        >>> from peft_kernels import LoRARowwiseParallel
        >>> style = LoRARowwiseParallel(output_layouts=Shard(1))  # the next layer cuts the sequence
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        """Keep the layouts."""
        super().__init__()
        self.input_layouts = input_layouts or Shard(-1)
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        rank = device_mesh.get_local_rank()
        _distribute(module, device_mesh, _BY_ROW, "in_features", self.src_data_rank)
        LocalForward(
            device_mesh, self.use_local_output, lambda seed: seed ^ rank,
            given=self.input_layouts, wanted=Shard(-1),
            made=Partial(), returned=self.output_layouts,
        ).attach(module)  # fmt: skip
        return module


def _distribute(
    module: nn.Module,
    mesh: DeviceMesh,
    plan: dict[str, Placement],
    cut: str,
    src_data_rank: int | None,
) -> None:
    """Make DTensors of the parameters of ``module``, cut by ``plan``."""
    check_layer(module)
    if mesh.ndim != 1:
        raise ValueError(
            f"device_mesh must have one dimension, got {mesh.ndim}: pass the tensor-parallel one, "
            f"mesh['tp']"
        )
    features = getattr(module, cut)
    if features % mesh.size():
        raise ValueError(f"{cut} must be divisible by the {mesh.size()} ranks, got {features}")
    held = list(parameters(module))
    if any(isinstance(parameter, DTensor) for *_, parameter in held):
        raise ValueError(f"this {type(module).__name__} is distributed already")
    for role, owner, key, parameter in held:
        placed = distribute_tensor(parameter, mesh, [plan[role]], src_data_rank=src_data_rank)
        owner.register_parameter(key, nn.Parameter(placed, requires_grad=parameter.requires_grad))
