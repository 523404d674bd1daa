from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.lora.cases import REPORT_CASES
from bench.measure import Timing
from bench.method import FORWARD
from bench.report import committed, readme
from bench.report.committed import load, merge
from bench.rows import FAILED, NOT_RUN, TIMED, Row, plain
from bench.store import RESULTS
from bench.training import CASES, COMPILED, EAGER, Result

MACHINE = {
    "gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "0123456789abcdef", "dirty": False,
    "date": "2031-02-03T04:05:06+00:00", "device": "cuda",
}  # fmt: skip
CASE = REPORT_CASES[0]


def row(
    provider: str, ms: float | None, status: str = TIMED, group: str = "main"
) -> dict[str, Any]:
    timing = None if ms is None else Timing(ms, ms, ms, ms, 9)
    made = plain(Row(CASE, FORWARD, provider, status, "some note", timing=timing))
    return {"item": f"{group} {CASE.name}", **made}


def stage(*rows: dict[str, Any], **machine: Any) -> dict[str, Any]:
    peaks = [{"dtype": "bfloat16", "tflops": 800.0, "gigabytes_per_s": 4200.0}]
    described = {**MACHINE, **machine}
    return {
        "stage": "lora", "dry_run": False, "machine": described, "rows": list(rows), "peaks": peaks
    }  # fmt: skip


def empty() -> dict[str, Any]:
    return {"what": "", "machine": {}, "rows": []}


def times(content: dict[str, Any]) -> dict[str, float | None]:
    return {
        each["provider"]: each["timing"] and each["timing"]["min_ms"] for each in content["rows"]
    }


@pytest.mark.parametrize("folder", sorted({p.parent for p in RESULTS.glob("*/README.md")}))
def test_the_committed_page_is_made_of_the_committed_numbers(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "<!-- rows.json -->" in text and "<!-- training.json -->" in text
    assert readme.fill(text, folder) == text


def test_the_newest_row_stays_with_its_commit() -> None:
    before = merge(empty(), stage(row("fused", 2.0), row("eager", 3.0)))
    later = stage(row("fused", 1.5), commit="fedcba9876", dirty=True, date="2031-02-04T00:00:00")
    after = merge(before, later)
    assert times(after) == {"fused": 1.5, "eager": 3.0}
    commits = {each["provider"]: each["commit"] for each in after["rows"]}
    assert commits == {"fused": "fedcba9-dirty", "eager": "0123456"}
    assert not any("item" in each for each in after["rows"])
    # An earlier report, merged late, takes nothing away.
    assert merge(after, stage(row("fused", 9.0))) == after | {"machine": after["machine"]}


def test_what_did_not_run_takes_no_row_away_and_what_failed_does() -> None:
    before = merge(empty(), stage(row("fused", 2.0)))
    assert times(merge(before, stage(row("fused", None, NOT_RUN)))) == {"fused": 2.0}
    assert times(merge(before, stage(row("fused", None, FAILED)))) == {"fused": None}
    late = Result("some case", EAGER, "not run, out of time").__dict__
    timed = Result("some case", EAGER, "", 10.0, 2.0, 1.5).__dict__
    trained = merge(empty(), stage(timed))
    assert merge(trained, stage(late))["rows"] == trained["rows"]
    assert merge(empty(), stage(late))["rows"] == []


def test_a_case_that_raised_is_there_until_it_runs() -> None:
    broken = merge(merge(empty(), stage(row("fused", 2.0))), stage(
        row("all", None, FAILED), date="2031-02-04T00:00:00"
    ))  # fmt: skip
    assert "| failed | " in readme.rows_section(broken["rows"])
    mended = merge(broken, stage(row("fused", 1.0), date="2031-02-05T00:00:00"))
    assert times(mended) == {"fused": 1.0}


def test_baselines_beside_the_variants_do_not_replace_those_of_the_case() -> None:
    beside = [row("frozen", 9.0, group="variants"), row("triton:split", 4.0, group="variants")]
    broken = row("all", None, FAILED, group="variants")
    absent = row("somebody", None, NOT_RUN)
    main = row("frozen", 1.0), absent, row("fused", 2.0)
    content = merge(empty(), stage(*main, *beside, broken))
    assert times(content) == {
        "frozen": 1.0, "somebody": None, "fused": 2.0, "triton:split": 4.0, "all variants": None
    }  # fmt: skip
    made = readme.rows_section(content["rows"])
    assert f"| {CASE.name} | 1.000 | 2.000 | - | - | 0123456 |" in made
    assert "somebody" not in made and "| split, forward |" in made and "| 4.000 |" in made


def test_what_means_nothing_here_is_refused() -> None:
    with pytest.raises(ValueError, match="dry run"):
        merge(empty(), stage(row("fused", 1.0)) | {"dry_run": True})
    with pytest.raises(ValueError, match="names no commit: set COMMIT"):
        merge(empty(), stage(row("fused", 1.0), commit=None))
    held = merge(empty(), stage(row("fused", 1.0)))
    with pytest.raises(ValueError, match="ran on NVIDIA H100, the results are of NVIDIA H200"):
        merge(held, stage(row("fused", 1.0), gpu="NVIDIA H100"))


def test_files_of_a_report_become_those_of_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(committed, "RESULTS", tmp_path / "results")
    home = committed.folder_of(MACHINE)
    assert home == tmp_path / "results" / "h200"
    home.mkdir(parents=True)
    (home / "README.md").write_text(
        "Figures\n<!-- rows.json -->\nold\n<!-- end -->\n"
        "<!-- training.json -->\n<!-- end -->\nmore\n"
    )
    old = [Result(CASES[0].name, EAGER, "", 10.0, 4.0, 1.5, [1.0]).__dict__]
    (home / "training.json").write_text(
        json.dumps({"what": "", "commit": "abcdefg", "machine": {}, "rows": old})
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "lora.json").write_text(json.dumps(stage(row("fused", 2.0), row("factored", 1.0))))
    new = [Result(CASES[0].name, COMPILED, "", 20.0, 2.0, 1.5, [1.0]).__dict__]
    (out / "training.json").write_text(json.dumps(stage(*new) | {"stage": "training"}))
    tuned = {"format": 1, "families": {}, "measured": {"some": "tile"}}
    (out / "tune.json").write_text(json.dumps(stage() | {"stage": "tune", "table": tuned}))
    assert committed.main([str(out)]) == 0
    # One that had time for nothing takes nothing away.
    nothing = tuned | {"measured": {}}
    (out / "tune.json").write_text(json.dumps(stage() | {"stage": "tune", "table": nothing}))
    assert committed.main([str(out)]) == 0
    assert json.loads((home / "tuned.json").read_text()) == tuned
    text = (home / "README.md").read_text()
    assert "old" not in text and text.startswith("Figures\n") and text.endswith("more\n")
    assert f"- {CASE.name}, forward: 2.00 of factored" in text
    assert f"| {CASES[0].name} | peft | 4.0 | 10 | 1.00 | 1.5 | abcdefg |" in text
    assert f"| {CASES[0].name} | peft compiled | 2.0 | 20 | 2.00 | 1.5 | 0123456 |" in text
    assert {each["commit"] for each in load(home / "rows.json", "rows")["rows"]} == {"0123456"}
    assert load(home / "rows.json", "rows")["peaks"][0]["tflops"] == 800.0
    (tmp_path / "empty").mkdir()
    assert committed.main([str(tmp_path / "empty")]) == 2
    assert "holds no times" in capsys.readouterr().err
