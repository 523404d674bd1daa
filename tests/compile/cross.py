"""Compile a Triton kernel for a GPU that is not there, and read what came out of it."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_kernels.core.tiles import SHARED_LIMIT_KIB

TMEM_COLUMNS = 512


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs and contains; wide accesses move 16 bytes a thread."""

    registers: int
    spills: int
    matrix_instructions: int
    async_copies: int
    shared_kib: float
    tmem_columns: int
    wide_loads: int = 0
    wide_stores: int = 0
    inner_spills: int = 0  # of the innermost loops around matrix instructions
    serialised: int = 0  # asynchronous matrix instructions that wait for each other

    def problems(
        self,
        family: str,
        *,
        pipelined: bool,
        products: bool = True,
        measured: bool = False,
        overlapping: bool = False,
    ) -> list[str]:
        """Return what would make this kernel wrong or slow on ``family``.

        ``measured``: its tile was the fastest on a GPU; spills then count where they are repeated,
        more than two in an inner loop. ``overlapping``: its products must not wait for each other.
        """
        found = []
        if overlapping and self.serialised:
            found.append(f"{self.serialised} products that wait for each other")
        if measured and self.inner_spills > 2:
            found.append(f"{self.inner_spills} spill instructions in inner loops")
        elif self.spills and not measured:
            found.append(f"{self.spills} spill instructions")
        if products and not self.matrix_instructions:
            found.append("no tensor-core instruction")
        if self.shared_kib > SHARED_LIMIT_KIB[family]:
            found.append(f"{self.shared_kib:.0f} KiB of shared memory")
        if self.tmem_columns > TMEM_COLUMNS:
            found.append(f"{self.tmem_columns} TMEM columns")
        if pipelined and not self.async_copies:
            found.append("no asynchronous copy")
        return found


def compile_for(
    kernel: Any,
    family: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: frozenset[str],
    num_warps: int,
    num_stages: int,
    registers: int = 0,
) -> Report:
    """Compile ``kernel`` for ``family`` and disassemble it.

    Triton keeps what it compiled, and this the report of it in the same place.

    Args:
        kernel: a ``@triton.jit`` function.
        family: "sm_80" and so on.
        types: Triton type of each run-time argument, ``"*bf16"``, ``"i32"``, ``"fp32"``.
        constants: value of each constexpr, and of run-time arguments specialised to 1.
        divisible: names of pointers (by bytes) and integers known to be divisible by 16.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        registers: the most that a thread may take, 0 for no such bound.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_manager

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in divisible and name not in constants and "tensordesc" not in types[name]
    }
    bound = {"maxnreg": registers} if registers else {}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes),
        target=GPUTarget("cuda", int(family.removeprefix("sm_")), 32),
        options={"num_warps": num_warps, "num_stages": num_stages} | bound,
    )
    key = hashlib.sha256(compiled.asm["cubin"] + Path(__file__).read_bytes()).hexdigest()[:16]
    kept = get_cache_manager(compiled.hash)
    path = kept.get_file(f"report-{key}.json")
    if path is None:
        report = json.dumps(asdict(_report(compiled, family)))
        path = kept.put(report, f"report-{key}.json", binary=False)
    return Report(**json.loads(Path(path).read_text()))


def _report(compiled: Any, family: str) -> Report:
    sass = disassemble(compiled.asm["cubin"])
    matrix = {"sm_90": r"HGMMA| HMMA", "sm_100": r"UTC\w*MMA| HMMA"}.get(family, r" HMMA")
    return Report(
        registers=_registers(compiled.asm["cubin"]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        matrix_instructions=len(re.findall(matrix, sass)),
        async_copies=len(re.findall(r"LDGSTS|UTMALDG", sass)),
        shared_kib=compiled.metadata.shared / 1024,
        tmem_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        wide_loads=len(re.findall(r"\bLDG\S*\.128", sass)),
        wide_stores=len(re.findall(r"\bSTG\S*\.128", sass)),
        inner_spills=_inner_spills(sass, matrix),
        serialised=_serialised(sass, compiled.asm["ptx"]),
    )


def _serialised(sass: str, ptx: str) -> int:
    """Return how many warp groups' products the assembler makes wait for each other.

    Where it cannot prove that nobody touches their registers it says nothing, and fences each.
    """
    return max(0, sass.count("WARPGROUP.ARRIVE") - ptx.count("wgmma.fence"))


def _inner_spills(sass: str, matrix: str) -> int:
    """Return the most spill instructions of an innermost loop that holds matrix instructions."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    jumps = [(m, at) for at, text in code if (m := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    loops = [(int(m[1], 16), at) for m, at in jumps if int(m[1], 16) < at]

    def count(loop: tuple[int, int], pattern: str) -> int:
        return sum(
            loop[0] <= at <= loop[1] and re.search(pattern, text) is not None for at, text in code
        )

    around = [loop for loop in loops if count(loop, matrix)]
    # A loop around another may jump back into the middle of that: the shorter one is the inner.
    inner = [
        loop
        for loop in around
        if not any(
            other[0] <= loop[1] and loop[0] <= other[1] and other[1] - other[0] < loop[1] - loop[0]
            for other in around
        )
    ]
    return max((count(loop, r"\b(?:STL|LDL)\b") for loop in inner), default=0)


@functools.cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def _dump(cubin: bytes, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [_cuobjdump(), flag, file.name], capture_output=True, text=True, check=True
        ).stdout


def disassemble(cubin: bytes) -> str:
    """Return the SASS of a cubin."""
    return _dump(cubin, "-sass")


def _registers(cubin: bytes) -> int:
    return int(re.search(r"REG:(\d+)", _dump(cubin, "-res-usage"))[1])  # type: ignore[index]
