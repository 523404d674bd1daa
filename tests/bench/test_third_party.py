"""Third parties: what each adapter passes on, and that nothing but right results is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import store, tables, third_party
from bench.gate import Gate, GateResult
from bench.lora.baselines import EAGER, FUSED
from bench.lora.problem import make_problem as lora_problem
from bench.method import MAIN, Provider
from bench.methods import METHODS, method_of
from bench.prefix import PrefixCase
from bench.prefix import make_problem as prefix_problem
from bench.rows import FAILED, TIMED, PeakTable, measure_case
from bench.third_party import (
    ADAPTERS,
    AXOLOTL,
    FLASH_ATTN,
    PEERS,
    PEFT,
    Peer,
    adapters,
    axolotl,
    flash_attn,
    flex_attention,
    lorafusion,
    nemo_automodel,
    peft,
    usable,
    xformers,
)
from tests.bench import stand_ins
from tests.bench.problems import DROPPED, NARROW, SMALL

CPU = torch.device("cpu")
WHOLE = PrefixCase("small prefix", "cpu", 2, 6, 2, 9, 5, 16, "float32")
HALF = replace(WHOLE, name="small prefix bf16", dtype="bfloat16")
DECODING = replace(WHOLE, name="small prefix decoding", decoding=True)
ALONE = replace(WHOLE, name="small prefix of a head each", kv_heads=6)
NARROW_DROPPED = replace(NARROW, name="small bf16 dropped", dropout_p=0.25)

LORA_CASES = (SMALL, DROPPED, NARROW, NARROW_DROPPED)
PREFIX_CASES = (WHOLE, HALF, DECODING, ALONE)
# Peer, its stand-in, its provider, cases: LoRAFusion fails without dropout.
GLUED = (
    ("axolotl", stand_ins.axolotl, axolotl.LORA, LORA_CASES),
    ("nemo_automodel", stand_ins.nemo_automodel, nemo_automodel.LORA, LORA_CASES),
    ("LoRAFusion", stand_ins.lorafusion, lorafusion.LORA, (DROPPED, NARROW_DROPPED)),
    ("flash-attn", stand_ins.flash_attn, flash_attn.PREFIX, PREFIX_CASES),
    ("flash-attn 3", stand_ins.flash_attn_interface, flash_attn.PREFIX_3, PREFIX_CASES),
    ("xFormers", stand_ins.xformers, xformers.PREFIX, PREFIX_CASES),
)
EACH = [
    pytest.param(stand_in, provider, case, id=f"{name}-{case.name}")
    for name, stand_in, provider, cases in GLUED
    for case in cases
]
LORA_NAMES = {"y", "dx", "da", "db"}
PREFIX_NAMES = {"y", "dq", "dk", "dv", "dprefix_k", "dprefix_v"}


def check(case: Any, provider: Provider, device: torch.device = CPU) -> GateResult:
    make_problem = lora_problem if case.op == "lora" else prefix_problem
    return Gate(make_problem(case, device)).check(provider)


@pytest.mark.parametrize(("stand_in", "provider", "case"), EACH)
def test_what_is_passed_on_gives_the_right_results(
    stand_in: Any, provider: Provider, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    result = check(case, provider)
    assert result.passed, str(result)
    wanted = LORA_NAMES if case.op == "lora" else PREFIX_NAMES
    assert {each.tensor for each in result.comparisons} == wanted


@pytest.mark.parametrize(
    ("stand_in", "provider", "case"),
    [each for each in EACH if each.values[2] in (DROPPED, WHOLE, DECODING)],
)
def test_a_peer_with_wrong_results_fails(
    stand_in: Any, provider: Provider, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, wrong=1.01)
    result = check(case, provider)
    assert result.problem is None and not result.passed


@pytest.mark.parametrize("wrong", [1.0, 1.01])
def test_only_right_results_are_timed(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.axolotl(monkeypatch, wrong=wrong)
    rows = measure_case(SMALL, [EAGER, axolotl.LORA, FUSED], CPU, 0.02, PeakTable(CPU, tiny=True))
    mine = [row for row in rows if row.provider == "axolotl"]
    assert len(mine) == 2
    for row in mine:
        assert row.status == (TIMED if wrong == 1.0 else FAILED)
        assert (row.timing is not None) == (wrong == 1.0) == (row.ratio_eager is not None)
    text = tables.table(rows)
    lines = [line for line in text.splitlines() if line.strip().startswith("axolotl")]
    assert all(("FAILED da error" in line) == (wrong != 1.0) for line in lines)


@pytest.mark.external
@pytest.mark.parametrize("case", [*LORA_CASES, replace(SMALL, name="no bias", bias=False)], ids=str)
def test_pefts_own_layer_passes(case: Any) -> None:
    result = check(case, peft.LORA)
    assert result.passed, str(result)
    assert {each.tensor for each in result.comparisons} == LORA_NAMES
    assert peft.LORA.why_not(lora_problem(case, CPU)) is None


@pytest.mark.external
def test_peft_is_measured_on_a_cpu_where_it_takes_no_seconds() -> None:
    def on(device: str, case: Any) -> str | None:
        return peft.LORA.why_not(stand_ins.without_tensors(case, device))

    cases = {case.name: case for case in METHODS["lora"].cases}
    large, small = cases["1024x4096x4096 fp32 p0"], cases["2048x2048x2048 fp32 p0"]
    assert "smaller shapes" in (on("cpu", large) or "")
    assert on("cpu", small) is on("cuda", large) is None


@pytest.mark.external
def test_peft_draws_its_own_dropout_when_it_is_timed() -> None:
    dropped, plain = (peft.LORA.build(lora_problem(case, CPU), None) for case in (DROPPED, SMALL))
    assert not torch.equal(dropped(), dropped()) and torch.equal(plain(), plain())


def test_lorafusion_draws_its_own_dropout_when_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stand_ins.lorafusion(monkeypatch)
    drawn = module.seeded_dropout
    problem = lora_problem(DROPPED, CPU)
    timed = lorafusion.LORA.build(problem, None)
    assert not torch.equal(timed(), timed())
    gated = lorafusion.LORA.build(problem, problem.keep_mask())
    assert torch.equal(gated(), gated()) and module.seeded_dropout is drawn


@pytest.fixture
def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run torch's own operator by its dense form, backward included, which it bars on a CPU."""
    from torch.nn.attention import flex_attention as module

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)
    flex_attention._prepared.cache_clear()
    yield
    flex_attention._prepared.cache_clear()


LONG = replace(WHOLE, name="blocks of all kinds", tokens=300, length=150, batch=1)


@pytest.mark.usefixtures("uncompiled_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [*PREFIX_CASES, LONG], ids=lambda case: case.name)
def test_flex_attention_sees_prefix_and_past(case: PrefixCase) -> None:
    result = check(case, flex_attention.PREFIX)
    assert result.passed, str(result)
    assert {each.tensor for each in result.comparisons} == PREFIX_NAMES


@pytest.mark.parametrize("case", [WHOLE, DECODING, LONG], ids=lambda case: case.name)
def test_flex_attentions_mask_is_the_problems(case: PrefixCase) -> None:
    queries, keys = torch.arange(case.queries)[:, None], torch.arange(case.length + case.tokens)
    none = torch.tensor(0)
    mask = flex_attention.seen(case.length, case.tokens - case.queries)(none, none, queries, keys)
    assert torch.equal(mask, prefix_problem(case, CPU).mask)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [HALF, replace(HALF, decoding=True)], ids=lambda case: case.name)
def test_compiled_flex_attention_passes_on_a_gpu(case: PrefixCase) -> None:
    result = check(case, flex_attention.PREFIX, torch.device("cuda"))
    assert result.passed, str(result)


def test_what_does_not_run_on_a_cpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flex_attention.PREFIX.why_not(prefix_problem(WHOLE, CPU)) == "needs CUDA"
    stand_ins.flash_attn(monkeypatch)
    assert flash_attn.PREFIX.why_not(prefix_problem(HALF, CPU)) == "needs CUDA"


def test_what_a_peer_cannot_compute_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for stand_in in (row[1] for row in GLUED):
        stand_in(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 9))
    wide = replace(NARROW_DROPPED, in_features=512, out_features=256, rank=16)

    def reason(provider: Provider, case: Any) -> str:
        return provider.why_not(stand_ins.without_tensors(case)) or ""

    assert reason(nemo_automodel.LORA, replace(SMALL, rank=256)).startswith("needs rank <= 128")
    assert not reason(nemo_automodel.LORA, replace(SMALL, rank=128))
    assert "needs dropout" in reason(lorafusion.LORA, replace(wide, dropout_p=0.0))
    for rank in (8, 24):
        assert "power of two" in reason(lorafusion.LORA, replace(wide, rank=rank))
    assert "multiples of 256" in reason(lorafusion.LORA, replace(wide, in_features=384))
    assert reason(lorafusion.LORA, wide) == "has no tiles for h200"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    assert not reason(lorafusion.LORA, wide)
    for provider in (flash_attn.PREFIX, flash_attn.PREFIX_3, xformers.PREFIX):
        assert not reason(provider, HALF)
        assert "float16 or bfloat16" in reason(provider, WHOLE)
        assert "multiples of 8" in reason(provider, replace(HALF, head_size=20))
    for version, fits in {"2.0.9": False, "1.0.9": False, "2.1.0": True, "2.10.1": True}.items():
        monkeypatch.setattr(Peer, "version", version)
        assert ("top left" in reason(flash_attn.PREFIX, HALF)) is not fits


def test_an_absent_peer_is_listed_and_has_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(third_party.sys.modules, "peft", None)
    monkeypatch.setitem(third_party.sys.modules, "axolotl", None)
    found = third_party.present()
    assert set(found) == {each.name for each in PEERS}
    assert found["peft"] is found["axolotl"] is None
    assert "peft" in third_party.listed().partition("; absent: ")[2].split(", ")
    assert usable(peft.LORA, axolotl.LORA) == ()
    assert peft.LORA.why_not(lora_problem(SMALL, CPU)) == "peft is not installed"


def test_a_peer_that_is_here_is_listed_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.axolotl(monkeypatch)
    stand_ins.flash_attn(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert third_party.present()["axolotl"] == "unknown"  # a module without a distribution
    assert "axolotl unknown" in third_party.listed().partition("; absent: ")[0]
    assert usable(axolotl.LORA, flash_attn.PREFIX) == (axolotl.LORA,)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert usable(axolotl.LORA, flash_attn.PREFIX) == (axolotl.LORA, flash_attn.PREFIX)
    assert AXOLOTL.why_not(CPU) is None and FLASH_ATTN.why_not(CPU) == "needs CUDA"


def test_a_peer_that_cannot_be_imported_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "brokenpeer"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('wants another Triton\\nat length')\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken = Peer("broken", "brokenpeer.kernels", "brokenpeer")
    reason = broken.provider(axolotl.LORA.build).why_not(lora_problem(SMALL, CPU))
    assert reason == "broken cannot be imported: RuntimeError: wants another Triton"


def test_results_say_which_third_parties_there_were() -> None:
    assert store.machine(CPU)["third_parties"] == third_party.present()


@pytest.mark.parametrize("peer", [PEFT, ADAPTERS], ids=lambda peer: peer.name)
def test_those_that_run_here_are_measured_and_reported(peer: Peer) -> None:
    """Peft and adapters exclude each other's transformers: one of them is here at most."""
    method = METHODS["lora" if peer is PEFT else "adapter"]
    mine = peft.LORA if peer is PEFT else adapters.ADAPTER
    for providers in (method.providers, method.gpu[MAIN]):
        assert (mine in providers) == peer.installed
        assert providers[-1].name == "fused"
    assert method_of(method.cases[0]) is method
