"""A selection of the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer.

All of them take minutes: ``python -m tests.sanitized tests/*/test_cpp*.py``.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import sanitized

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not sanitized.runtimes(), reason="the compiler has no libasan: not run"),
]
FILES = [
    "tests/lora/test_cpp.py",
    "tests/lora/test_dora.py",
    "tests/adapter/test_cpp_launchers.py",
    "tests/adapter/test_cpp_grouped.py",
    "tests/prefix/test_cpp.py",
    "tests/prompt/test_backends.py",
]
# Ragged shapes, strides and guarded outputs: what reaches furthest over an edge.
_CHOSEN = ("strides", "mask_equals", "compiled_drop", "every_output", "nothing", "empty")
SELECTED = f"({' or '.join(_CHOSEN)} or no_adapter) and not triton"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=sanitized.ROOT,
        env=sanitized.environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    done = sanitized.build()
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_bad_access_and_no_undefined_behaviour() -> None:
    done = run(*sanitized.tests_command("-q", "-p", "no:xdist", *FILES, "-k", SELECTED))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_a_write_beyond_a_tensor_is_noticed() -> None:
    """Without this, a build without sanitizers would pass."""
    code = """
import torch
from tests import sanitized
sanitized.pytest_configure()
from peft_kernels.prompt import cpp
print("starts", flush=True)
ids, dy = torch.tensor([[0, 1, 4]]), torch.ones(1, 3, 8)
cpp.backward(dy, ids, None, 0, -1, None, torch.empty(4, 8))  # an embedding of five rows
print("ends")
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode != 0 and done.stdout == "starts\n", done.stdout + done.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
