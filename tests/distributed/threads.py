"""Which threads of Gloo's are left: one that frees a tensor while Python ends aborts the process.

    python tests/distributed/threads.py SCRIPT ...

runs the script as ``python SCRIPT ...`` does, and fails if it leaves such threads at its end. They
abort rarely, so that a run without an abort proves nothing.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def of_gloo() -> list[str]:
    """Return the names of this process's threads that belong to a process group of Gloo's."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    left = of_gloo()
    sys.exit(f"threads left at the end of {sys.argv[0]}: {left}" if left else 0)
