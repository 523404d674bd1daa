"""Cross-compile every prompt kernel and tile of one GPU family.

``python -m tests.compile.prompt_sweep sm_90 bf16``

Prints a JSON line per kernel, in a process of its own, as ``sweep`` does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

from peft_kernels.core import tiles
from peft_kernels.prompt.reference import CHAIN
from tests.compile.cross import Report, compile_for

_FORWARD = {
    "ids_ptr": "*i64", "weight_ptr": "*{t}", "prompt_ptr": "*{p}", "mask_ptr": "*i64",
    "labels_ptr": "*i64", "embeddings_ptr": "*{t}", "mask_out_ptr": "*i64",
    "labels_out_ptr": "*i64", "positions_ptr": "*i64", "columns_ptr": "*i64", "B": "i32",
    "S": "i32", "P": "i32", "D": "i32", "V": "i32", "stride_w": "i32", "stride_pb": "i32",
    "stride_pp": "i32", "column": "i32", "one": "i32", "significant": "i32",
}  # fmt: skip
_PROMPT_GRADIENT = {
    "dy_ptr": "*{t}", "columns_ptr": "*i64", "d_prompt_ptr": "*{p}", "B": "i32", "P": "i32",
    "D": "i32", "stride_yb": "i32", "stride_yt": "i32", "column": "i32",
}  # fmt: skip
_TABLE_GRADIENT = {
    "dy_ptr": "*{t}", "ids_ptr": "*i64", "order_ptr": "*i64", "columns_ptr": "*i64",
    "d_weight_ptr": "*{t}", "N": "i32", "S": "i32", "P": "i32", "D": "i32", "V": "i32",
    "stride_yb": "i32", "stride_yt": "i32", "column": "i32", "padding_idx": "i32",
}  # fmt: skip
# Everything else is a pointer, or a multiple of the width, which is aligned where it matters.
_LOOSE = {"B", "S", "P", "N", "V", "column", "one", "significant", "padding_idx"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel with everything that is settled before it is compiled."""

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    wide_loads: int  # loads of 16 bytes that a thread makes when nothing is split


def cases(dtype: str) -> list[Case]:
    """Return every case of "bf16", "fp16" or "fp32"."""
    size = 4 if dtype == "fp32" else 2
    tile, gradient = tiles.prompt_tile(size), tiles.prompt_gradient_tile(size)
    found = []
    for prompt in dict.fromkeys((dtype, "fp32")):
        for scan in (False, True):
            found.append(
                Case(
                    f"forward prompt {prompt} scan{int(scan)}",
                    "_prompt_forward_kernel",
                    _typed(_FORWARD, dtype, prompt),
                    {
                        "HAS_MASK": True, "HAS_LABELS": True, "SCAN": scan,
                        "BLOCK_T": tile.block_t, "BLOCK_D": tile.block_d,
                        "BLOCK_S": tile.block_s,
                    },
                    tile.num_warps,
                    (1 + (2 if (dtype, prompt) == ("bf16", "fp32") else 1)) * _accesses(tile, size),
                )
            )  # fmt: skip
            for per_sample in (False, True):
                found.append(
                    Case(
                        f"prompt gradient {prompt} columns{int(scan)} sample{int(per_sample)}",
                        "_prompt_gradient_kernel",
                        _typed(_PROMPT_GRADIENT, dtype, prompt),
                        {
                            "HAS_COLUMNS": scan, "PER_SAMPLE": per_sample, "CHAIN": CHAIN,
                            "BLOCK_P": gradient.block_t, "BLOCK_D": gradient.block_d,
                        },
                        gradient.num_warps,
                        1 if per_sample else CHAIN,
                    )
                )  # fmt: skip
    for scan in (False, True):
        found.append(
            Case(
                f"table gradient columns{int(scan)}",
                "_table_gradient_kernel",
                _typed(_TABLE_GRADIENT, dtype, dtype),
                {
                    "HAS_COLUMNS": scan, "CHAIN": CHAIN,
                    "BLOCK_D": gradient.block_t * gradient.block_d,
                },
                gradient.num_warps,
                CHAIN,
            )
        )  # fmt: skip
    return found


def _accesses(tile: tiles.CopyTile, size: int) -> int:
    """Return how many 16-byte accesses a thread makes for one tile."""
    return tile.block_t * tile.block_d * size // (16 * 32 * tile.num_warps)


def _typed(types: dict[str, str], dtype: str, prompt: str) -> dict[str, str]:
    return {name: kind.format(t=dtype, p=prompt) for name, kind in types.items()}


def problems(case: Case, report: Report, family: str) -> list[str]:
    """Return what would make a kernel that copies wrong or slow."""
    # There is no product here, and nothing is staged through shared memory.
    found = dataclasses.replace(report, matrix_instructions=1).problems(family, pipelined=False)
    if report.wide_loads < case.wide_loads:
        found.append(f"{report.wide_loads} 16-byte loads instead of {case.wide_loads}")
    if not report.wide_stores:
        found.append("no 16-byte store")
    return found


def compile_case(case: Case, family: str) -> Report:
    """Cross-compile one case."""
    from peft_kernels.prompt import kernels

    divisible = frozenset(set(case.types) - _LOOSE)
    kernel = getattr(kernels, case.kernel)
    return compile_for(kernel, family, case.types, case.constants, divisible, case.num_warps, 3)


def main(family: str, dtypes: list[str]) -> int:
    """Compile and print; the tests read the lines."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    for dtype in dtypes:
        for case in cases(dtype):
            report = compile_case(case, family)
            line = {"case": f"{dtype} {case.name}", "problems": problems(case, report, family)}
            print(json.dumps(line | dataclasses.asdict(report)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
