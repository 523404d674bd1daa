"""Selection: order, demands, reasons, warnings, strict mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

import peft_kernels
from peft_kernels.core import backend as backends
from peft_kernels.core.backend import Backend, BackendUnavailable, Op, select
from tests.lora.problems import problem


class _Spec(NamedTuple):
    device: torch.device
    dtype: torch.dtype


def _nothing(*args: object) -> None:
    """Launch nothing."""


def _op(**reasons: str | None) -> Op:
    records = [
        Backend(name, _nothing, _nothing, lambda spec, reason=reason: reason)  # type: ignore[misc]
        for name, reason in reasons.items()
    ]
    return Op("toy", (*records, Backend("reference", _nothing, _nothing, lambda spec: None)))


CPU = _Spec(torch.device("cpu"), torch.float32)
GPU = _Spec(torch.device("cuda", 0), torch.float32)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PEFT_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("PEFT_KERNELS_STRICT", raising=False)
    backends.forget_choices()
    yield
    backends.forget_choices()


def test_first_backend_without_a_reason_runs() -> None:
    assert select(_op(triton=None, cuda=None), GPU).name == "triton"
    assert select(_op(triton="no", cuda=None), GPU).name == "cuda"
    assert select(_op(cpp=None), CPU).name == "cpp"
    assert select(_op(cpp="no"), CPU).name == "reference"


def test_other_devices_run_on_the_reference() -> None:
    meta = _Spec(torch.device("meta"), torch.float32)
    assert select(_op(triton=None, cpp=None), meta).name == "reference"


def test_triton_serves_cpu_tensors_only_on_demand() -> None:
    op = _op(triton=None, cpp="no")
    assert select(op, CPU).name == "reference"
    assert select(op, CPU, "triton").name == "triton"


def test_a_demand_that_cannot_be_met_names_every_reason() -> None:
    op = _op(triton="install Triton", cuda="rebuild for sm_90")
    with pytest.raises(BackendUnavailable) as error:
        select(op, GPU, "triton")
    for text in ("install Triton", "rebuild for sm_90", "toy", "reference: available"):
        assert text in str(error.value)


def test_a_backend_of_another_device_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="does not serve cuda tensors"):
        select(_op(cpp=None), GPU, "cpp")


def test_environment_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _op(cpp=None)
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "reference")
    assert select(op, CPU).name == "reference"
    assert select(op, CPU, "cpp").name == "cpp", "the argument is the stronger demand"
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "tritn")
    with pytest.raises(ValueError, match="PEFT_KERNELS_BACKEND.*'tritn'"):
        select(op, CPU)
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "triton")
    with pytest.raises(BackendUnavailable):
        select(op, CPU)


def test_reference_on_a_gpu_warns_once_per_reason() -> None:
    op = _op(triton="too old", cuda="not built")
    with pytest.warns(UserWarning, match="triton: too old; cuda: not built"):
        select(op, GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(op, GPU)
        select(_op(cpp="no"), CPU)
        select(op, GPU, "reference")
    other = _op(triton="another reason", cuda="not built")
    with pytest.warns(UserWarning, match="another reason"):
        select(other, GPU)


def test_strict_turns_the_warning_into_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _op(triton="too old", cuda=None)
    monkeypatch.setenv("PEFT_KERNELS_STRICT", "1")
    assert select(op, GPU).name == "cuda"
    with pytest.raises(BackendUnavailable, match="PEFT_KERNELS_STRICT"):
        select(_op(triton="too old"), GPU)
    assert select(_op(cpp="no"), CPU).name == "reference"


def test_explain_gives_a_reason_against_every_other_backend() -> None:
    given = problem(4, 6, 8, 2, dtype=torch.float64)
    found = peft_kernels.explain(
        peft_kernels.lora_linear, given.x, given.weight, given.lora_a, given.lora_b
    )
    assert found.backend == "reference"
    assert set(found.reasons) == {"triton", "cuda", "cpp"}
    assert all(reason in str(found) for reason in found.reasons.values())


def test_explain_follows_the_demand_and_knows_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = peft_kernels.LoRALinear(8, 6, r=2, lora_alpha=4)
    x = torch.randn(3, 8)
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "reference")
    found = peft_kernels.explain(layer, x)
    assert found.backend == "reference" and "demanded" in found.reasons["cpp"]
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "cuda")
    assert peft_kernels.explain(layer, x).backend is None


def test_explain_knows_a_subclass() -> None:
    class Mine(peft_kernels.LoRALinear):
        """A user's own."""

    x = torch.randn(2, 8)
    found = peft_kernels.explain(Mine(8, 8, r=2, lora_alpha=2), x)
    plain = peft_kernels.explain(peft_kernels.LoRALinear(8, 8, r=2, lora_alpha=2), x)
    assert found.backend == plain.backend is not None


def test_explain_of_something_else_lists_what_it_knows() -> None:
    with pytest.raises(TypeError, match="LoRALinear.*lora_linear"):
        peft_kernels.explain(torch.add, torch.ones(2), torch.ones(2))
