"""Device times leave the host out: shown on a device that is a queue on the host's clock."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from bench import measure


class _Device:
    """Work follows on work, and starts when it is launched or when the device is free."""

    def __init__(self) -> None:
        self.free_at = 0.0

    def launch(self, seconds: float) -> None:
        self.free_at = max(self.free_at, time.perf_counter()) + seconds

    def synchronize(self) -> None:
        while time.perf_counter() < self.free_at:
            pass

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.free_at, time.perf_counter()))
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> _Device:
    device = _Device()
    blocker = SimpleNamespace(zero_=lambda: device.launch(100e-6))
    monkeypatch.setattr(torch, "empty", lambda *args, **options: blocker)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    return device


def test_launches_are_timed_without_the_host_that_makes_them(device: _Device) -> None:
    def slowly_launched() -> None:
        for _ in range(5):
            device.launch(10e-6)
            until = time.perf_counter() + 60e-6
            while time.perf_counter() < until:
                pass

    times = measure.device_times(
        {"short": slowly_launched, "long": lambda: device.launch(2e-3)}, 0.2
    )
    assert times["short"].p50_ms == pytest.approx(0.05, rel=1e-3)
    assert times["long"].p50_ms == pytest.approx(2.0, rel=1e-3)


def test_a_wait_for_the_device_is_part_of_the_time(device: _Device) -> None:
    def waiting() -> None:
        device.launch(200e-6)
        device.synchronize()
        device.launch(100e-6)

    assert measure.device_times({"waiting": waiting}, 0.05)["waiting"].p50_ms >= 0.3
