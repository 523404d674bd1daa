"""What the figures share: which rows are drawn, in which colours, under which title."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.method import CPU, FORWARD, GPU, OURS
from bench.rows import FAILED, TIMED

Row = dict[str, Any]

# One colour and one marker a provider in every figure, distinguishable without colour vision.
_KNOWN = {
    "frozen": ("#b0b0b0", "|"),
    "eager": ("#d55e00", "o"),
    "peft": ("#cc79a7", "D"),
    "factored": ("#e69f00", "s"),
    "compile": ("#56b4e9", "^"),
    OURS: ("#004c6d", "*"),
}
_OTHERS = (
    ("#009e73", "v"), ("#882255", "P"), ("#999933", "X"), ("#44aa99", "<"), ("#332288", ">"),
    ("#aa4499", "p"), ("#117733", "h"), ("#661100", "d"),
)  # fmt: skip
_LABELS = {OURS: "peft_kernels", "compile": "torch.compile", "frozen": "frozen layer"}


def styles(content: dict[str, Any], drawn: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of the providers of the rows ``drawn``, ours last.

    Both depend on all rows of a file, so that a provider looks alike in all of its figures.
    """
    names = {row["provider"] for row in content["rows"]} - {"all"}
    others = sorted(names - set(_KNOWN))
    given = _KNOWN | {name: _OTHERS[index % len(_OTHERS)] for index, name in enumerate(others)}
    order = [name for name in (*_KNOWN, *others) if name != OURS] + [OURS]
    shown = {row["provider"] for row in drawn}
    return {name: given[name] for name in order if name in shown}


def label(provider: str) -> str:
    """Return what a legend calls a provider."""
    return _LABELS.get(provider, provider)


def timed(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of full size that have a speed: of those that failed there is none."""
    return [
        row
        for row in rows
        if row["status"] == TIMED and row["timing"] and row["case"]["suite"] in (CPU, GPU)
    ]


def failed(rows: Iterable[Row], op: str, suite: str, direction: str) -> list[str]:
    """Return the names of cases at which ours failed."""
    return [
        row["case"]["name"]
        for row in rows
        if row["status"] == FAILED
        and (op_of(row), row["case"]["suite"]) == (op, suite)
        and (row["provider"] == "all" or (row["provider"], row["direction"]) == (OURS, direction))
    ]


def op_of(row: Row) -> str:
    """Return the method; files of format 1 hold LoRA's rows alone."""
    op: str = row.get("op", "lora")
    return op


def short(case: str, op: str) -> str:
    """Return a case's name without the method's."""
    return case.replace(f"{op} ", "").removeprefix("saved ")


def title(content: dict[str, Any], words: str) -> str:
    """Return what is shown, and of which machine and commit; of commits that rows name, all."""
    machine = content["machine"]
    name = machine.get("gpu") or machine["cpu"]
    commits = dict.fromkeys(row["commit"] for row in content["rows"] if row.get("commit"))
    named = ", ".join(each[:10] for each in commits or [machine.get("commit") or "no commit"])
    named += " (dirty)" if machine.get("dirty") else ""
    quick = "TINY SHAPES THAT MEASURE NOTHING; " if content.get("quick") else ""
    return f"{quick}{words}\n{name}, torch {machine['torch']}, commit {named}"


def first_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of forwards: what they save is told once."""
    return [row for row in rows if row["direction"] == FORWARD]
