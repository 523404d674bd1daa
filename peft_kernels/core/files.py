"""Files that are there whole or not at all, and pairs of files that never mix old and new."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all; an old one stays until the new one is whole.

    Args:
        path: the file.
        data: all of its bytes.
    """
    # In the same folder, as a rename across file systems is a copy. Named before it exists, so
    # that an interruption at any point finds what to remove.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_pair(folder: Path, settings: tuple[str, bytes], tensors: tuple[str, bytes]) -> None:
    """Write two files that belong together: a kill at any moment leaves the old pair or the new.

    Where the settings are as they were, as from one checkpoint to the next, or where there were
    none, the files are renamed one by one, the settings last. Where they change, a folder with the
    new pair, and links to what else is in the old one, is made beside it and the two folders change
    places in one step.

    Args:
        folder: made where it does not exist.
        settings: (name, bytes) of the file without which the other is not read.
        tensors: (name, bytes) of the other.

    Raises:
        OSError: the settings change, and the folder holds folders of its own or its file system
            cannot exchange two folders.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / settings[0]
    if written.exists() and written.read_bytes() != settings[1]:
        _swap_pair(folder, settings, tensors)
        return
    write_atomically(folder / tensors[0], tensors[1])
    if not written.exists():
        write_atomically(written, settings[1])


def _swap_pair(folder: Path, *files: tuple[str, bytes]) -> None:
    # What a killed process left of our own is not carried over.
    ours = [*dict(files), *(f".{name}.*.tmp" for name in dict(files))]
    kept = [each for each in folder.iterdir() if not any(map(each.match, ours))]
    for each in kept:
        if each.is_dir() and not each.is_symlink():
            raise OSError(
                errno.ENOTSUP,
                f"{folder} holds the folder {each.name!r} and an adapter with other settings, "
                f"which cannot be replaced in one step: write to a folder of its own",
            )
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    # Left by a killed process that had this one's number.
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        shutil.copystat(folder, beside)
        for name, data in files:
            _write(beside / name, data)
        for each in kept:
            os.link(each, beside / each.name, follow_symlinks=False)
        _exchange(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change places, in one step."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        failed = errno.ENOSYS
    else:
        paths = os.fsencode(one), os.fsencode(other)
        if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
            return
        failed = ctypes.get_errno()
    raise OSError(
        failed,
        f"{os.strerror(failed)}: {other} holds an adapter with other settings, and two folders "
        f"cannot be exchanged there in one step: remove it first, or write to a new folder",
    )


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
