"""One small forward and backward of each kernel: what compute-sanitizer watches.

``python -m bench.sanitizer_run [--precision NAME]... KERNELS...`` runs the kernels of these names
(``KERNELS``) in every precision, and prints a line for each that ended, with the Triton kernels
that it launched. The planted ones are wrong on purpose: a tool that finds nothing there is blind.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels import (
    adapter,
    adapter_grouped,
    dora_linear,
    lora_linear,
    lora_projections,
    prefix_attention,
    prompt_embedding,
)
from peft_kernels.core import launches, lora_tiles, prefix_tiles

PRECISIONS = ("bfloat16", "float32", "tf32")  # "tf32": float32 with its products in tf32
PLANTED = {"planted:global": "memcheck", "planted:race": "racecheck"}
# In the mangled names of this package's kernels, Triton's and the library's, and of the planted.
KERNEL_NAMES = "^_[a-z_]+_kernel|^_ZN2pk"


class Inputs:
    """Random tensors of one dtype, on the GPU or, with everything smaller, on the CPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Start the generator."""
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)
        self.small = device.type == "cpu"

    def size(self, on_gpu: int, on_cpu: int) -> int:
        """Return a size: of several blocks, the last one ragged."""
        return on_cpu if self.small else on_gpu

    def leaf(self, *shape: int) -> Tensor:
        """Return a trained tensor."""
        value = torch.randn(*shape, device=self.device, generator=self.generator) / 4
        return value.to(self.dtype).requires_grad_()

    def index(self, low: int, high: int, *shape: int) -> Tensor:
        """Return whole numbers."""
        return torch.randint(low, high, shape, device=self.device, generator=self.generator)


def _train(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Run backward, and look at every number: what nobody wrote is rarely finite."""
    dys = [torch.ones_like(each) for each in outputs]
    for value in (*outputs, *torch.autograd.grad(outputs, leaves, dys)):
        if not torch.isfinite(value).all():
            raise RuntimeError("a result is not finite")


def _lora(given: Inputs, backend: str) -> None:
    # Ragged; of a form that tensor descriptors can name; a few tokens, as in decoding.
    m, k, n = given.size(300, 33), given.size(520, 40), given.size(776, 56)
    k_even, n_even = given.size(512, 64), given.size(768, 64)
    even = m, k_even, n_even, 16
    for *sizes, p in ((m, k, n, 5, 0.1), (*even, 0.0), (*even, 0.1), (3, k, n, 8, 0.0)):
        tokens, inner, outer, rank = sizes
        x, w = given.leaf(tokens, inner), given.leaf(outer, inner).detach()
        a, b, bias = given.leaf(rank, inner), given.leaf(outer, rank), given.leaf(outer)
        y = lora_linear(x, w, a, b, bias, scale=2.0, dropout_p=p, backend=backend)
        _train([y], [x, a, b, bias])


def _projections(given: Inputs, backend: str) -> None:
    m, k = given.size(300, 33), given.size(512, 64)
    widths = given.size(512, 64), given.size(256, 32), given.size(256, 32)
    x = given.leaf(m, k)
    ws = [given.leaf(n, k).detach() for n in widths]
    for rank, p in ((8, 0.0), (8, 0.1), (20, 0.1)):  # the last is more than a group may have
        a, b = [given.leaf(rank, k) for _ in widths], [given.leaf(n, rank) for n in widths]
        ys = lora_projections(x, ws, a, b, scales=2.0, dropout_p=p, backend=backend)
        _train(ys, [x, *a, *b])


def _dora(given: Inputs, backend: str) -> None:
    m, k, n, r = given.size(300, 33), given.size(520, 40), given.size(776, 56), 8
    x, w = given.leaf(m, k), given.leaf(n, k).detach()
    a, b = given.leaf(r, k), given.leaf(n, r)
    magnitude = w.float().norm(dim=1).to(given.dtype).requires_grad_()
    for p in (0.0, 0.1):
        y = dora_linear(x, w, a, b, magnitude, scale=2.0, dropout_p=p, backend=backend)
        _train([y], [x, a, b, magnitude])


def _adapter(given: Inputs, backend: str) -> None:
    m, d = given.size(300, 33), given.size(528, 48)
    # Whole blocks, ragged, and more than the fused launch takes.
    for r, p in ((16, 0.0), (16, 0.1), (21, 0.1), (300, 0.1)):
        x, down, up = given.leaf(m, d), given.leaf(r, d), given.leaf(d, r)
        biases = given.leaf(r), given.leaf(d)
        y = adapter(x, down, up, *biases, activation="gelu", dropout_p=p, backend=backend)
        _train([y], [x, down, up, *biases])


def _adapter_grouped(given: Inputs, backend: str) -> None:
    m, d, r, count = given.size(300, 33), given.size(528, 48), 16, 3
    x, down, up = given.leaf(m, d), given.leaf(count, r, d), given.leaf(count, d, r)
    index = given.index(-1, count, m)
    for p in (0.0, 0.1):
        y = adapter_grouped(x, down, up, index, activation="silu", dropout_p=p, backend=backend)
        _train([y], [x, down, up])


def _prefix(given: Inputs, backend: str) -> None:
    s, p, d = given.size(200, 21), given.size(40, 7), given.size(64, 16)
    for queries, gated, dropout_p in (
        (s, False, 0.0),
        (s, True, 0.0),
        (s, False, 0.1),
        (1, False, 0.0),
    ):
        q = given.leaf(2, 4, queries, d)
        k, v = given.leaf(2, 2, s, d), given.leaf(2, 2, s, d)
        prefix = given.leaf(2, p, d), given.leaf(2, p, d)
        gate = given.leaf(4) if gated else None
        out = prefix_attention(
            q, k, v, *prefix, causal=True, gate=gate, dropout_p=dropout_p, backend=backend
        )
        _train([out], [q, k, v, *prefix, *([gate] if gate is not None else [])])


def _prompt(given: Inputs, backend: str) -> None:
    s, p, d = given.size(200, 9), given.size(20, 4), given.size(520, 24)
    ids, table, prompt = given.index(0, 50, 3, s), given.leaf(50, d), given.leaf(p, d)
    mask = given.index(0, 2, 3, s)
    for position in ("start", "after_padding"):
        found = prompt_embedding(
            ids, table, prompt, attention_mask=mask, labels=ids, position=position, backend=backend
        )
        _train([found.embeddings], [table, prompt])


def _drop(given: Inputs, backend: str) -> None:
    from peft_kernels.lora import drop_kernels

    x = given.leaf(given.size(300, 33), given.size(520, 40)).detach()
    dropped = torch.full_like(x, torch.nan)
    drop_kernels.drop(x, given.index(0, 2**62, 1), 0.1, dropped)
    if not torch.isfinite(dropped).all():
        raise RuntimeError("a result is not finite")


def _forced(
    forced: Callable[[str], contextlib.AbstractContextManager[Any]], variant: str, run: Any
) -> Callable[[Inputs, str], None]:
    def within(given: Inputs, backend: str) -> None:
        with forced(variant):
            run(given, backend)

    return within


_METHODS = {
    "lora": _lora, "projections": _projections, "dora": _dora, "adapter": _adapter,
    "adapter-grouped": _adapter_grouped, "prefix": _prefix, "prompt": _prompt,
}  # fmt: skip
KERNELS: dict[str, Callable[[Inputs, str], None]] = {
    **{
        f"triton:lora-{each}": _forced(lora_tiles.forced_variant, each, _lora)
        for each in lora_tiles.VARIANTS
    },
    **{f"triton:{name}": run for name, run in _METHODS.items() if name not in ("lora", "prefix")},
    **{
        f"triton:prefix-{each}": _forced(prefix_tiles.forced_variant, each, _prefix)
        for each in prefix_tiles.VARIANTS
    },
    "triton:drop": _drop,
    **{f"cuda:{name}": run for name, run in _METHODS.items()},
}


def _planted(name: str) -> Callable[[Inputs, str], None]:
    def run(given: Inputs, backend: str) -> None:
        from bench import planted

        wrong = {"planted:global": planted.write_behind_the_end, "planted:race": planted.race}
        wrong[name](given.device)

    return run


_WRONG = {name: _planted(name) for name in PLANTED}


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Collect the names of the Triton kernels that the package launches meanwhile."""
    from peft_kernels.adapter import launch as adapter_launch
    from peft_kernels.core import token_reduction
    from peft_kernels.lora import drop_kernels, projections_launch
    from peft_kernels.lora import launch as lora_launch
    from peft_kernels.prefix import launch as prefix_launch
    from peft_kernels.prompt import launch as prompt_launch

    # Each of them has imported the function by name.
    places: tuple[Any, ...] = (
        token_reduction, drop_kernels, adapter_launch, lora_launch, projections_launch,
        prefix_launch, prompt_launch,
    )  # fmt: skip
    names: list[str] = []
    launch = launches.launch

    def launch_and_note(kernel: Any, *given: Any, **named: Any) -> None:
        launch(kernel, *given, **named)
        names.append(kernel.fn.__name__)

    for module in places:
        module.launch = launch_and_note
    try:
        yield names
    finally:
        for module in places:
            module.launch = launch


def run(name: str, precision: str, device: torch.device) -> list[str]:
    """Run one kernel and return the names of the Triton kernels that were launched."""
    tf32 = precision == "tf32"
    dtype = torch.float32 if tf32 else getattr(torch, precision)
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    with watched() as names:
        {**KERNELS, **_WRONG}[name](Inputs(device, dtype), name.split(":")[0])
        if device.type == "cuda":
            torch.cuda.synchronize()
    return list(dict.fromkeys(names))


def main(arguments: Sequence[str]) -> int:
    """Run what was asked for; the first exception ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("names", nargs="+", choices=[*KERNELS, *_WRONG], metavar="KERNELS")
    asked = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in asked.names:
        for precision in asked.precision or PRECISIONS:
            launched = run(name, precision, device)
            print(f"ran {name} {precision}: {' '.join(launched)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
