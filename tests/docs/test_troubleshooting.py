"""Every message that docs/troubleshooting.md lists is raised, as it is written there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_kernels.core import backend as backends
from peft_kernels.core import cuda_library, extension, triton_runtime
from tests.docs import provoked_calls, provoked_models, provoked_setup
from tests.docs.provoked import PROVOKED

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "troubleshooting.md"
ROWS = re.findall(r"^\| `(.+?)` \| (.+) \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
MESSAGES = [message for message, _, _ in ROWS]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let what was found out about this machine be found out again, in the test and after it."""
    forget()
    yield
    monkeypatch.undo()
    forget()


def forget() -> None:
    for found in (extension._import, extension.load, triton_runtime.import_problem):
        found.cache_clear()
    cuda_library.forget()
    backends.forget_choices()


def pattern(message: str) -> str:
    return ".+?".join(map(re.escape, message.split("…")))


def test_every_row_of_the_page_is_provoked_and_no_other() -> None:
    modules = (provoked_setup, provoked_calls, provoked_models)
    assert all(module.__doc__ for module in modules)
    assert len(MESSAGES) == len(set(MESSAGES)) > 50
    assert set(MESSAGES) == set(PROVOKED)
    # A row that is not read as one would be missing silently.
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert len(lines) == len(MESSAGES)


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:torch.utils")
@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_raised(
    message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text: str | None
    try:
        text = PROVOKED[message](monkeypatch, tmp_path)
    except (Exception, SystemExit) as error:
        text = str(error)
    assert text is not None, "nothing was raised"
    assert re.match(pattern(message), text, re.DOTALL), text
