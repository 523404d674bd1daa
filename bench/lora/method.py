"""LoRA, for every benchmark: what is right, what it must do at least, what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from bench.lora import baselines
from bench.lora.baselines import EAGER, FACTORED, FROZEN, FUSED, eager_lora, frozen_linear
from bench.lora.cases import ALL_CASES, LoRACase, quick
from bench.lora.problem import Problem, make_problem
from bench.method import (
    BOTH,
    CPU,
    DIRECTIONS,
    FORWARD,
    GPU,
    HOST,
    MAIN,
    MEMORY,
    OURS,
    VARIANTS,
    Expected,
    Method,
    Target,
    results,
    saved_mib,
    x_eager,
    x_frozen,
)
from bench.roofline import Work
from bench.third_party import axolotl, lorafusion, nemo_automodel, peft, usable


def expected(problem: Problem, keep: Tensor | None, frozen: bool) -> Expected:
    """Return the layer's results in float64 and in its dtype; of a frozen one, the base's."""

    def formula(double: bool) -> dict[str, Tensor]:
        def cast(value: Tensor) -> Tensor:
            return value.detach().double() if double else value.detach()

        each = problem
        leaves = {name: cast(t).requires_grad_() for name, t in each.leaves(frozen).items()}
        weight, bias = cast(each.weight), None if each.bias is None else cast(each.bias)
        if frozen:
            y = frozen_linear(leaves["x"], weight, bias)
        else:
            a, b, p = leaves["a"], leaves["b"], each.case.dropout_p
            y = eager_lora(leaves["x"], weight, bias, a, b, each.scale, p, keep)
        return results(y, cast(each.dy), leaves)

    return Expected(formula(double=True), (formula(double=False),))


def forward_work(case: LoRACase) -> Work:
    """Return what the forward must do: y and s from x, W, A, B and the bias."""
    m, k, n, r = case.tokens, case.in_features, case.out_features, case.rank
    flops = 2 * m * k * n + 2 * m * k * r + 2 * m * r * n
    elements = m * k + n * k + r * k + n * r + m * n + m * r + (n if case.bias else 0)
    return Work(flops, elements * case.torch_dtype.itemsize)


def backward_work(case: LoRACase) -> Work:
    """Return what the backward must do: ds, dx, dA and dB; the base layer is frozen.

    x and dY are read once: nothing forbids computing all gradients in one pass over them. With a
    rank of 0, the frozen layer, x is not read.
    """
    m, k, n, r = case.tokens, case.in_features, case.out_features, case.rank
    flops = 2 * m * k * n + 4 * m * n * r + 4 * m * k * r
    elements = m * n + n * k + m * r + r * k + n * r + (m * k if r else 0)  # read
    elements += m * k + r * k + n * r  # written
    return Work(flops, elements * case.torch_dtype.itemsize)


def work(case: LoRACase, direction: str, provider: str = OURS) -> Work:
    """Return the work of "forward" or of "forward+backward"; a frozen layer has no rank."""
    done = replace(case, rank=0) if provider == FROZEN.name else case
    if direction == FORWARD:
        return forward_work(done)
    return forward_work(done) + backward_work(done)


def _targets() -> tuple[Target, ...]:
    limits: tuple[tuple[str, float, Callable[[LoRACase], bool]], ...] = (
        ("fp32 without dropout", 1.05, lambda case: case.dtype == "float32" and not case.dropout_p),
        (
            "bf16 without dropout",
            1.10,
            lambda case: case.dtype == "bfloat16" and not case.dropout_p,
        ),
        ("dropout 0.1", 1.20, lambda case: case.dropout_p > 0),
    )
    asked = [
        Target(f"cpu {kind}, {direction}: x frozen", limit, x_frozen, CPU, direction, chosen)
        for kind, limit, chosen in limits
        for direction in DIRECTIONS
    ]
    asked += [Target(f"cpu, {each}: x eager", 1.0, x_eager, CPU, each) for each in DIRECTIONS]
    asked += [
        Target(f"host time at [1, 64], {each}: x eager", 1.2, x_eager, HOST, each)
        for each in DIRECTIONS
    ]
    asked.append(Target("saved for backward beyond x: MiB", 0.5, saved_mib, MEMORY, FORWARD))
    asked += [
        Target(f"gpu, {direction}: x frozen", limit, x_frozen, GPU, direction)
        for direction, limit in ((FORWARD, 1.05), (BOTH, 1.10))
    ]
    asked += [
        Target(
            f"gpu, {each}: x factored, geometric mean", 1.0, x_frozen, GPU, each,
            mean_over=FACTORED.name,
        )
        for each in DIRECTIONS
    ]  # fmt: skip
    return tuple(asked)


THIRD_PARTIES = usable(peft.LORA, axolotl.LORA, nemo_automodel.LORA, lorafusion.LORA)
# Triton whatever else there is: in the dry run, too, it is these kernels that are walked.
TRITON = replace(baselines.fused("triton"), name=OURS)
METHOD = Method(
    name=LoRACase.op,
    case_type=LoRACase,
    cases=ALL_CASES,
    quick=quick,
    make_problem=make_problem,
    expected=expected,
    providers=(*baselines.BASELINES, *THIRD_PARTIES, FUSED),
    work=work,
    targets=_targets(),
    seconds={CPU: 22.0, HOST: 4.0, GPU: 4.0},
    gpu={
        MAIN: (FROZEN, EAGER, FACTORED, *THIRD_PARTIES, TRITON),
        VARIANTS: (FROZEN, EAGER, *baselines.VARIANTS),
    },
    columns={
        "eager": "eager",
        "factored": "factored",
        "compile": "torch.compile",
        "fused": "peft_kernels",
    },
    title="tokens x in x out, dtype, dropout",
)
