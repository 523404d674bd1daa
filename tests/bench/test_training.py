from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import training
from bench.gpu_summary import summary
from bench.training import APART, DRY, EAGER, OURS, Result, gated, table
from tests.bench.test_gpu_report import content

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


def test_the_report_shows_the_table_and_fails_with_it() -> None:
    rows = [Result("a", EAGER, "", 10.0, 2.0, 1.5).__dict__]
    text, ok = summary(content(training={"ok": True, "ended": "exit status 0", "rows": rows}))
    assert ok and "tokens/s" in text
    text, ok = summary(content(training={"ok": False, "ended": "stopped after 9 s", "rows": []}))
    assert not ok and "training: stopped after 9 s" in text
