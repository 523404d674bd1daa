"""Tokens a second and peak memory of a whole training step: ``python -m bench.training OUT.json``.

A Llama-shaped model with random weights and peft's LoRA in every projection takes steps of forward,
backward and AdamW: as peft runs it, under ``torch.compile``, and after ``accelerate``. Each runs in
turn from the same adapters on the same tokens; one whose losses are not those of peft's gets no
speed. SECONDS, the second argument, is when it must have ended; what is left out is said. Further
arguments are items, "accelerated@NAME OF THE CASE": these alone are measured, beside what OUT.json
already holds, which at every moment says what is "running".
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import store
from bench.stages import watchdog

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EAGER, COMPILED, OURS = "peft", "peft compiled", "accelerated"
BOTH = "both"  # accelerated, then compiled
APART = "no groups"  # accelerated, but every projection by itself
CHECKED_STEPS = 4
# Of the losses of the first steps, which differ by the roundings of bfloat16 alone.
LOSS_RTOL = 5e-3
ITEM_S = 150.0  # one that takes longer ends its process


@dataclass(frozen=True)
class Training:
    """A model and what it is trained on.

    Attributes:
        name: in tables.
        batch: sequences of a step.
        tokens: of a sequence.
        hidden: width.
        inner: width of the feed-forward layers.
        layers: transformer blocks.
        heads: of queries.
        kv_heads: of keys and values.
        vocabulary: token ids.
        rank: of LoRA, in every projection.
        dropout_p: of LoRA.
        checkpointing: whether activations are computed again in backward.
        steps: timed, after as many that are not.
    """

    name: str
    batch: int
    tokens: int
    hidden: int = 4096
    inner: int = 14336
    layers: int = 8
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32000
    rank: int = 16
    dropout_p: float = 0.0
    checkpointing: bool = False
    steps: int = 8


LLAMA = Training("llama3-8b shape, 8 layers, B4 S2048 r16", 4, 2048)
CASES = (
    LLAMA,
    replace(LLAMA, name=f"{LLAMA.name} p0.05", dropout_p=0.05),
    replace(LLAMA, name="llama3-8b shape, 8 layers, B1 S512 r16", batch=1, tokens=512),
    replace(LLAMA, name=f"{LLAMA.name} p0.05 checkpointed", dropout_p=0.05, checkpointing=True),
)
DRY = Training(
    "dry llama", 2, 16, hidden=32, inner=48, layers=1, heads=4, kv_heads=2, vocabulary=64, rank=4,
    steps=2,
)  # fmt: skip


@dataclass
class Result:
    """What was measured of one provider: None where a number was not."""

    case: str
    provider: str
    note: str
    tokens_per_s: float | None = None
    step_ms: float | None = None
    peak_gib: float | None = None
    losses: list[float] | None = None


def build(case: Training, device: torch.device) -> nn.Module:
    """Return the model as peft builds it, the same one each time."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.hidden, intermediate_size=case.inner,
        num_hidden_layers=case.layers, num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads, max_position_embeddings=case.tokens, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    lora = LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout_p,
        target_modules=list(PROJECTIONS),
    )  # fmt: skip
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if case.checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted.train()


def run(case: Training, provider: str, device: torch.device) -> Result:
    """Train ``2 * case.steps`` steps and return the speed of the last half."""
    from peft_kernels import accelerate

    model = build(case, device)
    if provider in (OURS, APART, BOTH):
        accelerate(model, strict=True, projections=provider != APART)
    forward: Callable[..., Any] = torch.compile(model) if compiles(provider) else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator(device=device).manual_seed(1)
    size = (case.batch, case.tokens)

    def step() -> Tensor:
        ids = torch.randint(case.vocabulary, size, device=device, generator=generator)
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    losses = [step() for _ in range(case.steps)]
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(case.steps):
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    taken = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return Result(
        case.name, provider, "", case.batch * case.tokens / taken, 1e3 * taken, peak,
        [each.item() for each in losses[:CHECKED_STEPS]],
    )  # fmt: skip


def compiles(provider: str) -> bool:
    """Return whether a provider goes through ``torch.compile``."""
    return provider in (COMPILED, BOTH)


def gated(result: Result, expected: Result | None) -> Result:
    """Return ``result`` without its speed where its losses are not the expected ones."""
    if expected is None or expected.losses is None or result.losses is None:
        return result
    pairs = zip(result.losses, expected.losses, strict=True)
    differences = [abs(ours - theirs) / abs(theirs) for ours, theirs in pairs]
    worst = max(differences)
    if not all(each <= LOSS_RTOL for each in differences):  # a NaN is no less either
        return replace(
            result, note=f"losses differ by {worst:.1e}", tokens_per_s=None, step_ms=None
        )
    return replace(result, note=f"losses within {worst:.0e}")


def table(results: list[Result]) -> str:
    """Return a line for each provider of each case, beside peft's own."""
    width = max([14, *(len(each.case) + 1 for each in results)])
    lines = [
        f"{'training step':<{width}}{'runs as':<15}{'ms':>9}{'tokens/s':>11}{'x peft':>8}{'GiB':>8}"
    ]
    for each in results:
        base = next((r for r in results if r.case == each.case and r.provider == EAGER), None)
        if each.step_ms is None:
            lines.append(f"{each.case:<{width}}{each.provider:<15}{each.note}")
            continue
        ratio = f"{base.step_ms / each.step_ms:.2f}" if base and base.step_ms else "-"
        peak = "-" if each.peak_gib is None else f"{each.peak_gib:.2f}"
        lines.append(
            f"{each.case:<{width}}{each.provider:<15}{each.step_ms:>9.1f}{each.tokens_per_s:>11.0f}"
            f"{ratio:>8}{peak:>8}"
        )
    return "\n".join(lines)


def items(on_gpu: bool) -> list[str]:
    """Return what there is to measure: all of the first case, then the others, compiling last."""
    cases = CASES if on_gpu else (DRY,)
    first = (EAGER, OURS, COMPILED, BOTH, APART) if on_gpu else (EAGER, OURS, APART)
    order = [(name, cases[0]) for name in first]
    order += [(name, case) for case in cases[1:] for name in (EAGER, OURS, APART)]
    order += [(name, case) for case in cases[1:] for name in (COMPILED, BOTH)]
    return [f"{name}@{case.name}" for name, case in order]


def main(out: str, seconds: float = 500.0, *asked: str) -> int:
    """Measure the items, all if none is named, and rewrite ``out`` after each; 1 if one failed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ends = time.monotonic() + seconds
    path = Path(out)
    results: list[Result] = []
    if asked and path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))["rows"]
        results = [Result(**row) for row in held]
    before = len(results)
    longest = dict.fromkeys((COMPILED, BOTH), 40.0 if device.type == "cuda" else 0.0)

    def write(running: str | None) -> None:
        rows = [asdict(each) for each in results]
        store.replace(path, {"machine": machine, "running": running, "rows": rows})

    machine = store.machine(device)
    for item in asked or items(device.type == "cuda"):
        provider, name = item.split("@", 1)
        case = next(each for each in (*CASES, DRY) if each.name == name)
        if time.monotonic() + longest.get(provider, 0.0) > ends:
            results.append(Result(name, provider, "not run, out of time"))
            continue
        write(item)
        start = time.monotonic()
        try:
            with watchdog(ITEM_S):
                found = run(case, provider, device)
        except Exception as error:
            found = Result(name, provider, f"{type(error).__name__}: {error}"[:300])
        expected = next((r for r in results if r.case == name and r.provider == EAGER), None)
        # With dropout the masks differ by design.
        results.append(gated(found, expected) if case.dropout_p == 0.0 else found)
        longest[provider] = max(longest.get(provider, 0.0), time.monotonic() - start)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write(None)
    write(None)
    print(table(results))
    return int(any(failed(each) for each in results[before:]))


def failed(result: Result) -> bool:
    """Return whether there is no speed for another reason than the time."""
    return result.step_ms is None and "out of time" not in result.note


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(float, sys.argv[2:3]), *sys.argv[3:]))
