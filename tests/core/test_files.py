"""Files that are there whole or not at all, and pairs that never mix."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_kernels.core import files
from peft_kernels.core.files import write_atomically, write_pair


def _failing(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("at", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_writing_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: BaseException
) -> None:
    path = tmp_path / "demo.json"
    write_atomically(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, at, _failing(error))
        with pytest.raises(type(error)):
            write_atomically(path, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["demo.json"]
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def _pair(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "settings").read_bytes(), (folder / "tensors").read_bytes()


def _write(folder: Path, settings: bytes, tensors: bytes) -> None:
    write_pair(folder, ("settings", settings), ("tensors", tensors))


@pytest.mark.parametrize("settings", [b"s", b"other"], ids=["same settings", "other settings"])
def test_a_pair_is_written_over_a_pair_and_what_is_beside_it_stays(
    tmp_path: Path, settings: bytes
) -> None:
    folder = tmp_path / "deep" / "adapter"
    _write(folder, b"s", b"t")
    (folder / "README.md").write_bytes(b"mine")
    (folder / "link").symlink_to("README.md")
    if settings == b"other":
        (folder / ".tensors.123.tmp").write_bytes(b"what a killed process left")
    mode = folder.stat().st_mode
    _write(folder, settings, b"new")
    assert _pair(folder) == (settings, b"new")
    assert sorted(os.listdir(folder)) == ["README.md", "link", "settings", "tensors"]
    assert (folder / "link").read_bytes() == b"mine"
    assert folder.stat().st_mode == mode
    assert os.listdir(folder.parent) == ["adapter"]


def test_a_folder_reached_by_a_link_is_written_where_it_is(tmp_path: Path) -> None:
    _write(tmp_path / "first", b"s", b"t")
    (tmp_path / "latest").symlink_to("first")
    _write(tmp_path / "latest", b"other", b"new")
    assert (tmp_path / "latest").is_symlink()
    assert _pair(tmp_path / "first") == (b"other", b"new")


@pytest.mark.parametrize("at", ["fsync", "link", "_exchange"])
def test_a_pair_that_fails_leaves_the_old_pair_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder = tmp_path / "adapter"
    _write(folder, b"s", b"t")
    (folder / "README.md").write_bytes(b"mine")
    with monkeypatch.context() as patch:
        patch.setattr(os if hasattr(os, at) else files, at, _failing(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            _write(folder, b"other", b"new")
    assert _pair(folder) == (b"s", b"t")
    assert os.listdir(tmp_path) == ["adapter"]


def test_where_folders_cannot_be_exchanged_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: object())
    _write(tmp_path, b"s", b"t")
    _write(tmp_path, b"s", b"next")
    with pytest.raises(OSError, match="exchanged.*remove it first"):
        _write(tmp_path, b"other", b"new")
    assert _pair(tmp_path) == (b"s", b"next")


def test_a_folder_within_is_not_carried_over(tmp_path: Path) -> None:
    _write(tmp_path, b"s", b"t")
    (tmp_path / "runs").mkdir()
    with pytest.raises(OSError, match="'runs'.*a folder of its own"):
        _write(tmp_path, b"other", b"new")
    _write(tmp_path, b"s", b"new")
    assert _pair(tmp_path) == (b"s", b"new")


# Writes a pair over another in processes that are killed, each one event later than the last:
# Python reports every call that opens, makes, renames, links or removes a file before it is made.
# What holds in the killed process holds in the parent, which looks at what it left.
_KILLED = """
import os, signal, sys
from pathlib import Path
from peft_kernels.core import files

folder, settings = Path(sys.argv[1]), sys.argv[2].encode()
count = [0]

def step(event, args):
    if event == "open" or event.startswith(("os.", "shutil.", "ctypes.")):
        count[0] -= 1
        if count[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def exchange(one, other, plain=files._exchange):
    plain(one, other)
    step("os.exchange", ())

files._exchange = exchange
kills, after = 0, set()
while True:
    files.write_pair(folder, ("settings", b"s"), ("tensors", b"t" * 100000))
    child = os.fork()
    if child == 0:
        count[0] = kills + 1
        sys.addaudithook(step)
        files.write_pair(folder, ("settings", settings), ("tensors", b"n" * 200000))
        count[0] = 0
        os._exit(0)
    _, status = os.waitpid(child, 0)
    pair = (folder / "settings").read_bytes(), (folder / "tensors").read_bytes()
    after.add((pair[0].decode(), pair[1][:1].decode(), len(pair[1])))
    if not os.WIFSIGNALED(status):
        break
    kills += 1
print(kills, sorted(after))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("settings", ["s", "other"])
def test_a_kill_at_any_moment_leaves_the_old_pair_or_the_new_one(
    tmp_path: Path, settings: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "adapter"), settings],
        capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(files.__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills, _, after = done.stdout.partition(" ")
    assert int(kills) >= 4
    assert after.strip() == str([(settings, "n", 200000), ("s", "t", 100000)])
