"""``python -m bench.prompt``: prompt tuning against eager forms, on this machine's CPU or GPU.

A case is one call with mask and labels, and its backward to the prompt. Providers: ``peft``, the
operations of its ``PeftModelForCausalLM``; ``eager``, the fewest that PyTorch needs, without
position ids; ``compile``, eager under ``torch.compile``; ``fused``. A provider whose results are
wrong prints no time. The process pins itself as ``make bench`` does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.measure import Timing, device_times, synchronizer, wall_times
from bench.run import PINNED
from peft_kernels import prompt_embedding

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)


@dataclass(frozen=True)
class PromptCase:
    """ids [batch, tokens] into a table [vocabulary, width], prompt [length, width] before them."""

    name: str
    batch: int
    tokens: int
    length: int
    width: int
    vocabulary: int = 32000
    dtype: torch.dtype = torch.bfloat16


CASES = tuple(
    PromptCase(f"B{b} S{s} P{p} D{d} {short}", b, s, p, d, 32000, dtype)
    for b, s, p, d in ((8, 512, 20, 1024), (4, 1024, 100, 4096), (1, 64, 20, 2048))
    for short, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
)
TINY = PromptCase("tiny", 2, 5, 3, 8, 11, torch.float32)


@dataclass(frozen=True)
class PromptProblem:
    """What every provider is given; the prompt is float32 and trained, as peft keeps it."""

    ids: Tensor
    table: Tensor
    prompt: Tensor
    mask: Tensor
    labels: Tensor
    dy: Tensor


def make_problem(case: PromptCase, device: torch.device) -> PromptProblem:
    """Return the tensors of a case, the same ones every time."""
    generator = torch.Generator(device=device).manual_seed(0)
    size = (case.batch, case.tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    def ids() -> Tensor:
        return torch.randint(case.vocabulary, size, device=device, generator=generator)

    return PromptProblem(
        ids(),
        normal(case.vocabulary, case.width).to(case.dtype),
        normal(case.length, case.width).requires_grad_(),
        torch.ones(size, dtype=torch.int64, device=device),
        ids(),
        normal(case.batch, case.tokens + case.length, case.width).to(case.dtype),
    )


Outputs = tuple[Tensor, ...]
Provider = Callable[[PromptProblem], Outputs]


def peft_form(given: PromptProblem) -> Outputs:
    """Return embeddings, mask and labels by the operations of peft 0.21."""
    batch, length = given.ids.shape[0], given.prompt.shape[0]
    device = given.ids.device
    ones = torch.ones(batch, length).to(device)
    mask = torch.cat((ones, given.mask), dim=1)
    tokens = F.embedding(given.ids, given.table)
    ignored = torch.full((batch, length), -100).to(device)
    labels = torch.cat((ignored, given.labels), dim=1)
    prompt_ids = torch.arange(length).unsqueeze(0).expand(batch, -1).to(device)
    prompts = F.embedding(prompt_ids, given.prompt).to(tokens.dtype)
    return torch.cat((prompts, tokens), dim=1), mask, labels


def eager_form(given: PromptProblem) -> Outputs:
    """Return embeddings, mask and labels by as few operations as PyTorch allows."""
    batch, length = given.ids.shape[0], given.prompt.shape[0]
    prompts = given.prompt.to(given.table.dtype).expand(batch, -1, -1)
    embeddings = torch.cat((prompts, F.embedding(given.ids, given.table)), dim=1)
    return (
        embeddings,
        F.pad(given.mask, (length, 0), value=1),
        F.pad(given.labels, (length, 0), value=-100),
    )


def fused_form(given: PromptProblem) -> Outputs:
    """Return embeddings, mask, labels and position ids of the package."""
    out = prompt_embedding(
        given.ids, given.table, given.prompt, attention_mask=given.mask, labels=given.labels
    )
    assert out.attention_mask is not None and out.labels is not None
    return out.embeddings, out.attention_mask, out.labels, out.position_ids


PROVIDERS: dict[str, Provider] = {"peft": peft_form, "eager": eager_form, "fused": fused_form}


def call_of(provider: Provider, given: PromptProblem, direction: str) -> Callable[[], Any]:
    """Return what is timed."""
    if direction == FORWARD:
        return lambda: provider(given)
    return lambda: torch.autograd.grad(provider(given)[0], [given.prompt], given.dy)


def failure(provider: Provider, given: PromptProblem) -> str | None:
    """Return what is wrong with a provider's results, or None.

    Outputs must be eager's to the bit; the gradient may have 1.5 times eager's error against
    float64, and one rounding unit of the table's dtype.
    """
    names, expected = ("embeddings", "mask", "labels"), eager_form(given)
    for name, one, other in zip(names, provider(given)[:3], expected, strict=True):
        if not torch.equal(one, other.to(one.dtype)):
            return f"{name} differ from eager's"
    length = given.prompt.shape[0]
    exact = given.dy[:, :length].double().sum(0)

    def error(each: Provider) -> Tensor:
        return (call_of(each, given, BOTH)()[0].double() - exact).norm() / exact.norm()

    found, bound = error(provider), 1.5 * error(eager_form) + torch.finfo(given.dy.dtype).eps / 2
    return None if found <= bound else f"gradient error {found:.2e} (bound {bound:.2e})"


def measure(
    case: PromptCase, device: torch.device, seconds: float, providers: dict[str, Provider]
) -> dict[tuple[str, str], Timing | str]:
    """Return the time of every provider that passes, or what is wrong, by direction and name."""
    given = make_problem(case, device)
    wrong = {name: failure(each, given) for name, each in providers.items()}
    found: dict[tuple[str, str], Timing | str] = {}
    for direction in DIRECTIONS:
        calls = {
            name: call_of(each, given, direction)
            for name, each in providers.items()
            if wrong[name] is None
        }
        if device.type == "cuda":
            times = device_times(calls, seconds / 2)
        else:
            times = wall_times(calls, seconds / 2, synchronize=synchronizer(device))
        for name in providers:
            found[direction, name] = wrong[name] or times[name]
    return found


def rows(found: dict[tuple[str, str], Timing | str]) -> list[str]:
    """Return a case's lines: least, 20th percentile, median; eager's least over the least."""
    lines = []
    for (direction, name), time in found.items():
        start, eager = f"  {direction:17} {name:8}", found[direction, "eager"]
        if isinstance(time, str) or isinstance(eager, str):
            lines.append(f"{start} FAILED {time}")
            continue
        times = f"{time.min_ms:9.4f} {time.p20_ms:9.4f} {time.p50_ms:9.4f}"
        lines.append(f"{start} {times} {eager.min_ms / time.min_ms:6.2f}x")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser("python -m bench.prompt", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="per case (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"ms a call on {device}: least, p20, p50; x: eager's least over the row's")
    for case in CASES:
        providers = dict(PROVIDERS)
        if not options.no_compile:
            torch._dynamo.reset()
            providers["compile"] = torch.compile(eager_form, dynamic=False)
        print(case.name, flush=True)
        print("\n".join(rows(measure(case, device, options.seconds, providers))), flush=True)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in PINNED.items()):
        command = [sys.executable, "-m", "bench.prompt", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **PINNED})
    main()
