"""What is removed from the kernels, one at a time, to see that the tests notice."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_emulation import build


@dataclass(frozen=True)
class Mutant:
    """One change of a source.

    Attributes:
        name: what is missing.
        file: the file in csrc/cuda.
        before: text of it, found once.
        after: what stands in its place.
        seen_by: "results", or the sanitizer that sees what leaves the results right on a CPU.
    """

    name: str
    file: str
    before: str
    after: str
    seen_by: str = "results"

    @property
    def id(self) -> str:
        """The name as pytest takes it, without the kernel that it begins with."""
        return self.name.split(": ")[-1].replace(" ", "-")

    def sources(self) -> Path:
        """Return a copy of csrc with the change made: its path depends on the name alone."""
        folder = build.CACHE / "mutants" / self.name.replace(" ", "-")
        target = folder / "cuda" / self.file
        shutil.copytree(build.ROOT / "csrc" / "cuda", folder / "cuda", dirs_exist_ok=True)
        text = target.read_text()
        assert text.count(self.before) == 1, f"{self.name}: {text.count(self.before)} places"
        target.write_text(text.replace(self.before, self.after))
        return folder


_SYNC = "device::sync_threads();"

MUTANTS = [
    Mutant(
        "end of the rows in the result",
        "tile_product.h",
        "if (row >= rows || column >= columns) continue;",
        "if (column >= columns) continue;",
        seen_by="address",
    ),
    Mutant(
        "barrier before a stage is used and reused",
        "tile_product.h",
        "// This step's tiles are there for all, and the last step's are no longer read.\n"
        f"      {_SYNC}",
        "",
    ),
    Mutant(
        "barrier after the loop over the depth",
        "tile_product.h",
        f"    {_SYNC}\n  }}\n\n  // Store value",
        "  }\n\n  // Store value",
    ),
    Mutant(
        "barrier between writing and reading the result tile",
        "tile_product.h",
        f"{_SYNC}\n    constexpr int kPack",
        "constexpr int kPack",
    ),
    Mutant(
        "barrier before the flag is released",
        "tile_product.h",
        f"    {_SYNC}\n  }}\n}};\n\n}}  // namespace pk",
        "  }\n};\n\n}  // namespace pk",
        seen_by="thread",
    ),
    Mutant(
        "wait for the copies",
        "tile_product.h",
        "device::cp_async_wait<kStages - 2>();",
        "",
    ),
    Mutant(
        "wait for the last but one copy",
        "tile_product.h",
        "device::cp_async_wait<kStages - 2>();",
        "device::cp_async_wait<kStages - 1>();",
    ),
    Mutant(
        "commit of the copies",
        "tile_product.h",
        "      device::cp_async_commit();\n      T* tile",
        "      T* tile",
    ),
    Mutant(
        "zeros behind the end of the depth by elements",
        "tile_product.h",
        "pack[j] = inside && j < left ? source[j] : zero<T>();",
        "pack[j] = inside ? source[j] : zero<T>();",
    ),
    Mutant(
        "zeros behind the end of the depth by copies",
        "tile_product.h",
        "device::cp_async_16(target, source, inside);",
        "device::cp_async_16(target, source, true);",
    ),
    Mutant(
        "barrier after dropout in the producer",
        "lora_kernel.h",
        f"call.depth, call.dropout);\n        {_SYNC}",
        "call.depth, call.dropout);",
    ),
    Mutant(
        "barrier after a ticket is read",
        "lora_kernel.h",
        f"// Read by all before the next one is written.\n    {_SYNC}",
        "",
    ),
    Mutant(
        "barrier after a ticket is taken",
        "lora_kernel.h",
        f"device::atomic_add(call.counters, 1);\n    {_SYNC}",
        "device::atomic_add(call.counters, 1);",
    ),
    Mutant(
        "wait for the flag",
        "lora_kernel.h",
        "while (device::load_acquire(flag) < producers) device::spin();",
        "(void)flag, (void)producers;",
    ),
    Mutant(
        "barrier after the flag is seen",
        "lora_kernel.h",
        f"device::spin();\n      {_SYNC}",
        "device::spin();",
        seen_by="thread",
    ),
    Mutant(
        "release of the flag",
        "lora_kernel.h",
        "device::add_release(flags + m, 1);",
        "device::atomic_add(flags + m, 1);",
        seen_by="thread",
    ),
    Mutant(
        "acquire of the flag",
        "lora_kernel.h",
        "while (device::load_acquire(flag) < producers)",
        "while (device::atomic_add(const_cast<int*>(flag), 0) < producers)",
        seen_by="thread",
    ),
    Mutant(
        "order of the last block to leave",
        "lora_kernel.h",
        "device::add_acquire_release(call.counters + 1, 1)",
        "device::atomic_add(call.counters + 1, 1)",
        seen_by="thread",
    ),
    Mutant(
        "counters set back to zero",
        "lora_kernel.h",
        "call.counters[i] = 0;",
        "(void)i;",
    ),
    Mutant(
        "16 bytes of shared memory",
        "lora_kernel.h",
        "device::carved_bytes(Tile::kElements * sizeof(T));",
        "device::carved_bytes(Tile::kElements * sizeof(T)) - 16;",
    ),
    Mutant(
        # The last line's padding is spare, hence two.
        "16 bytes between the stages",
        "tile_product.h",
        "kRowsElements + kColumnsLines * padded<T>(kColumnsLength);",
        "kRowsElements + kColumnsLines * padded<T>(kColumnsLength) - 2 * kPackOf16<T>;",
    ),
    Mutant(
        "barrier before a part of the tokens is counted",
        "token_reduction.cu",
        f"int* slot) {{\n  {_SYNC}",
        "int* slot) {",
        seen_by="thread",
    ),
    Mutant(
        "barrier after the parts are counted",
        "token_reduction.cu",
        f"    *slot = last;\n  }}\n  {_SYNC}",
        "    *slot = last;\n  }",
        seen_by="thread",
    ),
    Mutant(
        "order of the last part to arrive",
        "token_reduction.cu",
        "device::add_acquire_release(counter, 1)",
        "device::atomic_add(counter, 1)",
        seen_by="thread",
    ),
    Mutant(
        "barrier after dropout in the reduction",
        "token_reduction.cu",
        f"columns, call.dropout);\n      {_SYNC}",
        "columns, call.dropout);",
    ),
]
