from __future__ import annotations

import io
import sys
from dataclasses import dataclass

import pytest

from bench.progress import shown


@dataclass(frozen=True)
class Named:
    label: str


STEPS = [Named("one"), Named("two")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_a_line_a_step_before_it_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    iterator = shown(STEPS)
    assert next(iterator) is STEPS[0]
    assert capsys.readouterr().err == "[1/2] one\n"
    assert list(iterator) == STEPS[1:]
    assert capsys.readouterr().err == "[2/2] two\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(shown(STEPS)) == STEPS
    written = terminal.getvalue()
    assert "0/2" in written and "2/2" in written and "two" in written and "100%" in written


def test_a_terminal_without_tqdm_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(shown(STEPS)) == STEPS
    assert terminal.getvalue() == "[1/2] one\n[2/2] two\n"
