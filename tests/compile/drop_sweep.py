"""Cross-compile the kernel of dropout: ``python -m tests.compile.drop_sweep sm_90``."""

from __future__ import annotations

import dataclasses
import json
import sys

from peft_kernels.lora import drop_kernels
from tests.compile.cross import compile_for

DTYPES = ("bf16", "fp16", "fp32")


def main(family: str) -> None:
    """Print the report of each dtype, by its name."""
    found = {}
    for dtype in DTYPES:
        types = {
            "x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "seed_ptr": "*i64", "inverse_keep": "fp32",
            "M": "i32", "K": "i32", "stride_xm": "i32", "drop_threshold": "i32",
        }  # fmt: skip
        aligned = frozenset({"x_ptr", "y_ptr", "seed_ptr", "K", "stride_xm"})
        blocks = {"BLOCK_M": drop_kernels.BLOCK_M, "BLOCK_K": drop_kernels.BLOCK_K}
        report = compile_for(
            drop_kernels._drop_kernel, family, types, blocks, aligned, drop_kernels.NUM_WARPS, 3
        )
        found[dtype] = dataclasses.asdict(report) | {
            "problems": report.problems(family, pipelined=False, products=False)
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
