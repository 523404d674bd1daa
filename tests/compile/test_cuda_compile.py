"""Every file of csrc/cuda compiles for seven GPU families: no spills, onto tensor cores.

ptxas' report and the SASS say so. What a kernel takes of shared memory is known at its launch
alone: the emulated device of tests/cuda_emulation refuses more than the smallest family has.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import cuda_build
import pytest

from tests.compile.cuda_report import WITHOUT_PRODUCTS, Kernel, report

SOURCES = sorted((cuda_build.ROOT / "csrc" / "cuda").glob("*.cu"))


def has_nvcc() -> bool:
    try:
        cuda_build.find_nvcc()
    except cuda_build.CannotBuild:
        return False
    return True


@pytest.mark.skipif(not has_nvcc(), reason="nvcc not found: not run")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_compiles_without_spills_and_onto_tensor_cores(source: Path) -> None:
    pytest.importorskip("triton", reason="its wheel has the disassembler")
    reports = report(source, cuda_build.ARCHITECTURES)
    assert all(reports[arch] for arch in cuda_build.ARCHITECTURES)
    unclean = {
        f"sm_{arch} {each.name}": each.problems(arch)
        for arch, kernels in reports.items()
        for each in kernels
        if each.problems(arch)
    }
    assert not unclean


@pytest.mark.skipif(not has_nvcc(), reason="nvcc not found: not run")
@pytest.mark.timeout(900)
def test_every_dtype_has_a_kernel_with_products_and_one_without() -> None:
    pytest.importorskip("triton", reason="its wheel has the disassembler")
    kernels = [
        each for source in SOURCES for each in report(source, cuda_build.ARCHITECTURES)["80"]
    ]
    names = {re.findall(r"\w+_kernel\b", each.name)[0] for each in kernels}
    assert set(WITHOUT_PRODUCTS) < names
    products = [each for each in kernels if not any(n in each.name for n in WITHOUT_PRODUCTS)]
    assert {each.dtype for each in products} == {"float", "Half", "BFloat16"}
    assert all(bool(each.tensor_core_instructions) == (each.dtype != "float") for each in products)


CLEAN = Kernel("void pk::lora_kernel<pk::Half>(pk::LoRACall<pk::Half>)", 128, 0, 0, 0, 64, 12, 0)


@pytest.mark.parametrize(
    ("change", "arch", "complaint"),
    [
        ({"spills": 8}, "80", "spills 8 bytes"),
        ({"spill_instructions": 2}, "90a", "2 instructions"),
        ({"stack": 32}, "86", "32 bytes of stack"),
        ({"static_shared": 512}, "120", "512 bytes of shared memory"),
        ({"tensor_core_instructions": 0}, "75", "no tensor-core instruction"),
        ({"async_copies": 0}, "100", "no asynchronous copy"),
    ],
)
def test_a_report_complains(change: dict[str, int], arch: str, complaint: str) -> None:
    assert CLEAN.problems(arch) == []
    (found,) = dataclasses.replace(CLEAN, **change).problems(arch)  # type: ignore[arg-type]
    assert complaint in found


def test_what_a_family_lacks_is_no_complaint() -> None:
    bfloat16 = dataclasses.replace(
        CLEAN, name=CLEAN.name.replace("Half", "BFloat16"), tensor_core_instructions=0
    )
    assert bfloat16.problems("75") == []
    assert bfloat16.problems("80") == ["no tensor-core instruction"]
    single = dataclasses.replace(bfloat16, name="void pk::lora_kernel<float>()")
    assert single.problems("80") == []
