"""Compare remembered launches with direct ones, on a driver that runs nothing but remembers all.

``python -m tests.core.remembered_launches METHOD ...`` compiles for sm_90 and needs no GPU. A
process of its own, because Triton must be imported without its interpreter.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from peft_kernels.core import launches, lora_tiles, prefix_tiles, triton_runtime

launched: list[tuple[Any, ...]] = []


class _Launcher:
    """What a compiled kernel is started by."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.kernel = f"{metadata.name} {src.hash()}"
        self.pointers = [str(kind).startswith("*") for kind in src.signature.values()]

    def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        values = rest[5:]  # the function, two kinds of metadata and two hooks come first
        assert len(values) == len(self.pointers)
        shown: list[tuple[str, Any]] = []
        for value, pointer in zip(values, self.pointers, strict=True):
            if isinstance(value, TensorDescriptor):
                layout = (tuple(value.shape), tuple(value.strides), tuple(value.block_shape))
                shown += [("pointer", value.base.data_ptr()), (str(value.base.dtype), layout)]
            elif pointer:
                shown.append(("pointer", value.data_ptr() if isinstance(value, Tensor) else value))
            else:
                shown.append((type(value).__name__, value))
        launched.append((self.kernel, (x, y, z), stream, tuple(shown)))


class _Driver:
    """A driver of one GPU of the family sm_90."""

    launcher_cls = _Launcher
    utils = SimpleNamespace(
        load_binary=lambda *args: (object(), object(), 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 5)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


def _labelled(tensors: list[Tensor]) -> list[Any]:
    """Return the launches since the last time, addresses replaced by what lies there."""
    known = {t.data_ptr(): ("input", i) for i, t in reversed(list(enumerate(tensors)))}
    known[0] = ("nothing", 0)

    def label(value: tuple[str, Any]) -> tuple[str, Any]:
        if value[0] != "pointer":
            return value
        return known.setdefault(value[1], ("temporary", len(known)))

    found = [(kernel, grid, stream, tuple(map(label, shown)))
             for kernel, grid, stream, shown in launched]  # fmt: skip
    launched.clear()
    return found


def _tensor(*size: int, offset: int = 0, kind: torch.dtype = torch.float16) -> Tensor:
    """Return a tensor that starts ``offset`` elements after an address of 64 bytes."""
    count = int(torch.Size(size).numel())
    buffer = torch.zeros(count + offset + 64, dtype=kind)
    first = -buffer.data_ptr() % 64 // buffer.element_size()
    return buffer[first + offset : first + offset + count].view(size)


def _lora() -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
    from peft_kernels.lora import launch

    for m, offset, r, bias, p, scale in (
        (40, 0, 8, False, 0.0, 2.0), (40, 1, 8, False, 0.0, 2.0), (40, 0, 8, True, 0.0, 2.0),
        (40, 0, 8, False, 0.1, 2.0), (33, 0, 8, False, 0.0, 2.0), (40, 0, 8, False, 0.0, 3.0),
        (40, 0, 8, False, 0.0, _tensor(1, kind=torch.float32)), (1, 0, 16, False, 0.0, 2.0),
    ):  # fmt: skip
        x, w = _tensor(m, 64, offset=offset), _tensor(48, 64)
        a, b, s, y = _tensor(r, 64), _tensor(48, r), _tensor(m, r), _tensor(m, 48)
        seed = _tensor(1, kind=torch.int64) if p else None
        given_bias = _tensor(48) if bias else None
        yield launch.lora_forward, (x, w, a, b, given_bias, seed, scale, p, y, s)
        dx, da, db = torch.zeros_like(x), torch.zeros_like(a), torch.zeros_like(b)
        dbias = torch.zeros(48, dtype=x.dtype) if bias else None
        rest = (dx, da, db, dbias, None)
        yield launch.lora_backward, (y, x, s, w, a, b, seed, scale, p, *rest)


def _projections() -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
    from peft_kernels.lora import projections_launch

    for m, ranks, ps, biased, scale in (
        (40, (8, 16), (0.0, 0.0), (0, 1), 2.0), (40, (8, 16), (0.1, 0.1), (), 2.0),
        (33, (8, 1, 40), (0.1, 0.0, 0.2), (1,), 2.0), (1, (4, 4, 4, 4), (0.0,) * 4, (), 2.0),
        (40, (8,), (0.0,), (), 2.0), (40, (8,) * 6, (0.1,) * 6, (), 2.0),
        (40, (8, 16), (0.0, 0.0), (), _tensor(1, kind=torch.float32)),
    ):  # fmt: skip
        x, projections, gradients = _tensor(m, 64), [], []
        for index, (r, p) in enumerate(zip(ranks, ps, strict=True)):
            bias = _tensor(48) if index in biased else None
            seed = _tensor(1, offset=index, kind=torch.int64) if p else None
            a, b = _tensor(r, 64), _tensor(48, r)
            projections += [_tensor(48, 64), a, b, bias, seed, scale, p]
            dbias = None if bias is None else torch.zeros_like(bias)
            gradients += [torch.zeros_like(a), torch.zeros_like(b), dbias, None]
        ss, ys = [_tensor(m, r) for r in ranks], [_tensor(m, 48) for _ in ranks]
        yield projections_launch._forward, (x, *ys, *ss, *projections)
        if len(ranks) <= projections_launch.MOST:  # more are added up, which is not remembered
            dx = torch.zeros_like(x)
            yield projections_launch._backward, (x, dx, *ys, *ss, *gradients, *projections)


def _adapter() -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
    from peft_kernels.adapter import launch

    for m, r, own, activation in (
        (40, 8, True, "relu"), (40, 8, False, "relu"), (40, 8, None, "relu"),
        (33, 16, True, "gelu"),
    ):  # fmt: skip
        x, down, up = _tensor(m, 64), _tensor(r, 64), _tensor(64, r)
        bias, up_bias, y, pre = _tensor(r), _tensor(64), _tensor(m, 64), _tensor(m, r)
        residual = x if own else None if own is None else _tensor(m, 64)
        parameters = (down, up, bias, up_bias)
        tail = (1.5, activation, None, 0.0)
        yield launch.adapter_forward, (x, *parameters, residual, *tail, y, pre)
        gradients = [torch.zeros_like(t) for t in (x, *parameters)]
        yield launch.adapter_backward, (y, x, pre, *parameters, *tail, bool(own), *gradients, None)


def _prefix() -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
    from peft_kernels.prefix import launch

    for batch, queries, masked, gated, frozen in (
        (2, 40, False, False, False), (2, 40, True, False, False), (2, 40, False, True, False),
        (3, 1, False, False, True),
    ):  # fmt: skip
        q, out = _tensor(batch, 4, queries, 32), _tensor(batch, 4, queries, 32)
        k, v = _tensor(batch, 2, 50, 32), _tensor(batch, 2, 50, 32)
        one, two = _tensor(1, 2, 10, 32), _tensor(1, 2, 10, 32)
        lse = _tensor(batch, 4, queries, kind=torch.float32)
        mask = torch.ones(batch, 50, dtype=torch.bool) if masked else None
        gate = _tensor(4, kind=torch.float32) if gated else None
        prefix_lse = torch.zeros_like(lse) if gated else None
        options = (True, 0.2, None, 0.0)
        operands = (q, k, v, one, two, mask, None, gate, None)
        yield launch.prefix_forward, (*operands, *options, out, lse, prefix_lse)
        wanted = [None if frozen else torch.zeros_like(t) for t in (q, k, v)]
        wanted += [torch.zeros_like(one), torch.zeros_like(two)]
        wanted += [torch.zeros_like(gate) if gate is not None else None]
        dout = _tensor(batch, 4, queries, 32)
        yield launch.prefix_backward, (
            dout, None, *operands, out, lse, prefix_lse, *options, *wanted,
        )  # fmt: skip


def _prompt() -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
    from peft_kernels.prompt import launch

    for batch, tokens, masked in ((3, 9, False), (3, 9, True), (1, 5, False)):
        ids, table, prompt = (
            _tensor(batch, tokens, kind=torch.int64),
            _tensor(10, 32),
            _tensor(4, 32),
        )
        mask = torch.ones(batch, tokens, dtype=torch.bool) if masked else None
        out = _tensor(batch, tokens + 4, 32)
        mask_out = torch.ones(batch, tokens + 4, dtype=torch.bool) if masked else None
        positions = _tensor(batch, tokens + 4, kind=torch.int64)
        yield launch.prompt_forward, (
            ids, table, prompt, mask, None, 0, out, mask_out, None, positions, None,
        )  # fmt: skip
        yield launch.prompt_backward, (out, None, None, 0, -1, torch.zeros_like(prompt), None)


CALLS = {
    "lora": _lora,
    "ticket_tma": _lora,
    "projections": _projections,
    "adapter": _adapter,
    "prefix": _prefix,
    "prefix_tma": _prefix,
    "prompt": _prompt,
}


replays: list[int] = []


def prepare() -> None:
    """Let launches be recorded and remembered, and count what is replayed."""
    driver.set_active(_Driver())
    launches.serves = lambda device: True
    # One buffer, as on a stream: freed ones may lie at one address here and at several there.
    buffer = torch.zeros(1 << 16, dtype=torch.int32)
    triton_runtime.counters = lambda device, size: buffer
    replay = launches._Tape.replay

    def counted(self: Any, *args: Any) -> None:
        replays.append(len(self.launches))
        replay(self, *args)

    launches._Tape.replay = counted  # type: ignore[method-assign]


def compare(method: str) -> None:
    """Compare every call of a method, made anew three times in an order drawn each time."""
    generator = random.Random(0)
    replays.clear()
    compared = 0
    for _ in range(3):
        # Made anew: other addresses, and perhaps those that other tensors had before.
        calls = list(CALLS[method]())
        generator.shuffle(calls)
        for launcher, arguments in calls:
            tensors = [value for value in arguments if isinstance(value, Tensor)]
            launcher.__wrapped__(*arguments)  # type: ignore[attr-defined]
            expected = _labelled(tensors)
            launcher(*arguments)
            found = _labelled(tensors)
            assert expected and found == expected, (launcher.__name__, expected, found)
            compared += 1
    total = len(list(itertools.chain(CALLS[method]())))
    assert compared == 3 * total
    print(f"{method}: {compared} calls compared, {len(replays)} of them replayed")
    assert len(replays) >= 2 * total, "what was launched once was not remembered"


if __name__ == "__main__":
    prepare()
    for asked in sys.argv[1:]:
        with (
            lora_tiles.forced_variant("ticket_tma" if asked == "ticket_tma" else None),
            prefix_tiles.forced_variant("tma" if asked == "prefix_tma" else None),
        ):
            compare(asked)
