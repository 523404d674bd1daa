"""The prompt benchmark: every provider passes its gate, and a wrong one gets no time."""

from __future__ import annotations

import torch

from bench import prompt
from bench.measure import Timing

CPU = torch.device("cpu")


def test_every_provider_passes_and_is_timed_in_both_directions() -> None:
    found = prompt.measure(prompt.TINY, CPU, 0.02, prompt.PROVIDERS)
    assert set(found) == {(d, name) for d in prompt.DIRECTIONS for name in prompt.PROVIDERS}
    assert all(isinstance(time, Timing) for time in found.values())
    assert all(line.endswith("x") for line in prompt.rows(found))


def test_a_provider_with_wrong_results_gets_no_time() -> None:
    def wrong_label(given: prompt.PromptProblem) -> prompt.Outputs:
        embeddings, mask, labels = prompt.eager_form(given)
        return embeddings, mask, labels.clamp_min(-99)

    def wrong_gradient(given: prompt.PromptProblem) -> prompt.Outputs:
        embeddings, *rest = prompt.eager_form(given)
        return (2 * embeddings - embeddings.detach(), *rest)

    given = prompt.make_problem(prompt.TINY, CPU)
    assert prompt.failure(wrong_label, given) == "labels differ from eager's"
    assert "gradient error" in (prompt.failure(wrong_gradient, given) or "")
    providers = {**prompt.PROVIDERS, "fused": wrong_label}
    lines = prompt.rows(prompt.measure(prompt.TINY, CPU, 0.02, providers))
    assert [line.split()[1] for line in lines if "FAILED" in line] == ["fused", "fused"]
