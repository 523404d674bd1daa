"""Launches of Triton kernels, remembered: the same call again costs the host a fraction.

Most of a launch's host time goes into choosing tiles, making some forty arguments and finding the
compiled kernel for them. All of that is a function of the shapes, strides, dtypes and alignment of
a launcher's tensors, of its numbers, and of a few settings. ``remembered`` keeps, for each such
key, what the launcher launched (a tape), and with the next call's addresses launches that again.

A tape is kept only of calls that did nothing but allocate, view from the start, and launch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels.core import lora_tiles, overrides, prefix_tiles, triton_runtime

# Shapes that change with every batch must not fill the memory.
MOST_TAPES = 4096

_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")
_VIEWS = ("aten::t", "aten::transpose", "aten::view", "aten::detach", "aten::alias")
# What temporaries are multiples of, in bytes: those of PyTorch's allocator for CUDA, or half.
_ALIGNMENT = 256
_recording = threading.local()


class _Tape:
    """What one call allocated and launched.

    Arguments are places in one list, the pool: the addresses of the call's tensors, those of what
    it allocated, that of the counters, descriptors, and what never changes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.complete = True
        self.counters = 0  # the most that a launch asked for
        # What is run, and what picks its arguments from the pool.
        self.launches: list[tuple[Any, Callable[[list[Any]], Any]]] = []
        self._bytes = 0  # of all temporaries together
        self._offsets: list[int] = []
        # Of a descriptor: kind, place and dtype of its tensor, class, and all that does not change.
        self._descriptors: list[tuple[str, int, torch.dtype, Any, dict[str, Any]]] = []
        self._constants: list[Any] = []
        self._inputs = {t.data_ptr(): place for place, t in reversed(list(enumerate(tensors)))}
        self._count = len(tensors)
        # Alive while the call is: no two of them share an address.
        self._allocated: list[Tensor] = []
        self._counters: list[Tensor] = []
        # By launch: what is run, and its arguments as (kind, place among those of its kind).
        self._recorded: list[tuple[Any, list[tuple[str, int]]]] = []

    def saw(self, operator: str, first: object, result: object) -> None:
        """Take in one operator of PyTorch's that the call ran."""
        if operator in _ALLOCATIONS and isinstance(result, Tensor):
            self._allocated.append(result)
            self._offsets.append(self._bytes)
            self._bytes += -(-result.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        elif operator not in _VIEWS or _address(first) != _address(result):
            self.complete = False

    def counted(self, size: int, buffer: Tensor) -> None:
        """Take in counters that the call asked for."""
        self.counters = max(self.counters, size)
        self._counters.append(buffer)

    def launched(self, compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        """Take in a launch."""
        recorded = []
        for value in arguments:
            base = getattr(value, "base", None)  # of a tensor descriptor
            if isinstance(base, Tensor):
                kind, place = self._place(base.data_ptr())
                self.complete &= kind in ("input", "temporary")
                fields = {name: held for name, held in vars(value).items() if name != "base"}
                recorded.append(("descriptor", len(self._descriptors)))
                self._descriptors.append((kind, place, base.dtype, value.__class__, fields))
            elif isinstance(value, Tensor) and value.data_ptr():
                recorded.append(self._place(value.data_ptr()))
                self.complete &= recorded[-1][0] != "constant"
            else:
                recorded.append(("constant", len(self._constants)))
                self._constants.append(0 if isinstance(value, Tensor) else value)
        self._recorded.append((compiled[(*grid, 1, 1)[:3]], recorded))

    def _place(self, address: int) -> tuple[str, int]:
        for place, made in enumerate(self._allocated):
            if made.data_ptr() == address:
                return "temporary", place
        if any(buffer.data_ptr() == address for buffer in self._counters):
            return "counters", 0
        if address in self._inputs:
            return "input", self._inputs[address]
        return "constant", 0  # unknown: the tape will not be played

    def finish(self) -> None:
        """Number the places of the pool and forget the tensors of the call."""
        sizes = {
            "input": self._count,
            "temporary": len(self._offsets),
            "counters": 1 if self.counters else 0,
            "descriptor": len(self._descriptors),
            "constant": len(self._constants),
        }
        first = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
        self.launches = [
            (run, _picking([first[kind] + place for kind, place in recorded]))
            for run, recorded in self._recorded
        ]
        self._inputs, self._allocated, self._counters, self._recorded = {}, [], [], []

    def replay(
        self, tensors: Sequence[Tensor], addresses: Sequence[int], device: torch.device
    ) -> None:
        """Launch it all again on other tensors, which lie at ``addresses``."""
        pool: list[Any] = [*addresses]
        if self._offsets:
            block = torch.empty(self._bytes, dtype=torch.uint8, device=device)
            start = block.data_ptr()
            pool += [start + offset for offset in self._offsets]
        if self.counters:
            buffer = triton_runtime.counters(device, self.counters)
            pool.append(buffer.data_ptr())
        for kind, place, dtype, form, fields in self._descriptors:
            given = kind == "input"
            base = tensors[place] if given else _Temporary(pool[self._count + place], dtype)
            # What its constructor would check follows from the key of the tape.
            descriptor = object.__new__(form)
            descriptor.__dict__.update(fields, base=base)
            pool.append(descriptor)
        pool += self._constants
        stream = _driver().active.get_current_stream(device.index or 0)
        for run, arguments in self.launches:
            run(*arguments(pool), stream=stream)


class _Temporary:
    """What a launch asks of a descriptor's tensor, of one that is a part of a block."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self._address


def _picking(places: Sequence[int]) -> Callable[[list[Any]], Any]:
    """Return what picks ``places`` from a list."""
    if len(places) == 1:  # itemgetter would return the value itself
        return lambda pool: [pool[place] for place in places]
    return operator.itemgetter(*places)


@functools.cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver


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
    seen = getattr(_recording, "seen", None)
    if seen is not None and compiled is not None:
        seen.append(compiled)
    tape = getattr(_recording, "tape", None)
    if tape is not None and compiled is None:  # a hook of Triton's kept it from being launched
        tape.complete = False
    elif tape is not None:
        bound = dict(zip(kernel.arg_names, positional, strict=False)) | named
        tape.launched(compiled, grid, [bound[name] for name in kernel.arg_names])


@contextlib.contextmanager
def compiled_kernels() -> Iterator[list[Any]]:
    """Give a list that takes in the compiled kernels launched meanwhile, but by a tape's replay."""
    seen: list[Any] = []
    _recording.seen = seen
    try:
        yield seen
    finally:
        _recording.seen = None


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
        given = (*args, *options.values()) if options else args
        key: list[Any] = [*options] if options else []
        tensors, addresses, single = [], [], False
        for value in given:
            if value is None:
                key.append(None)
            elif isinstance(value, Tensor):
                address, dtype = value.data_ptr(), value.dtype
                tensors.append(value)
                addresses.append(address)
                single |= dtype is torch.float32
                key += value.shape, value.stride(), dtype, address % 16
            else:
                key += value.__class__, value
        device = tensors[0].device
        if not serves(device) or getattr(_recording, "tape", None) is not None:
            launcher(*args, **options)
            return
        key += _settings(device, single)
        if len(set(addresses)) < len(addresses):  # which of them start at the same address
            key += map(addresses.index, addresses)
        kind = tuple(key)
        tape = tapes.get(kind)
        if tape is None:
            if len(tapes) >= MOST_TAPES:
                tapes.clear()
            tapes[kind] = _record(launcher, args, options, tensors)
        elif not tape.complete:
            launcher(*args, **options)
        elif device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                tape.replay(tensors, addresses, device)
        else:
            tape.replay(tensors, addresses, device)

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


def _settings(device: torch.device, single: bool) -> tuple[Any, ...]:
    """Return what launchers look at beside their arguments; ``single``: some are float32."""
    precision = torch.backends.cuda.matmul.fp32_precision if single else None
    return (
        device.index,
        precision,
        lora_tiles.FORCED.current,
        prefix_tiles.FORCED.current,
        overrides.STATE.forced,
    )


def _address(value: object) -> int:
    return value.data_ptr() if isinstance(value, Tensor) else -1
