"""Choose tiles for a GPU family without the GPU, and print the reasons.

``python -m bench.tiles sm_86 --method prefix [--only "key 128"] [--most 8] [--json OUT.json]``

Of all candidates those that look best by counting are cross-compiled, and the present tile beside
them: what spills, needs more than there is or lacks tensor-core instructions falls out, of the rest
the least score wins. It is reasoned, not measured: ``bench.tune`` measures. A choice goes into a
table by hand, after ``tests.compile.sweep`` has compiled it in every form.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import store
from bench.tuning.candidates import (
    METHODS,
    WIDTH,
    Candidate,
    Target,
    candidates,
    present,
    targets_of,
)
from bench.tuning.offline import OF_FAMILY, Known, known
from peft_kernels.core import tiles


def choose(
    target: Target, family: str, most: int, *, compiled: bool = True
) -> tuple[Known, list[Known]]:
    """Return what is known of the present tile, and of the best candidates, best first.

    Args:
        target: an entry that the family's table has.
        family: of GPUs.
        most: candidates that are compiled.
        compiled: whether anything is.
    """
    now = present(target, family)
    name = target.name
    variant = getattr(now, "variant", None) if target.table == "lora" else None
    if variant == "ticket_tma" or getattr(now, "tma", False):
        name = f"tma {name}"
    beside = Candidate((family, target.table, WIDTH, name), now, variant)
    counted = sorted(
        candidates(target, family),
        key=lambda each: known(target, each, family, compiled=False).score,
    )
    chosen = [known(target, each, family, compiled=compiled) for each in counted[:most]]
    chosen.sort(key=lambda each: (bool(each.problems), each.score))
    return known(target, beside, family, compiled=compiled), chosen


def described(target: Target, family: str, now: Known, found: Sequence[Known]) -> list[str]:
    """Return the lines of one entry: the choice and the present tile, with their reasons."""
    fitting = [each for each in found if not each.problems]
    best = min(
        (each for each in (now, *fitting) if not each.problems),
        key=lambda each: each.score,
        default=None,
    )
    mark = {None: "(no choice: every tile has a problem)", now: "(the present tile)"}.get(best, "")
    lines = [f"{target}: {best.tile if best else now.tile} {mark}".rstrip()]
    lines.append(f"  present {now.tile}: {_reason(now, family)}")
    if best is not None and best is not now:
        lines.append(f"  choice  {best.tile}: {_reason(best, family)}")
    others = [each for each in fitting if each is not best][:2]
    lines += [f"  next    {each.tile}: {_reason(each, family)}" for each in others]
    lines += [
        f"  refused {each.tile}: {'; '.join(each.problems)}" for each in found if each.problems
    ]
    return lines


def _reason(each: Known, family: str) -> str:
    wrong = f"{'; '.join(each.problems)}; " if each.problems else ""
    return wrong + each.reasons(family)


def main(arguments: Sequence[str]) -> int:
    """Print the choices of a family."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.tiles")
    parser.add_argument("family", choices=tiles.FAMILIES)
    parser.add_argument("--method", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--only", default="", help="part of an entry's place, as in 'key 128'")
    parser.add_argument("--most", type=int, default=6, help="candidates compiled for an entry")
    parser.add_argument("--counted", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    options = parser.parse_args(arguments)
    compiled = not options.counted
    if compiled and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    try:
        asked = targets_of(options.family, options.method, options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.json and (problem := store.why_not_writable(options.json.parent)):
        parser.error(problem)
    print(f"{options.family}, waves on {OF_FAMILY[options.family]}")
    content: dict[str, Any] = {"family": options.family, "entries": {}}
    for target in asked:
        start = time.monotonic()
        now, found = choose(target, options.family, options.most, compiled=compiled)
        print("\n".join(described(target, options.family, now, found)), flush=True)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
        content["entries"][str(target)] = {
            "present": asdict(now), "candidates": [asdict(each) for each in found],
        }  # fmt: skip
        if options.json:
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
