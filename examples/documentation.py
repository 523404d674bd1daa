"""Real text that every machine has: the documentation strings of Python's standard library."""

from __future__ import annotations

import ast
import pkgutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef)
VOCABULARY = 257  # bytes, and padding
PADDING = 256


def documentation() -> Iterator[tuple[int, str]]:
    """Yield (what is documented: 0 a module, 1 a class, 2 a function; the text), unimported."""
    for module in pkgutil.iter_modules([sysconfig.get_path("stdlib")]):
        spec = module.module_finder.find_spec(module.name, None)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(Path(spec.origin).read_bytes())):
            if isinstance(node, KINDS):
                text = ast.get_docstring(node)
                if text:
                    yield KINDS.index(type(node)), text + "\n\n"


def sequences(count: int, length: int) -> Tensor:
    """Return bytes as token ids [count, length], from the beginning again at the text's end."""
    tokens: list[int] = []
    while len(tokens) < count * length:
        for _, text in documentation():
            tokens += text.encode()
            if len(tokens) >= count * length:
                break
    return torch.tensor(tokens[: count * length]).reshape(count, length)


def labelled(count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [count, length], masks of what is text, and kinds [count], in a fixed order."""
    found = list(documentation())
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    ids = torch.full((count, length), PADDING)
    kinds = torch.empty(count, dtype=torch.long)
    for row in range(count):
        kind, text = found[int(order[row % len(found)])]
        written = torch.tensor(list(text.encode()[:length]))
        ids[row, : len(written)] = written
        kinds[row] = kind
    return ids, (ids != PADDING).long(), kinds
