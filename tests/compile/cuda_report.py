"""What nvcc and ptxas make of one file of csrc/cuda, for each architecture and kernel of it.

Results are kept in build/cuda_compile under a hash of everything that went into them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cuda_build

from tests.compile.cross import disassemble

CACHE = cuda_build.ROOT / "build" / "cuda_compile"
# Copies and sums: every other kernel makes products.
WITHOUT_PRODUCTS = (
    "prompt_forward_kernel", "prompt_gradient_kernel", "table_gradient_kernel",
    "prefix_parts_kernel", "prefix_gate_gradient_kernel",
)  # fmt: skip
_FIELDS = {
    "registers": r"Used (\d+) registers",
    "spills": r"(\d+) bytes spill stores",
    "stack": r"(\d+) bytes stack frame",
    "static_shared": r"(\d+) bytes smem",
}


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of a kernel, and what its SASS contains.

    Attributes:
        name: with its template arguments.
        registers: of a thread.
        spills: bytes stored.
        stack: bytes.
        static_shared: bytes; kernels take all of their shared memory at launch, and none here.
        tensor_core_instructions: HMMA, HGMMA.
        async_copies: LDGSTS.
        spill_instructions: STL and LDL.
    """

    name: str
    registers: int
    spills: int
    stack: int
    static_shared: int
    tensor_core_instructions: int
    async_copies: int
    spill_instructions: int

    @property
    def dtype(self) -> str:
        """What it computes in, by its template arguments."""
        found = re.search(r"\b(Half|BFloat16)\b", self.name)
        return found[1] if found else "float"

    def problems(self, arch: str) -> list[str]:
        """Return what would make this kernel slow or wrong on ``arch``."""
        number = int(arch.rstrip("af"))
        multiplies = not any(name in self.name for name in WITHOUT_PRODUCTS)
        # Below sm_80 bfloat16 has no product of its own; float32 is exact everywhere.
        cores = multiplies and (self.dtype == "Half" or (self.dtype == "BFloat16" and number >= 80))
        found = []
        if self.spills or self.spill_instructions:
            found.append(f"spills {self.spills} bytes, {self.spill_instructions} instructions")
        if self.stack:
            found.append(f"{self.stack} bytes of stack: an array that is not in registers")
        if self.static_shared:
            found.append(f"{self.static_shared} bytes of shared memory that no launch counts")
        if cores and not self.tensor_core_instructions:
            found.append("no tensor-core instruction")
        if multiplies and number >= 80 and not self.async_copies:
            found.append("no asynchronous copy")
        return found


def report(source: Path, archs: Sequence[str]) -> dict[str, list[Kernel]]:
    """Compile ``source`` for ``archs`` and return the kernels of each.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    nvcc = cuda_build.find_nvcc()
    command = [nvcc, *cuda_build.kernel_flags(archs), "-Xptxas", "-v", "-fatbin"]
    headers = sorted(source.parent.glob("*.h"))
    key = hashlib.sha256()
    for part in (*command, cuda_build.cuda_version(nvcc), Path(__file__).read_text()):
        key.update(part.encode())
    for path in (source, *headers):
        key.update(path.name.encode() + path.read_bytes())
    kept = CACHE / f"{source.stem}-{'-'.join(archs)}-{key.hexdigest()[:16]}.json"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "out.fatbin"
            done = subprocess.run(
                [*command, str(source), "-o", str(binary)],
                capture_output=True,
                text=True,
                check=True,
            )
            sass = disassemble(binary.read_bytes())
        kernels = {arch: list(_read(done.stdout + done.stderr, sass, arch)) for arch in archs}
        unfinished = kept.with_suffix(f".{os.getpid()}")
        unfinished.write_text(
            json.dumps({arch: [asdict(each) for each in found] for arch, found in kernels.items()})
        )
        unfinished.rename(kept)
    found = json.loads(kept.read_text())
    return {arch: [Kernel(**each) for each in found[arch]] for arch in archs}


def _read(log: str, sass: str, arch: str) -> Iterable[Kernel]:
    parts = re.split(r"^arch = sm_(\w+)$", sass, flags=re.MULTILINE)
    (of_arch,) = [text for name, text in zip(parts[1::2], parts[2::2], strict=True) if name == arch]
    code = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", of_arch, re.DOTALL))
    entries = re.findall(
        rf"Compiling entry function '(\S+)' for 'sm_{arch}'(.*?)(?=Compiling entry function|\Z)",
        log,
        re.DOTALL,
    )
    plain = subprocess.run(
        ["c++filt"], input="\n".join(name for name, _ in entries), capture_output=True, text=True,
        check=True,
    ).stdout.splitlines()  # fmt: skip
    for (name, said), readable in zip(entries, plain, strict=True):
        numbers = {
            field: int(found[1]) if (found := re.search(pattern, said)) else 0
            for field, pattern in _FIELDS.items()
        }
        assert numbers["registers"], f"ptxas said nothing of {readable}"
        instructions = code[name]
        yield Kernel(
            name=readable.replace("(anonymous namespace)::", ""),
            tensor_core_instructions=len(re.findall(r"\bHG?MMA\b", instructions)),
            async_copies=len(re.findall(r"\bLDGSTS\b", instructions)),
            spill_instructions=len(re.findall(r"\b(?:STL|LDL)\b", instructions)),
            **numbers,
        )
