"""Launches of Triton kernels, remembered: the same call again costs the host a fraction.

Most of a launch's host time goes into choosing tiles, making some forty arguments and finding the
compiled kernel for them. All of that is a function of the shapes, strides, dtypes and alignment of
a launcher's tensors, of its numbers, and of a few settings. ``remembered`` keeps, for each such
key, what the launcher launched (a tape), and with the next call's addresses launches that again.

A tape is kept only of calls that did nothing but allocate, view from the start, and launch.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels.core import lora_tiles, prefix_tiles, triton_runtime

# Shapes that change with every batch must not fill the memory.
MOST_TAPES = 4096

_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")
_VIEWS = ("aten::t", "aten::transpose", "aten::view", "aten::detach", "aten::alias")
_recording = threading.local()
# Place among the arguments, place of its tensor, its class, shape, strides and block.
_Descriptor = tuple[int, int, Any, list[int], list[int], list[int]]


class _Tape:
    """What one call allocated and launched.

    Pointers are places in a list: the call's tensors, then what it allocated, then counters.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.complete = True
        self.temporaries: list[tuple[Sequence[int], Sequence[int], torch.dtype]] = []
        self.counters: list[int] = []
        # What is run, its arguments, and where among them which pointers and descriptors go.
        self.launches: list[tuple[Any, list[Any], list[tuple[int, int]], list[_Descriptor]]] = []
        self._inputs = {t.data_ptr(): place for place, t in reversed(list(enumerate(tensors)))}
        self._count = len(tensors)
        # Alive while the call is: no two of them share an address.
        self._allocated: list[Tensor] = []
        self._counters: list[Tensor] = []

    def saw(self, operator: str, first: object, result: object) -> None:
        """Take in one operator of PyTorch's that the call ran."""
        if operator in _ALLOCATIONS and isinstance(result, Tensor):
            self.temporaries.append((result.shape, result.stride(), result.dtype))
            self._allocated.append(result)
        elif operator not in _VIEWS or _address(first) != _address(result):
            self.complete = False

    def counted(self, size: int, buffer: Tensor) -> None:
        """Take in counters that the call asked for."""
        self.counters.append(size)
        self._counters.append(buffer)

    def launched(self, compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        """Take in a launch."""
        places, descriptors = [], []
        values = list(arguments)
        for index, value in enumerate(arguments):
            base = getattr(value, "base", None)  # of a tensor descriptor
            tensor = value if isinstance(value, Tensor) else base
            if not isinstance(tensor, Tensor):
                continue
            values[index] = 0
            address = tensor.data_ptr()
            place = self._place(address)
            if address or tensor is base:
                self.complete &= place is not None
            if tensor is base:
                shape, strides, block = list(value.shape), list(value.strides), value.block_shape
                descriptors.append((index, place or 0, value.__class__, shape, strides, block))
            elif address:
                places.append((index, place or 0))
        self.launches.append((compiled[(*grid, 1, 1)[:3]], values, places, descriptors))

    def _place(self, address: int) -> int | None:
        for place, made in enumerate(self._allocated):
            if made.data_ptr() == address:
                return self._count + place
        # The latest: the others may be smaller, and another stream's need not be the same. They
        # are counted from the end, since temporaries may follow.
        for place, buffer in reversed(list(enumerate(self._counters))):
            if buffer.data_ptr() == address:
                return -1 - place
        return self._inputs.get(address)

    def finish(self) -> None:
        """Forget the tensors of the call."""
        self._inputs, self._allocated, self._counters = {}, [], []

    def replay(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Launch it all again on other tensors."""
        from triton.runtime import driver

        stream = driver.active.get_current_stream(device.index or 0)
        made = [
            torch.empty_strided(size, stride, dtype=dtype, device=device)
            for size, stride, dtype in self.temporaries
        ]
        made += [triton_runtime.counters(device, size) for size in reversed(self.counters)]
        made = [*tensors, *made]
        pointers = [t.data_ptr() for t in made]
        for run, values, places, descriptors in self.launches:
            arguments = values.copy()
            for index, place in places:
                arguments[index] = pointers[place]
            for index, place, kind, *layout in descriptors:
                arguments[index] = kind(made[place], *layout)
            run(*arguments, stream=stream)


class _Watch(TorchDispatchMode):
    """Shows a tape the operators that run while it is recorded."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not getattr(_recording, "paused", False):
            self.tape.saw(func._schema.name, args[0] if args else None, result)
        return result


def launch(kernel: Any, grid: Sequence[int], *positional: Any, **named: Any) -> None:
    """Launch ``kernel[grid](*positional, **named)``, seen by the tape that is recorded, if any."""
    compiled = kernel[grid](*positional, **named)
    tape = getattr(_recording, "tape", None)
    if tape is not None and compiled is None:  # a hook of Triton's kept it from being launched
        tape.complete = False
    elif tape is not None:
        bound = dict(zip(kernel.arg_names, positional, strict=False)) | named
        tape.launched(compiled, grid, [bound[name] for name in kernel.arg_names])


def counters(device: torch.device, size: int) -> Tensor:
    """Return ``triton_runtime.counters``, seen by the tape that is recorded, if any."""
    tape = getattr(_recording, "tape", None)
    if tape is None:
        return triton_runtime.counters(device, size)
    _recording.paused = True
    try:
        buffer = triton_runtime.counters(device, size)
    finally:
        _recording.paused = False
    tape.counted(size, buffer)
    return buffer


def serves(device: torch.device) -> bool:
    """Return whether launches on ``device`` are worth remembering: those of compiled kernels."""
    return device.type == "cuda"


def remembered(launcher: Callable[..., None]) -> Callable[..., None]:
    """Make a launcher, a function of tensors and numbers that returns nothing, remember its calls.

    It must be a pure function of them, the settings in the key and the device's state: it writes
    tensors, and keeps nothing.
    """
    tapes: dict[tuple[Any, ...], _Tape] = {}

    @functools.wraps(launcher)
    def run(*args: Any, **options: Any) -> None:
        given = (*args, *options.values())
        tensors = [value for value in given if isinstance(value, Tensor)]
        device = tensors[0].device
        if not serves(device) or getattr(_recording, "tape", None) is not None:
            launcher(*args, **options)
            return
        key = (_settings(device), *options, *map(_described, given), _aliases(tensors))
        tape = tapes.get(key)
        if tape is None:
            if len(tapes) >= MOST_TAPES:
                tapes.clear()
            tapes[key] = _record(launcher, args, options, tensors)
        elif not tape.complete:
            launcher(*args, **options)
        elif device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                tape.replay(tensors, device)
        else:
            tape.replay(tensors, device)

    return run


def _record(
    launcher: Callable[..., None], args: Any, options: Any, tensors: Sequence[Tensor]
) -> _Tape:
    tape = _recording.tape = _Tape(tensors)
    try:
        with _Watch(tape):
            launcher(*args, **options)
    finally:
        _recording.tape = None
    tape.finish()
    return tape


def _settings(device: torch.device) -> tuple[Any, ...]:
    """Return what launchers look at beside their arguments."""
    precision = torch.backends.cuda.matmul.fp32_precision
    return device.index, precision, lora_tiles.forced(), prefix_tiles.forced()


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.data_ptr() % 16
    return value.__class__, value


def _aliases(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return which tensors start at the same address, as the first place of each."""
    addresses = [t.data_ptr() for t in tensors]
    if len(set(addresses)) == len(addresses):
        return ()
    return tuple(map(addresses.index, addresses))


def _address(value: object) -> int:
    return value.data_ptr() if isinstance(value, Tensor) else -1
