"""Puts what a GPU report measured among the committed results, and their tables into the README.

``python -m bench.report.committed OUT...`` merges the files of finished stages into
``bench/results/<gpu>/rows.json`` and ``training.json`` and writes the README beside them anew; the
tiles that ``tune`` chose become ``tuned.json``, a file for PEFT_KERNELS_TILES.
Without OUT it only writes that. Of a case, provider and direction the newest row stays, with the
commit and the date that it was measured at; what was not run takes no row away.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import store
from bench.method import MAIN, VARIANTS
from bench.methods import METHODS
from bench.report import readme
from bench.report.readme import ALL, ALL_VARIANTS
from bench.rows import NOT_RUN
from bench.store import RESULTS

WHAT = {
    "rows": "GPU cases against their baselines, and every kernel variant: device time, cold L2, "
    "the device kept busy while the host launches; each row with the commit it was measured at",
    "training": "training steps of an 8-layer Llama-3-8B shape by bench.training, AdamW, bfloat16 "
    "weights and adapters; losses of the first steps gated where there is no dropout; each row "
    "with the commit it was measured at",
}
# What every row depends on; the rest of a machine's description changes from run to run.
_MACHINE = ("gpu", "driver", "cuda", "torch", "triton", "python", "cpu")


def folder_of(machine: Mapping[str, Any]) -> Path:
    """Return where the results of this GPU lie: "h200" for an NVIDIA H200."""
    name = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower().removeprefix("nvidia")).strip("-")
    return RESULTS / name


def load(path: Path, kind: str) -> dict[str, Any]:
    """Return a committed file, or an empty one; every row has its commit."""
    if not path.exists():
        return {"what": WHAT[kind], "machine": {}, "rows": []}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    commit = content.pop("commit", None)  # older files had one for all rows
    for row in content["rows"]:
        row.setdefault("commit", commit)
    return content | {"what": WHAT[kind]}


def merge(content: dict[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    """Return a committed file with the rows of a stage's file taken in.

    Raises:
        ValueError: the stage was a dry run, has no commit of its own, or ran on another GPU.
    """
    machine = stage["machine"]
    if stage["dry_run"]:
        raise ValueError(f"{stage['stage']} was a dry run: its times say nothing")
    if not machine["commit"]:
        raise ValueError(f"{stage['stage']} names no commit: set COMMIT when it runs")
    before = content["machine"].get("gpu", machine["gpu"])
    if machine["gpu"] != before:
        raise ValueError(f"{stage['stage']} ran on {machine['gpu']}, the results are of {before}")
    commit = machine["commit"][:7] + ("-dirty" if machine["dirty"] else "")
    stamp = {"commit": commit, "date": machine["date"]}
    rows = {_key(row): row for row in content["rows"]}
    for row in filter(_own, stage["rows"]):
        taken = stamp | {name: value for name, value in row.items() if name != "item"}
        if taken["provider"] == ALL and _group(row) == VARIANTS:
            taken["provider"] = ALL_VARIANTS
        held = rows.get(_key(taken))
        if "out of time" in taken["note"]:  # that says nothing of the case
            continue
        if held is not None and (_unmeasured(taken) or held.get("date", "") > taken["date"]):
            continue
        rows[_key(taken)] = taken
    # A case that raised as a whole has a row of no provider, until it runs.
    newest: dict[Any, str] = {}
    for row in rows.values():
        newest[_case(row)] = max(newest.get(_case(row), ""), row.get("date", ""))
    kept = [
        row
        for row in rows.values()
        if row["provider"] not in (ALL, ALL_VARIANTS) or row.get("date", "") == newest[_case(row)]
    ]
    described = {name: machine[name] for name in _MACHINE if name in machine}
    peaks = {"peaks": stage["peaks"]} if stage.get("peaks") else {}
    return content | {"machine": described} | peaks | {"rows": kept}


def _group(row: Mapping[str, Any]) -> str:
    return str(row.get("item", MAIN)).split()[0]


def _own(row: Mapping[str, Any]) -> bool:
    """Return whether a row is not one of the baselines that stand beside the variants again."""
    if _group(row) != VARIANTS:
        return True
    return row["provider"] not in {each.name for each in METHODS[row["op"]].gpu[MAIN]}


def _case(row: Mapping[str, Any]) -> Any:
    case = row["case"]
    return case["name"] if isinstance(case, dict) else case


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return _case(row), row["provider"], row.get("direction")


def _unmeasured(row: Mapping[str, Any]) -> bool:
    return bool(row.get("status") == NOT_RUN)


def write(folder: Path, outs: Sequence[Path] = ()) -> None:
    """Merge the stages' files in ``outs`` into those of ``folder``, and fill in its README."""
    kinds = dict.fromkeys(METHODS, "rows") | {"training": "training"}
    for out in outs:
        for name, kind in kinds.items():
            if (out / f"{name}.json").exists():
                stage = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
                path = folder / f"{kind}.json"
                store.replace(path, merge(load(path, kind), stage))
        if (out / "tune.json").exists():
            stage = json.loads((out / "tune.json").read_text(encoding="utf-8"))
            if (stage.get("table") or {}).get("measured") and not stage["dry_run"]:
                store.replace(folder / "tuned.json", stage["table"])
    page = folder / "README.md"
    if page.exists():
        page.write_text(readme.fill(page.read_text(encoding="utf-8"), folder), encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Merge the folders of reports, each into the results of its GPU."""
    outs = [Path(each) for each in arguments]
    for out in outs:
        files = [out / f"{name}.json" for name in (*METHODS, "training", "tune")]
        found = [json.loads(each.read_text(encoding="utf-8")) for each in files if each.exists()]
        if not found or "gpu" not in found[0]["machine"]:
            print(f"{out} holds no times of a GPU report", file=sys.stderr)
            return 2
        write(folder_of(found[0]["machine"]), [out])
    if not outs:
        for page in sorted(RESULTS.glob("*/README.md")):
            write(page.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
