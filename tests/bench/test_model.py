"""Predicted times: near what was measured, and following what they are made of."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bench import model
from bench.lora.cases import GPU_CASES, LoRACase
from bench.machine import kernels
from bench.machine.gpus import GPUS, Gpu, find
from bench.method import BOTH, DIRECTIONS, FORWARD, GPU, OURS
from bench.methods import METHODS

# What is held of the committed rows of an H200.
EACH_WITHIN, MEAN_WITHIN = 2.0, 1.25


def named(name: str) -> Gpu:
    gpu = find(name)
    assert gpu is not None
    return gpu


def lora(name: str) -> LoRACase:
    return next(case for case in GPU_CASES if case.name == name)


def total(case: LoRACase, gpu: str = "H200", direction: str = FORWARD) -> float:
    found = model.predict(case, direction, named(gpu))
    assert found is not None
    return sum(each.ms for each in found)


@pytest.mark.parametrize("op", [*kernels.FUSED, "frozen"])
def test_predictions_of_the_committed_rows_are_near(op: str) -> None:
    ratios = {}
    for row in model.measured_rows(named("H200")):
        wanted = OURS if op != "frozen" else "frozen"
        if row.provider != wanted or op not in (row.case.op, "frozen"):
            continue
        predicted = model.predicted_ms(row, "NVIDIA H200")
        assert predicted is not None and row.timing is not None
        ratios[row.case.name, row.direction] = predicted / row.timing.min_ms
    assert len(ratios) >= 6
    mean, worst = model.quality(ratios.values())
    assert worst <= EACH_WITHIN, ratios
    assert mean <= MEAN_WITHIN, ratios


def test_quality_counts_both_directions_alike() -> None:
    mean, worst = model.quality([2.0, 0.5, 1.0, 1.0])
    assert math.isclose(mean, math.sqrt(2)) and math.isclose(worst, 2.0)


@pytest.mark.parametrize(
    "case", [c for m in METHODS.values() for c in m.of_suite(GPU, reported=True)], ids=str
)
def test_kernels_do_all_of_the_counted_work_and_not_much_more(case: object) -> None:
    op = case.op  # type: ignore[attr-defined]
    for direction in DIRECTIONS:
        counted = METHODS[op].work(case, direction, OURS)
        done = [*kernels.FUSED[op](case, direction, "sm_90")]
        flops, moved = sum(each.flops for each in done), sum(each.bytes for each in done)
        if op != "prompt":  # whose sums need no tensor core
            assert flops >= 0.99 * counted.flops
        few = op == "prefix" and case.decoding  # type: ignore[attr-defined]
        wide = op == "lora" and case.tokens < 64  # type: ignore[attr-defined]
        assert flops <= (80 if few else 10 if wide else 3) * counted.flops
        assert 0.5 * counted.bytes <= moved <= 2 * counted.bytes


def test_a_tile_more_than_there_are_places_takes_another_wave() -> None:
    gpu = named("H200")
    full = kernels.Kernel("", "ticket_tma", flops=1e12, tiles=132, resident=1)
    more = replace(full, flops=1e12 * 133 / 132, tiles=133)
    one, two = (model.predict_kernel(each, gpu, "16bit") for each in (full, more))
    start = model.USES["ticket_tma"].start_us * 1e-3
    assert math.isclose(two.ms - start, 2 * (one.ms - start), rel_tol=1e-6)
    assert (one.bound, two.bound) == ("compute", "waves")


def test_what_bounds_a_kernel_is_named() -> None:
    gpu = named("A100")

    def bound(kind: str, **work: float) -> str:
        return model.predict_kernel(kernels.Kernel("", kind, **work), gpu, "16bit").bound

    assert bound("library", flops=1e12, bytes=1e6) == "compute"
    assert bound("library", flops=1e9, bytes=1e9) == "memory"
    assert bound("library", flops=1e6, bytes=1e4) == "launch"
    assert bound("recompute", flops=1e8, bytes=1e7, steps=64, tiles=64, resident=2) == "steps"
    assert bound("reduction", flops=1e6, bytes=1e6, drawn=1e9) == "masks"


def test_faster_machines_and_smaller_cases_take_less() -> None:
    case = lora("llama3-8b.q M8192 r16 p0")
    times = [total(case, gpu) for gpu in ("B200", "H200", "A100", "A10", "RTX 3090")]
    assert times == sorted(times)
    assert total(case) < total(replace(case, tokens=16384)) < 2.1 * total(case)
    assert total(case) < total(replace(case, dropout_p=0.1))
    frozen = model.predict(case, FORWARD, named("H200"), "frozen")
    assert frozen is not None and frozen[0].ms < total(case) < total(case, direction=BOTH)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_has_a_table(gpu: Gpu) -> None:
    text = model.report(gpu, kernels=True)
    assert "nan" not in text and "inf" not in text
    assert ("measured on H200" in text) == (gpu.name == "H200")
    assert ("nothing of" in text) == (gpu.name != "H200")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A10", "A10"), ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_gpus_are_told_by_name(name: str, known: str | None) -> None:
    found = find(name)
    assert (found and found.name) == known


def test_what_is_not_modelled_has_no_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    row = model.measured_rows(named("H200"))[0]
    assert model.predicted_ms(replace(row, provider="eager"), "H200") is None
    assert model.predicted_ms(row, "Tesla T4") is None
    assert model.main(["--gpu", "H200", "--op", "prompt"]) == 0
    assert "6 measured on H200" in capsys.readouterr().out
    for unknown in ("T4", "RTX", ""):
        with pytest.raises(SystemExit):
            model.main(["--gpu", unknown])
    assert "--gpu must be one of A100, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "known"),
    [("4090", "RTX 4090"), ("a10", "A10"), ("a100", "A100"), ("rtx 50", "RTX 5090")],
)
def test_a_part_of_a_name_names_a_gpu(
    asked: str, known: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert model.main(["--gpu", asked, "--op", "prompt"]) == 0
    assert f"nothing of {known} in bench/results" in capsys.readouterr().out
