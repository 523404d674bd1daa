"""Remembered launches are what direct ones are, and what cannot be remembered runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels.core import launches, lora_tiles, triton_runtime
from tests.compile.runner import without_interpreter


@pytest.mark.skipif(triton_runtime.import_problem() is not None, reason="needs Triton: not run")
# What is forced to run by TMA is remembered in a process of its own.
@pytest.mark.parametrize(
    "methods",
    [("lora", "projections", "adapter", "prefix", "prompt"), ("ticket_tma", "prefix_tma")],
    ids=["chosen", "tma"],
)
def test_a_remembered_call_launches_what_a_direct_one_does(methods: tuple[str, ...]) -> None:
    printed = without_interpreter("tests.core.remembered_launches", *methods).splitlines()
    assert [line.partition(":")[0] for line in printed] == list(methods)
    assert all("replayed" in line for line in printed)


class _Kernel:
    """A kernel that is called with one tensor and a number, and compiled to itself."""

    arg_names = ("x_ptr", "number")

    def __init__(self) -> None:
        self.compiled: _Kernel | None = self
        self.ran: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., _Kernel | None]:
        def run(*args: Any, **named: Any) -> _Kernel | None:
            self.ran.append((tuple(args), named))
            return self.compiled

        return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How each call ran, "prepared" or "replayed", with CPU tensors remembered too."""
    found: list[str] = []
    monkeypatch.setattr(launches, "serves", lambda device: True)
    monkeypatch.setattr(launches._Tape, "replay", lambda *args: found.append("replayed"))
    yield found


def remembering(calls: list[str], body: Callable[..., Any]) -> Callable[..., None]:
    @launches.remembered
    def launcher(*args: Any, **options: Any) -> None:
        calls.append("prepared")
        body(*args, **options)

    return launcher


def launch_first(x: Tensor, *rest: Any, **options: Any) -> None:
    launches.launch(_Kernel(), (1,), x, number=3)


def test_a_call_is_prepared_once_for_each_kind_of_arguments(calls: list[str]) -> None:
    launcher = remembering(calls, launch_first)
    whole = torch.zeros(8, 16)
    for arguments in (
        (torch.zeros(4, 16), 1), (torch.zeros(5, 16), 1), (whole[:4, ::2], 1),
        (torch.zeros(4, 16, dtype=torch.float16), 1), (torch.zeros(65)[1:].view(4, 16), 1),
        (torch.zeros(4, 16), True), (torch.zeros(4, 16), 1.0), (torch.zeros(4, 16), None),
        (torch.zeros(4, 16), torch.zeros(4, 16)), (whole, whole), (torch.zeros(8, 16), whole),
    ):  # fmt: skip
        calls.clear()
        launcher(*arguments)
        launcher(*arguments)
        assert calls == ["prepared", "replayed"], arguments


def test_settings_and_options_are_part_of_the_kind(calls: list[str]) -> None:
    launcher = remembering(calls, launch_first)
    x = torch.zeros(4)
    launcher(x)
    with lora_tiles.forced_variant("split"):
        launcher(x)
    launcher(x, partial=True)
    launcher(x, partial=False)
    launcher(x)
    assert calls == ["prepared"] * 4 + ["replayed"]


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.zero_(),
        lambda x: x[1:],
        lambda x: launches.launch(_Kernel(), (1,), x.storage_offset_view, number=1),
    ],
    ids=["an operator", "a view from elsewhere", "an error"],
)
def test_what_did_more_than_launch_runs_every_time(calls: list[str], body: Any) -> None:
    launcher = remembering(calls, body)
    for _ in range(2):
        try:
            launcher(torch.zeros(4))
        except AttributeError:
            pass
    assert calls == ["prepared", "prepared"]


def test_a_launch_of_an_unknown_tensor_is_not_remembered(calls: list[str]) -> None:
    kept = torch.zeros(4)
    launcher = remembering(calls, lambda x: launches.launch(_Kernel(), (1,), kept, number=1))
    for _ in range(2):
        launcher(torch.zeros(4))
    assert calls == ["prepared", "prepared"]


def test_a_launch_that_triton_kept_back_is_not_remembered(calls: list[str]) -> None:
    kernel = _Kernel()
    kernel.compiled = None
    launcher = remembering(calls, lambda x: launches.launch(kernel, (1,), x, number=1))
    for _ in range(2):
        launcher(torch.zeros(4))
    assert calls == ["prepared", "prepared"]


def test_tapes_do_not_pile_up(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "MOST_TAPES", 2)
    launcher = remembering(calls, launch_first)
    for size in (1, 2, 3, 3, 1):
        launcher(torch.zeros(size))
    assert calls == ["prepared"] * 3 + ["replayed", "prepared"]


def test_a_replay_has_counters_for_the_launch_that_needs_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    buffer = torch.zeros(64, dtype=torch.int32)

    def counters(device: torch.device, size: int) -> Tensor:
        asked.append(size)
        return buffer

    monkeypatch.setattr(triton_runtime, "counters", counters)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 5))
    monkeypatch.setattr(launches, "_driver", lambda: driver)
    kernel = _Kernel()
    tape = launches._Tape([])
    for size in (2, 50, 3):
        tape.counted(size, buffer)
        tape.launched(kernel, (1,), [buffer])
    tape.finish()
    tape.replay([], [], buffer.device)
    assert tape.complete and asked == [50]
    assert kernel.ran == [((buffer.data_ptr(),), {"stream": 5})] * 3


class _Descriptor:
    def __init__(self, base: Tensor) -> None:
        self.base = base
        self.shape = tuple(base.shape)


def test_temporaries_of_a_replay_are_apart_and_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 5))
    monkeypatch.setattr(launches, "_driver", lambda: driver)
    kernel = _Kernel()
    x, parts = torch.zeros(4), [torch.empty(size) for size in (3, 65, 1)]
    tape = launches._Tape([x])
    for part in parts:
        tape.saw("aten::empty", None, part)
    tape.launched(kernel, (1,), [*parts, x, 7, _Descriptor(parts[1].view(5, 13)), _Descriptor(x)])
    tape.finish()
    kernel.ran.clear()
    tape.replay([x], [x.data_ptr()], x.device)
    (((first, second, third, *others, part, whole), _),) = kernel.ran
    assert tape.complete and others == [x.data_ptr(), 7]
    assert part.base.data_ptr() == second and part.base.dtype == torch.float32
    assert part.shape == (5, 13) and whole.base is x
    assert second - first >= 3 * 4 and third - second >= 65 * 4
    assert not any((place - first) % 256 for place in (second, third))
