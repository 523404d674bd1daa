"""Every method that is measured; a new one is a module and a line here."""

from __future__ import annotations

from collections.abc import Sequence

from bench.adapter.method import METHOD as ADAPTER
from bench.lora.method import METHOD as LORA
from bench.method import Case, Method
from bench.prefix import METHOD as PREFIX
from bench.prompt import METHOD as PROMPT

METHODS: dict[str, Method] = {each.name: each for each in (LORA, ADAPTER, PREFIX, PROMPT)}


def method_of(case: Case) -> Method:
    """Return the method that ``case`` is one of."""
    return METHODS[case.op]


def chosen(names: Sequence[str] | None) -> list[Method]:
    """Return the methods of these names, in the order of ``METHODS``; None: all."""
    return [each for name, each in METHODS.items() if names is None or name in names]
