"""Prompt tuning, for every benchmark: cases, providers, what is right, what is asked.

A case is one call with mask and labels, and its backward to the prompt. Providers: ``peft``, the
operations of its ``PeftModelForCausalLM``; ``eager``, the fewest that PyTorch needs, without
position ids; ``compile``, eager under ``torch.compile``; ``fused``, with position ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.method import (
    BOTH,
    COMPILED,
    CPU,
    DIRECTIONS,
    DRY,
    GPU,
    HOST,
    MAIN,
    OURS,
    SHORT,
    Case,
    Expected,
    Forward,
    Method,
    Provider,
    Target,
    packaged,
    results,
    speed_up,
)
from bench.roofline import Work
from peft_kernels import prompt_embedding


@dataclass(frozen=True)
class PromptCase(Case):
    """ids [batch, tokens] into a table [vocabulary, width], prompt [length, width] before them.

    Attributes:
        name: as in ``Case``, like suite and reported.
        dtype: of the table and the embeddings.
        length: P.
        width: D.
        vocabulary: rows of the table.
    """

    op: ClassVar[str] = "prompt"
    name: str
    suite: str
    batch: int
    tokens: int
    length: int
    width: int
    vocabulary: int = 32000
    dtype: str = "bfloat16"
    reported: bool = False


def _case(
    suite: str, b: int, s: int, p: int, d: int, vocabulary: int = 32000, dtype: str = "bfloat16"
) -> PromptCase:
    place = {HOST: "host ", DRY: "dry "}.get(suite, "")
    name = f"{place}prompt B{b} S{s} P{p} D{d} {SHORT[dtype]}"
    return PromptCase(name, suite, b, s, p, d, vocabulary, dtype, suite in (GPU, DRY))


CASES = (
    *(
        _case(CPU, *sizes, dtype=dtype)
        for sizes in ((8, 512, 20, 1024), (4, 1024, 100, 4096), (1, 64, 20, 2048))
        for dtype in ("bfloat16", "float32")
    ),
    *(
        _case(GPU, *sizes)
        for sizes in ((8, 2048, 20, 4096), (16, 1024, 100, 4096), (1, 64, 20, 4096))
    ),
    _case(HOST, 1, 4, 2, 16, 11, "float32"),
    _case(DRY, 2, 5, 3, 8, 11, "float32"),
)


def quick(case: PromptCase) -> PromptCase:
    """Return ``case`` cut to a size that proves the code runs and measures nothing."""
    return replace(
        case,
        name=f"quick {case.name}",
        batch=min(case.batch, 2),
        tokens=min(case.tokens, 5),
        length=min(case.length, 3),
        width=min(case.width, 8),
        vocabulary=min(case.vocabulary, 11),
    )


@dataclass(frozen=True)
class PromptProblem:
    """What every provider is given; the prompt is float32 and trained, as peft keeps it."""

    case: PromptCase
    ids: Tensor  # int64 [B, S]
    table: Tensor  # [V, D]
    prompt: Tensor  # float32 [P, D]
    mask: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, S]
    dy: Tensor  # [B, P + S, D]

    @property
    def alive(self) -> tuple[Tensor, ...]:
        """The inputs and the parameters."""
        return self.ids, self.table, self.prompt, self.mask, self.labels

    def leaves(self, frozen: bool) -> dict[str, Tensor]:
        """Return what gradients are taken of."""
        return {"prompt": self.prompt}

    def keep_mask(self) -> Tensor | None:
        """Return None: nothing is dropped."""
        return None


def make_problem(case: PromptCase, device: str | torch.device, seed: int = 0) -> PromptProblem:
    """Return the tensors of a case, the same ones for the same seed."""
    generator = torch.Generator(device=device).manual_seed(seed)
    size = (case.batch, case.tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    def ids() -> Tensor:
        return torch.randint(case.vocabulary, size, device=device, generator=generator)

    return PromptProblem(
        case,
        ids(),
        normal(case.vocabulary, case.width).to(case.torch_dtype),
        normal(case.length, case.width).requires_grad_(),
        torch.ones(size, dtype=torch.int64, device=device),
        ids(),
        normal(case.batch, case.tokens + case.length, case.width).to(case.torch_dtype),
    )


Outputs = tuple[Tensor, Tensor, Tensor]
Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Outputs]


def peft_form(ids: Tensor, table: Tensor, prompt: Tensor, mask: Tensor, labels: Tensor) -> Outputs:
    """Return embeddings, mask and labels by the operations of peft 0.21."""
    batch, length = ids.shape[0], prompt.shape[0]
    ones = torch.ones(batch, length).to(ids.device)
    mask = torch.cat((ones, mask), dim=1)
    tokens = F.embedding(ids, table)
    ignored = torch.full((batch, length), -100).to(ids.device)
    labels = torch.cat((ignored, labels), dim=1)
    prompt_ids = torch.arange(length).unsqueeze(0).expand(batch, -1).to(ids.device)
    prompts = F.embedding(prompt_ids, prompt).to(tokens.dtype)
    return torch.cat((prompts, tokens), dim=1), mask, labels


def eager_form(ids: Tensor, table: Tensor, prompt: Tensor, mask: Tensor, labels: Tensor) -> Outputs:
    """Return embeddings, mask and labels by as few operations as PyTorch allows."""
    batch, length = ids.shape[0], prompt.shape[0]
    prompts = prompt.to(table.dtype).expand(batch, -1, -1)
    embeddings = torch.cat((prompts, F.embedding(ids, table)), dim=1)
    return (
        embeddings,
        F.pad(mask, (length, 0), value=1),
        F.pad(labels, (length, 0), value=-100),
    )


def by(name: str, form: Form) -> Provider:
    """Return the provider of a form written in PyTorch."""

    def build(problem: PromptProblem, keep: Tensor | None) -> Forward:
        given = problem.alive
        return lambda: form(*given)

    return Provider(name, build)


def _compiled(problem: PromptProblem, keep: Tensor | None) -> Forward:
    torch._dynamo.reset()
    compiled, given = torch.compile(eager_form, dynamic=False), problem.alive
    return lambda: compiled(*given)


def fused(backend: str | None = None) -> Provider:
    """Return the provider of ``prompt_embedding`` on a backend (None: the best)."""

    def arguments(
        problem: PromptProblem, keep: Tensor | None
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        given = (problem.ids, problem.table, problem.prompt)
        return given, {"attention_mask": problem.mask, "labels": problem.labels}

    return packaged(prompt_embedding, arguments, backend, outputs=lambda out: out[:3])


PEFT, EAGER, FUSED = by("peft", peft_form), by("eager", eager_form), fused()
OUTPUTS = ("embeddings", "mask", "labels")


def expected(problem: PromptProblem, keep: Tensor | None, frozen: bool) -> Expected:
    """Return eager's outputs, which are exact, and the prompt's gradient, summed in float64."""
    found = results(eager_form(*problem.alive), problem.dy, problem.leaves(False), OUTPUTS)
    gradient = found.pop("dprompt")
    truth = problem.dy[:, : problem.case.length].double().sum(0)
    return Expected({"dprompt": truth}, ({"dprompt": gradient},), exact=found)


def work(case: PromptCase, direction: str, provider: str = OURS) -> Work:
    """Return the traffic, and backward's additions; ids, mask and labels are int64.

    Position ids are left out: only ours gives them.
    """
    b, s, p, d = case.batch, case.tokens, case.length, case.width
    size, prompt = case.torch_dtype.itemsize, 4 * p * d
    moved = b * (2 * s + p) * d * size + prompt + 8 * (3 * b * s + 2 * b * (s + p))
    if direction == BOTH:
        return Work(b * p * d, moved + b * p * d * size + prompt)
    return Work(0, moved)


def _target(case: PromptCase, direction: str) -> Target:
    return Target(
        f"{case.name.removeprefix('prompt ')}, {direction}: eager / ours", 1.0, speed_up,
        case.suite, direction, lambda each: each == case, True,
    )  # fmt: skip


METHOD = Method(
    name=PromptCase.op,
    case_type=PromptCase,
    cases=CASES,
    quick=quick,
    make_problem=make_problem,
    expected=expected,
    providers=(PEFT, EAGER, Provider(COMPILED, _compiled, poison=False), FUSED),
    work=work,
    targets=tuple(
        _target(case, each) for case in CASES if case.suite in (CPU, GPU) for each in DIRECTIONS
    ),
    seconds={CPU: 2.5, HOST: 2.0, GPU: 4.0},
    gpu={MAIN: (PEFT, EAGER, replace(fused("triton"), name=OURS))},
    columns={"peft": "peft's form", "compile": "torch.compile", "fused": "peft_kernels"},
    title="prompt: batch, tokens, prompt length, width, dtype",
    eager=("peft", "eager"),
    outputs=OUTPUTS,
)
