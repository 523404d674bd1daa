"""The counters and timers that only a GPU has."""

from __future__ import annotations

import pytest
import torch

from bench.lora.baselines import EAGER, FROZEN
from bench.lora.cases import LoRACase
from bench.lora.method import TRITON
from bench.measure import device_times, wall_times
from bench.memory import count_launches, peak_bytes
from bench.method import BOTH, FORWARD
from bench.rows import PeakTable, measure_case

pytestmark = pytest.mark.gpu
CASE = LoRACase("gpu 512x512x768", "gpu", 512, 512, 768, 16, 0.1)


def test_launches_and_peak_are_counted_exactly() -> None:
    device = torch.device("cuda")
    x = torch.randn(1 << 20, device=device)
    assert count_launches(lambda: x * 2, device) == 1
    assert count_launches(lambda: (x * 2).mul_(3), device) == 2
    assert peak_bytes(lambda: x * 2, device) == 4 << 20


def test_device_times_tell_a_large_product_from_a_small_one() -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    b = a[:256, :256].contiguous()
    times = device_times({"large": lambda: a @ a, "small": lambda: b @ b}, 0.1)
    assert times["large"].p20_ms > 2 * times["small"].p20_ms


def test_launches_are_timed_without_the_host_and_what_waits_for_it_is_timed_too() -> None:
    x = torch.randn(64, device="cuda")

    def many() -> torch.Tensor:
        y = x
        for _ in range(50):
            y = y * 1.001
        return y

    times = device_times({"many": many, "waiting": lambda: (x * 2).sum().item()}, 0.1)
    wall = wall_times({"many": many}, 0.1, synchronize=torch.cuda.synchronize)
    assert times["many"].p20_ms < wall["many"].p20_ms
    assert times["waiting"].p20_ms > 0


def test_rows_of_a_case_pass_the_gate_and_hold_times() -> None:
    device = torch.device("cuda")
    rows = measure_case(CASE, [FROZEN, EAGER, TRITON], device, 0.1, PeakTable(device))
    assert [row.note for row in rows if row.status != "timed"] == []
    ours = {row.direction: row for row in rows if row.provider == TRITON.name}
    assert ours[FORWARD].launches is not None and ours[BOTH].launches is not None
    assert ours[FORWARD].saved_bytes == 2 * CASE.tokens * CASE.rank + 8
    assert all(row.wall is not None and row.wall.p20_ms > 0 for row in ours.values())
