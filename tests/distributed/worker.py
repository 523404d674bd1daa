"""One rank: runs every check, or those named, and writes what became of each.

    torchrun --standalone --nproc-per-node 2 tests/distributed/worker.py OUT [CHECK ...]

The first check that fails on a rank ends it, since the others would wait for it in the next
collective.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# Its functions keep the group of the time of this import, as a default: there must be none yet.
import torch.distributed.nn
from torch._library.fake_class_registry import FakeScriptObject
from torch.distributed.device_mesh import DeviceMesh

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed import data_parallel, parallel_layers, peft_layers, tensor_parallel
from tests.distributed.threads import of_gloo

FILES = (data_parallel, tensor_parallel, parallel_layers, peft_layers)
CHECKS = {name: check for file in FILES for name, check in file.CHECKS.items()}


def leave_process_groups() -> None:
    """Destroy them, and with the last reference to each its threads.

    Meshes have such references and stay in DTensor's caches; Dynamo keeps what it compiled with.
    """
    gc.collect()
    for each in gc.get_objects():
        if type(each) in (DeviceMesh, FakeScriptObject):
            vars(each).clear()
    dist.destroy_process_group()


def main(out: Path, names: list[str]) -> int:
    """Run the checks in order; return the exit code."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    report = out / f"rank{dist.get_rank()}.jsonl"
    with report.open("w", buffering=1) as file:
        for name in names or CHECKS:
            start = time.perf_counter()
            try:
                CHECKS[name]()
                dist.barrier()
                problem = ""
            except (Exception, pytest.fail.Exception):
                problem = traceback.format_exc()
            row = {"check": name, "problem": problem, "time_s": time.perf_counter() - start}
            file.write(json.dumps(row) + "\n")
            if problem:
                print(f"rank {dist.get_rank()}: {name}\n{problem}", file=sys.stderr)
                return 1
    leave_process_groups()
    if left := of_gloo():
        print(f"rank {os.environ['RANK']}: threads left at the end: {left}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
