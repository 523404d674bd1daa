"""The demo from beginning to end: pre-train, adapt both ways, save, reload, score again, report."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from peft_kernels import BackendUnavailable
from peft_kernels.core.files import write_atomically
from peft_kernels.demo import adapter_file, data, figure, measure, methods, report, train
from peft_kernels.demo.methods import METHODS, Method, Options
from peft_kernels.demo.model import DigitTransformer, freeze
from peft_kernels.demo.options import Settings


class DemoFailed(RuntimeError):
    """The demo ran and did not show what it is there to show."""


def tell(settings: Settings) -> None:
    """Run the demo.

    Args:
        settings: what to run.

    Raises:
        DemoFailed: a method learned nothing, or a saved adapter scores unlike the trained one.
        BackendUnavailable: a backend was demanded that cannot serve the fused layers.
        OSError: the output folder cannot be written.
    """
    started = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    model = DigitTransformer().to(settings.device)
    # Before any training: a demand that cannot be met should be heard at once.
    served = [entry for method in METHODS for entry in _served(model, method, settings)]
    known, new = data.load(settings.seed, settings.device)
    runs = [(method, options) for method in METHODS for options in _variants(settings, method)]

    rows: list[report.Row] = []
    adapters: list[dict[str, Any]] = []
    total = settings.pretrain_steps + len(runs) * settings.steps
    hidden = settings.quiet or not sys.stderr.isatty()
    with tqdm(total=total, unit="step", disable=hidden, leave=False) as bar:
        bar.set_description("pre-training on digits 0-4")
        train.pretrain(model, known, settings.pretrain_steps, settings.seed, bar.update)
        freeze(model, settings.dtype)
        known_accuracy = train.accuracy(model, known)
        for method, options in runs:
            name = method.name + (f", dropout {options.dropout:g}" if options.dropout else "")
            bar.set_description(f"{name} on digits 5-9")
            row, fused = _compare(name, model, method, options, new, settings, bar.update)
            rows.append(row)
            if not options.dropout:
                path = settings.out / f"{method.name.lower()}.safetensors"
                adapter_file.save(path, fused, method, options)
                adapters.append(_rescore(path, model, method, new, row.accuracy_fused))

    summary = {
        "settings": {**settings.as_json(), "batch_size": train.BATCH_SIZE},
        "machine": report.machine(settings.device),
        "pretrained_accuracy": known_accuracy,
        "served": served,
        "rows": [dataclasses.asdict(row) for row in rows],
        "adapters": adapters,
        "seconds": time.perf_counter() - started,
    }
    backends = " + ".join(sorted({entry["backend"] for entry in served}))
    picture = figure.png(rows, str(settings.device), backends)
    write_atomically(settings.out / "demo.png", picture)
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    write_atomically(settings.out / "demo.json", text.encode())

    print(
        f"pre-trained on digits 0-4 (accuracy {known_accuracy:.1%}), frozen, adapted to 5-9\n"
        f"on {settings.device} in {settings.as_json()['dtype']}, {settings.steps} steps of "
        f"{train.BATCH_SIZE} images, rank {settings.rank}; accuracies are on held-out images\n"
    )
    print(report.table(rows) + "\n")
    for adapter in adapters:
        print(f"{adapter['file']} reloaded into a new model: {adapter['accuracy_reloaded']:.1%}")
    _say(served)
    files = ["demo.png", "demo.json", *(adapter["file"] for adapter in adapters)]
    print(f"wrote {', '.join(files)} to {settings.out}/ in {summary['seconds']:.0f} s")
    _check_learned(rows)


def _variants(settings: Settings, method: Method) -> list[Options]:
    """Return what to adapt with: no dropout first, where eager's losses can be compared."""
    dropped = settings.dropout and method.has_dropout
    probabilities = (0.0, settings.dropout) if dropped else (0.0,)
    return [Options(settings.rank, settings.alpha, each) for each in probabilities]


def _served(model: DigitTransformer, method: Method, settings: Settings) -> list[dict[str, Any]]:
    """Return which backend serves how many of the fused layers, and why no other one does."""
    probe = copy.deepcopy(model)
    freeze(probe, settings.dtype)
    methods.apply(probe, method.apply_fused, _variants(settings, method)[-1])
    counts: Counter[str] = Counter()
    found: dict[str, Any] = {}
    for explanation in method.explain(probe, train.BATCH_SIZE):
        if explanation.backend is None:
            raise BackendUnavailable(str(explanation))
        counts[str(explanation)] += 1
        found[str(explanation)] = explanation
    return [
        {"method": method.name, "layers": counts[text], **dataclasses.asdict(explanation)}
        for text, explanation in found.items()
    ]


def _say(served: list[dict[str, Any]]) -> None:
    for entry in served:
        plan = f" ({entry['plan']})" if entry["plan"] else ""
        layers = f"{entry['layers']} layer" + ("s" if entry["layers"] > 1 else "")
        print(f"{entry['method']}: {entry['op']} of {layers} ran on {entry['backend']}{plan}")
        if entry["backend"] == "reference":
            reasons = "; ".join(f"{name}: {why}" for name, why in entry["reasons"].items())
            print(
                f"WARNING: no fused kernel served {layers}; what is called fused above is plain "
                f"PyTorch there, and its time says nothing about the kernels ({reasons})",
                file=sys.stderr,
            )


def _compare(
    name: str,
    frozen: DigitTransformer,
    method: Method,
    options: Options,
    digits: data.Digits,
    settings: Settings,
    tick: train.Tick,
) -> tuple[report.Row, DigitTransformer]:
    """Adapt eager and fused; return the figures and the fused model."""
    torch.manual_seed(settings.seed)
    eager, fused = methods.build_pair(frozen, method, options)
    before = train.accuracy(fused, digits)
    by_eager, by_fused = train.adapt(eager, fused, digits, settings.steps, settings.seed, tick)
    if not all(map(math.isfinite, by_eager.losses + by_fused.losses)):
        raise DemoFailed(f"{name}: the loss is no longer finite")
    pairs = zip(by_eager.losses, by_fused.losses, strict=True)
    row = report.Row(
        name=name,
        dropout=options.dropout,
        trainable_share=methods.trainable_share(fused),
        accuracy_before=before,
        accuracy_eager=train.accuracy(eager, digits),
        accuracy_fused=train.accuracy(fused, digits),
        ms_per_step_eager=measure.median_ms(by_eager.times_ms),
        ms_per_step_fused=measure.median_ms(by_fused.times_ms),
        saved_bytes_eager=by_eager.saved_bytes,
        saved_bytes_fused=by_fused.saved_bytes,
        largest_loss_difference=None if options.dropout else max(abs(a - b) for a, b in pairs),
        losses_eager=by_eager.losses,
        losses_fused=by_fused.losses,
    )
    return row, fused


def _rescore(
    path: Path, frozen: DigitTransformer, method: Method, digits: data.Digits, accuracy: float
) -> dict[str, Any]:
    """Load an adapter's file into a new model and hold its score against the trained model's."""
    try:
        again = train.accuracy(adapter_file.load(path, frozen, method), digits)
    except ValueError as error:
        raise DemoFailed(str(error)) from error
    if again != accuracy:
        raise DemoFailed(f"{path} reloaded scores {again:.2%}, trained it scored {accuracy:.2%}")
    return {
        "method": method.name,
        "file": path.name,
        "bytes": path.stat().st_size,
        "accuracy_trained": accuracy,
        "accuracy_reloaded": again,
    }


def _check_learned(rows: list[report.Row]) -> None:
    for row in rows:
        if min(row.accuracy_eager, row.accuracy_fused) <= row.accuracy_before:
            raise DemoFailed(
                f"{row.name}: accuracy after adapting (eager {row.accuracy_eager:.1%}, fused "
                f"{row.accuracy_fused:.1%}) is not above {row.accuracy_before:.1%} before; "
                "give it more --steps"
            )
