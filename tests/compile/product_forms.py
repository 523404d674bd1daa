"""Print what ``core.device.multiply_add`` compiles to in a loop, as JSON by precision.

A process of its own, because Triton must be imported without its interpreter.
"""

from __future__ import annotations

import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_kernels.core.device import multiply_add


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, K, PRECISION: tl.constexpr):
    offs_m, offs_k = tl.arange(0, 64), tl.arange(0, 32)
    acc = tl.zeros((64, 64), tl.float32)
    for k in range(0, K, 32):
        a = tl.load(a_ptr + offs_m[:, None] * K + (k + offs_k)[None, :])
        b = tl.load(b_ptr + (k + offs_k)[:, None] * 64 + offs_m[None, :])
        acc = multiply_add(a, b, acc, PRECISION)
    tl.store(c_ptr + offs_m[:, None] * 64 + offs_m[None, :], acc)


def main() -> None:
    """Compile for two families and print roundings to tf32 and additions after a product."""
    found = {}
    for family in (80, 90):
        for dtype, precision in (("fp32", "ieee"), ("fp32", "tf32"), ("bf16", "tf32")):
            types = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "c_ptr": "*fp32", "K": "i32"}
            source = ASTSource(
                fn=_product_kernel,
                signature=types | {"PRECISION": "constexpr"},
                constexprs={"PRECISION": precision},
            )
            compiled = triton.compile(source, target=GPUTarget("cuda", family, 32))
            found[f"sm_{family} {dtype} {precision}"] = {
                "roundings": compiled.asm["ptx"].count("cvt.rna.tf32.f32"),
                "additions": compiled.asm["ttgir"].count("arith.addf"),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
