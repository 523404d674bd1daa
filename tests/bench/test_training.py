from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench import training
from bench.training import APART, BOTH, COMPILED, DRY, EAGER, OURS, Result, gated, table

pytest.importorskip("peft")


def test_a_dry_run_trains_every_provider_and_writes_its_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(str(tmp_path / "training.json"), 100.0) == 0
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert [row["provider"] for row in rows] == [EAGER, OURS, APART]
    for row in rows:
        assert row["tokens_per_s"] > 0 and len(row["losses"]) == DRY.steps
        assert row["losses"] == pytest.approx(rows[0]["losses"], rel=training.LOSS_RTOL)
    assert capsys.readouterr().out.count(DRY.name) == 3


def test_other_losses_get_no_speed() -> None:
    peft = Result("a", EAGER, "", 10.0, 2.0, None, [3.0, 2.0])
    ours = replace(peft, provider=OURS, losses=[3.0, 2.001])
    assert gated(ours, peft).tokens_per_s == 10.0
    for losses in ([3.0, 2.1], [3.0, float("nan")]):
        found = gated(replace(ours, losses=losses), peft)
        assert found.tokens_per_s is None and found.step_ms is None
        assert "losses differ" in found.note and "losses differ" in table([peft, found])


def test_what_does_not_fit_or_raises_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(str(tmp_path / "late.json"), 0.0) == 0
    assert capsys.readouterr().out.count("not run, out of time") == 3

    def broken(*given: object) -> Result:
        raise RuntimeError("no memory")

    monkeypatch.setattr(training, "run", broken)
    assert training.main(str(tmp_path / "broken.json"), 100.0) == 1
    assert "RuntimeError: no memory" in capsys.readouterr().out


def test_items_alone_are_added_to_what_is_held_and_gated_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "training.json"
    held = Result(DRY.name, EAGER, "", 10.0, 2.0, None, [3.0, 2.0])
    path.write_text(json.dumps({"rows": [asdict(held)], "running": None}))

    def running(case: object, provider: str, device: object) -> Result:
        assert json.loads(path.read_text())["running"] == f"{provider}@{DRY.name}"
        return replace(held, provider=provider, losses=[3.0, 2.5 if provider == APART else 2.0])

    monkeypatch.setattr(training, "run", running)
    assert training.main(str(path), 100.0, f"{OURS}@{DRY.name}") == 0
    assert training.main(str(path), 100.0, f"{APART}@{DRY.name}") == 1
    found = json.loads(path.read_text())
    assert found["running"] is None
    assert [row["provider"] for row in found["rows"]] == [EAGER, OURS, APART]
    assert [row["step_ms"] for row in found["rows"]] == [2.0, 2.0, None]


def test_compiling_is_reached_before_the_second_case() -> None:
    items = training.items(on_gpu=True)
    names = [each.split("@")[0] for each in items]
    assert names[:5] == [EAGER, OURS, COMPILED, BOTH, APART]
    assert len(items) == len(set(items)) == 5 * len(training.CASES)
