"""A module's own forward on the shards of its parameters, with the collectives around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from peft_kernels.core import rng
from peft_kernels.models.parallel.layers import parameters, refuse_own_dropout


class LocalForward:
    """Hooks that let a module's own forward run on the shards of its parameters.

    While it runs, the parameters of the module are the ranks' plain tensors, through which the
    gradients reach the DTensors; afterwards they are the DTensors again, even if it raised.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        use_local_output: bool,
        seed_rule: Callable[[Tensor], Tensor],
        *,
        given: Placement,
        wanted: Placement,
        made: Placement,
        returned: Placement,
    ) -> None:
        """Keep the placements: of x as given and as wanted, of y as made and as returned."""
        self.mesh, self.use_local_output, self.seed_rule = mesh, use_local_output, seed_rule
        self.given, self.wanted, self.made, self.returned = given, wanted, made, returned
        self.rank = mesh.get_local_rank()
        self.whole: list[tuple[nn.Module, str, nn.Parameter]] = []

    def attach(self, module: nn.Module) -> None:
        """Put the hooks on ``module``."""
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with the rank's part of x, and put local parameters in place."""
        if not args or not isinstance(args[0], Tensor):
            raise TypeError(
                f"{type(module).__name__} is tensor-parallel and takes x as its first positional "
                f"argument, a tensor"
            )
        refuse_own_dropout(module)
        x = args[0]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(awaited(x), self.mesh, [self.given], run_check=False)
        x = _placed(x, self.wanted)
        # Under Replicate each rank's dx comes from its own columns of dy.
        partial = [Partial()] if self.wanted.is_replicate() else None
        local_x = x.to_local(grad_placements=partial)
        local = [
            (owner, key, parameter, self._local(role, parameter))
            for role, owner, key, parameter in parameters(module)
            if isinstance(parameter, DTensor)
        ]
        for owner, key, parameter, tensor in local:
            self.whole.append((owner, key, parameter))
            owner._parameters[key] = tensor  # type: ignore[assignment]
        rng.DRAWING.rule = self.seed_rule
        return (local_x, *args[1:])

    def leave(self, module: nn.Module, args: tuple[Any, ...], y: Tensor | None) -> Tensor | None:
        """Put the DTensors back; return y in the layout that was asked for."""
        for owner, key, parameter in self.whole:
            owner._parameters[key] = parameter
        self.whole.clear()
        rng.DRAWING.rule = None
        if y is None:  # forward raised
            return None
        output = DTensor.from_local(y, self.mesh, [self.made], run_check=False)
        output = _placed(output, self.returned)
        return output.to_local() if self.use_local_output else output

    def _local(self, role: str, parameter: DTensor) -> Tensor:
        """Return the rank's tensor of ``parameter``, connected to it for backward."""
        if not parameter.placements[0].is_replicate():
            return parameter.to_local()
        if parameter.requires_grad:
            # Changes nothing now; its backward sums the ranks' gradients.
            parameter = parameter.redistribute(placements=[Replicate()])
        local = parameter.to_local(grad_placements=[Partial()])
        # The sum over the ranks is to contain the bias once. All ranks keep it in their graph: each
        # has to take part in the sum of its gradient.
        return local * float(self.rank == 0) if role == "bias" else local


class _Wait(torch.autograd.Function):
    """The identity, which waits for the collective that makes x."""

    @staticmethod
    def forward(ctx: Any, x: collectives.AsyncCollectiveTensor) -> Tensor:
        return x.wait()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def awaited(x: Tensor) -> Tensor:
    """Return x with its data there: torch's styles hand over results that are still to come."""
    return _Wait.apply(x) if isinstance(x, collectives.AsyncCollectiveTensor) else x


def _placed(x: DTensor, placement: Placement) -> DTensor:
    if isinstance(placement, Shard):
        placement = Shard(placement.dim % x.ndim)
    return x if x.placements == (placement,) else x.redistribute(placements=[placement])
