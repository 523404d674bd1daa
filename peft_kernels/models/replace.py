"""Swap layers of a model by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn


def replace(
    model: nn.Module, targets: str | Iterable[str], build: Callable[[nn.Module], nn.Module]
) -> list[str]:
    """Replace every module that a target names by ``build(module)``, in place.

    A target is a module's full name (``"layers.0.q_proj"``) or a suffix of it at a dot
    (``"q_proj"``, ``"attention.q_proj"``). A module reached under several names is built once, and
    its replacement is put under all of them, so that tied layers stay tied.

    ``nn.TransformerEncoderLayer`` has a path for inference that reads the weights of its layers
    without calling them: it is switched off where one of them is replaced.

    Args:
        model: the model to change.
        targets: one name or suffix, or several.
        build: makes the new module from the old one, for instance
            ``lambda linear: LoRALinear.from_linear(linear, r=8, lora_alpha=16)``.

    Returns:
        The full names of what was replaced, in the order of the model.

    Raises:
        TypeError: a target is not a string, or ``build`` returned no module.
        ValueError: a target matched nothing, one match lies inside another, or a match is the
            ``out_proj`` of an ``nn.MultiheadAttention``, which only reads its weight.

    Example:
        >>> from torch import nn
        >>> from peft_kernels import LoRALinear, replace
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> replace(model, ["0", "2"], lambda old: LoRALinear.from_linear(old, r=2, lora_alpha=4))
        ['0', '2']
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    for target in wanted:
        if not isinstance(target, str) or not target:
            raise TypeError(f"targets must be non-empty module names, got {target!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    matched = [name for name in modules if name and any(_matches(name, each) for each in wanted)]
    unmatched = [each for each in wanted if not any(_matches(name, each) for name in matched)]
    if unmatched or not wanted:
        raise ValueError(f"targets {unmatched} matched no module; the model has {_sample(modules)}")
    for name in matched:
        outer = next((each for each in matched if name.startswith(each + ".")), None)
        if outer is not None:
            raise ValueError(f"targets match {outer!r} and {name!r} inside it; name one of them")
    replace_named(model, matched, build)
    return matched


def replace_named(
    model: nn.Module, names: Iterable[str], build: Callable[[nn.Module], nn.Module]
) -> None:
    """Replace the modules of these full names by ``build(module)``, none inside another.

    Raises:
        TypeError: ``build`` returned no module.
        ValueError: one is the ``out_proj`` of an ``nn.MultiheadAttention``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    matched = list(names)
    for name in matched:
        _check_called(name, modules[name.rpartition(".")[0]])
    built: dict[int, nn.Module] = {}
    for name in matched:
        old = modules[name]
        if id(old) not in built:
            new = build(old)
            if not isinstance(new, nn.Module):
                raise TypeError(f"build must return a torch.nn.Module, got {new!r} for {name!r}")
            built[id(old)] = new
    # Only now that every build succeeded is the model changed.
    for name in matched:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, built[id(modules[name])])
        _leave_fast_path(modules, parent)


def _check_called(name: str, parent: nn.Module) -> None:
    if isinstance(parent, nn.MultiheadAttention):
        attention = name.rpartition(".")[0]
        raise ValueError(
            f"targets match {name!r}, whose weight nn.MultiheadAttention reads without calling it: "
            f"a replacement would be ignored; name the attention itself, {attention!r}"
        )


def _leave_fast_path(modules: dict[str, nn.Module], name: str) -> None:
    """Make the transformer encoders around module ``name`` call their layers in inference too."""
    while True:
        module = modules[name]
        if isinstance(module, nn.TransformerEncoderLayer):
            # What torch sets for an activation that its fused inference does not know.
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        if not name:
            return
        name = name.rpartition(".")[0]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _sample(modules: dict[str, nn.Module], most: int = 8) -> str:
    leaves = [name for name, module in modules.items() if name and not any(module.children())]
    suffix = f" and {len(leaves) - most} more" if len(leaves) > most else ""
    return ", ".join(leaves[:most]) + suffix if leaves else "no layers"
