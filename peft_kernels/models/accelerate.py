"""``accelerate``: let a model built by peft or adapters run on fused kernels, and back."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

from torch import nn

from peft_kernels.models.fused.found import Found, fuse, restore

# The oldest peft whose layers are known.
MIN_PEFT = (0, 18)


@dataclass(frozen=True)
class AccelerationReport:
    """What ``accelerate`` found.

    Attributes:
        accelerated: (name of the layer, function that serves it), in the order of the model.
        skipped: (name of the layer, why it runs as it did).
        projections: names of the layers that run as one op on GPUs, because they read the same x.
    """

    accelerated: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    projections: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        """Return one line for the whole, one for each kind of group, one for each skipped layer."""
        total = len(self.accelerated) + len(self.skipped)
        ops = sorted({op for _, op in self.accelerated})
        lines = [f"accelerated {len(self.accelerated)} of {total} layers ({', '.join(ops)})"]
        kinds = Counter(
            ", ".join(name.rpartition(".")[2] for name in names) for names in self.projections
        )
        lines += [f"  {kind} run as one op on GPUs in {n} modules" for kind, n in kinds.items()]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def accelerate(
    model: nn.Module, *, strict: bool = False, projections: bool = True
) -> AccelerationReport:
    """Let the adapter layers of a model run on fused kernels, in place.

    Takes what peft (0.18 or later) built, and the bottlenecks of adapters. Nothing is added to the
    model: parameters, ``state_dict`` keys, optimisers and hooks stay as they are, and what peft
    does afterwards (``set_adapter``, ``add_adapter``, ``delete_adapter``, ``merge_and_unload``,
    ``save_pretrained``) works as before, as does what adapters does.
    A layer decides at each call: while it is merged, disabled or hooked, or has parameters that its
    method's kernel cannot take, it runs its own forward. A batch whose rows name their adapters
    (``adapter_names``) takes one kernel call for each adapter.
    Prefix tuning, prompt tuning and P-tuning are served in the ``PeftModel`` itself, which the
    report lists under its name, "" where it is ``model``. A prefix goes through transformers'
    attention interface, so gradient checkpointing, which peft refuses beside one, may be enabled
    afterwards.

    Calling it again takes in what was added since, and changes nothing else.

    Args:
        model: a ``PeftModel``, or any module that contains layers made by peft or adapters.
        strict: raise where a layer would be skipped, and change nothing.
        projections: run LoRA layers that read the same x (q, k and v; gate and up) as one op, which
            reads x once and gives one gradient of it, each with a dropout mask of its own. They are
            told by name; those that are then called with different tensors run one by one, as all
            do on a CPU, where nothing is gained, and under ``torch.compile``.

    Returns:
        Every adapter layer by name, accelerated or not with the reason.

    Raises:
        TypeError: not a module.
        RuntimeError: a peft that is too old.
        ValueError: no adapter in the model, none that can be accelerated, parameters on ``meta``;
            under ``strict``, a layer that would be skipped.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_kernels import accelerate
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU())
        >>> model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"]))
        >>> print(accelerate(model))
        accelerated 1 of 1 layers (lora_linear)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = _find(model)
    if not found:
        raise ValueError(
            "model has no adapter layer that peft or adapters made: add one first, for instance by "
            "peft.get_peft_model(model, LoraConfig(...)), or place layers of peft_kernels by "
            "peft_kernels.replace"
        )
    _refuse_meta(found)
    taken = [each for each in found if each.fused is not None]
    skipped = tuple((each.name, each.reason) for each in found if each.fused is None)
    if not taken:
        raise ValueError(f"no adapter layer of the model can be accelerated:\n{_listed(skipped)}")
    if strict and skipped:
        raise ValueError(
            f"strict=True, and these adapter layers cannot be accelerated:\n{_listed(skipped)}"
        )
    for each in taken:
        assert each.fused is not None
        if type(each.module) is not each.fused:
            fuse(each.module, each.fused, each.holder)
    groups = _grouped(model, projections) if "peft" in sys.modules else ()
    return AccelerationReport(tuple((each.name, each.op) for each in taken), skipped, groups)


def unaccelerate(model: nn.Module) -> list[str]:
    """Undo ``accelerate``: every layer runs its own forward again.

    Args:
        model: what ``accelerate`` was given, or a part or a copy of it.

    Returns:
        The full names of the layers that were accelerated.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return [name for name, module in model.named_modules() if restore(module)]


def _find(model: nn.Module) -> list[Found]:
    """Return every adapter layer, in the order of the model."""
    found: list[Found] = []
    # A model that peft built has imported peft.
    if "peft" in sys.modules:
        _check_peft()
        from peft_kernels.models.fused import peft_layers

        found += peft_layers.find(model)
    # What adapters built has imported its bottlenecks; "adapters" alone may be anybody's.
    if "adapters.methods.bottleneck" in sys.modules:
        from peft_kernels.models.fused import adapters_bottleneck

        found += adapters_bottleneck.find(model)
    return found


def _grouped(model: nn.Module, wanted: bool) -> tuple[tuple[str, ...], ...]:
    from peft_kernels.models.fused import projections
    from peft_kernels.models.fused.peft_lora import FusedLinear

    if wanted:
        return tuple(projections.group(model, FusedLinear))
    projections.ungroup(model)
    return ()


def _check_peft() -> None:
    version = str(sys.modules["peft"].__version__)
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < MIN_PEFT:
        wanted = ".".join(map(str, MIN_PEFT))
        raise RuntimeError(
            f"peft {version} is installed, accelerate knows {wanted} and later: "
            f"pip install 'peft>={wanted}'"
        )


def _refuse_meta(found: list[Found]) -> None:
    for each in found:
        for name, parameter in each.module.named_parameters():
            if parameter.is_meta:
                raise ValueError(
                    f"model has parameters on the meta device ({each.name}.{name}): load or "
                    f"initialise it first"
                )


def _listed(skipped: tuple[tuple[str, str], ...], most: int = 20) -> str:
    lines = [f"  {name}: {reason}" for name, reason in skipped[:most]]
    more = [f"  and {len(skipped) - most} more"] if len(skipped) > most else []
    return "\n".join(lines + more)
