"""The tuner, walked through Triton's interpreter, and what it may choose from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from bench.tuning import candidates as tuning
from bench.tuning import trial
from bench.tuning.launches import Launch
from bench.tuning.offline import known
from peft_kernels.__main__ import main as package
from peft_kernels.core import lora_tiles, overrides, tile_file, tiles, triton_runtime

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
    reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
)


def target(name: str) -> tuning.Target:
    return next(each for each in tuning.targets() if str(each) == name)


@interpreted
@pytest.mark.parametrize("only", ["prefix/key 64", "lora/small", "adapter/many forward 16"])
def test_the_dry_run_times_right_candidates_and_writes_a_file_that_is_read(
    only: str, tmp_path: Path
) -> None:
    out = tmp_path / "tiles.json"
    assert tune.main([str(out), "100", "--dry", "--only", only]) == 0
    content = json.loads(out.read_text())
    (measured,) = content["measured"].values()
    assert measured["refused"] == {}
    assert len(measured["ratios"]) >= 2 and measured["ratios"]["present"] == 1.0
    assert all(time > 0 for times in measured["times"].values() for time in times.values())
    assert tile_file.load(out).source == str(out)


@interpreted
def test_a_tile_that_computes_something_else_is_refused() -> None:
    where = target("reduction/16")
    (candidate,) = tuning.candidates(where, tiles.INTERPRETED)
    assert trial.judge(where, candidate, CPU).problem is None
    made = where.make

    def shifted(case: Any, launch: str, device: Any, dtype: Any, ours: bool) -> Launch:
        found = made(case, launch, device, dtype, ours)

        def run() -> None:
            found.run()
            if ours:
                found.outputs[0][0, 0] += 0.5 * found.outputs[0].abs().max()

        return Launch(run, found.outputs)

    problem = trial.judge(replace(where, make=shifted), candidate, CPU).problem
    assert problem is not None and "result 0: " in problem


@interpreted
def test_a_tile_that_no_launch_takes_is_refused() -> None:
    where = target("prefix/key 64")
    (candidate, *_) = tuning.candidates(where, tiles.INTERPRETED)
    other = replace(candidate, entry=(*candidate.entry[:3], "key 128"))
    assert trial.judge(where, other, CPU).problem == "no launch took it"


@interpreted
def test_what_raises_is_refused_with_the_reason() -> None:
    where = target("prefix/key 64")
    (candidate, *_) = tuning.candidates(where, tiles.INTERPRETED)
    broken = replace(candidate, tile=replace(candidate.tile, block_n=24))
    problem = trial.judge(where, broken, CPU).problem
    assert problem is not None and ":" in problem


@interpreted
def test_a_tile_that_spills_more_than_the_present_one_is_refused() -> None:
    where = target("reduction/16")
    (candidate,) = tuning.candidates(where, tiles.INTERPRETED)
    chosen = [tuning.Candidate(candidate.entry, None), candidate]

    def refused(present: int, spills: int) -> dict[str, str]:
        verdicts = [trial.Verdict(None, 200, present), trial.Verdict(None, 255, spills)]
        return tune.measure(where, chosen, verdicts, CPU)[0].refused

    assert refused(13, 13) == {}
    assert refused(0, 2) == {str(candidate): "2 registers spill, of the present tile 0"}


def test_results_two_roundings_from_the_present_tiles_are_told_apart() -> None:
    present = torch.randn(64, 64)
    nearly = (present * (1 + 2**-9),)
    assert trial.apart(nearly, (present,), torch.bfloat16) is None
    assert trial.apart((present * 1.01,), (present,), torch.bfloat16) is not None
    assert trial.apart((present * torch.nan,), (present,), torch.bfloat16) is not None


@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_candidates_are_others_than_the_present_tile_and_could_be_entries(family: str) -> None:
    count = 0
    for where in tuning.targets():
        now = tuning.present(where, family)
        if now is None:
            continue
        found = tuning.candidates(where, family)
        assert now not in [each.tile for each in found]
        count += len(found)
        for each in found:
            assert tile_file.parsed(*each.entry, tile_file.text(each.tile)) == replace(
                each.tile, **({"ahead": False} if where.table == "adapter" else {})
            )
        assert len(set(map(str, found))) == len(found), "times are told apart by it"
        tma = {each.variant for each in found} if where.table == "lora" else set()
        assert ("ticket_tma" in tma) <= (family == "sm_90")
    assert count > 300


def test_the_first_candidates_are_the_most_promising_and_the_nearest() -> None:
    where = target("lora/backward+")
    near = tuning.candidates(where, "sm_90")
    found = tune.ordered(where, "sm_90")
    assert sorted(map(str, found)) == sorted(map(str, near))
    scores = [known(where, each, "sm_90", compiled=False).score for each in found]
    assert scores[0] == min(scores) and near[0] in found[:2]


def test_the_winner_becomes_an_entry_and_lora_s_variant_a_limit() -> None:
    where = target("lora/large")
    family = "sm_90"
    found = {each.variant: each for each in reversed(tuning.candidates(where, family))}
    pointers, by_tma = found["ticket"], found["ticket_tma"]
    alive = {"present": pointers, "pointers": pointers, "by_tma": by_tma}

    def entries(**ratios: float) -> dict[Any, Any]:
        return tune.chosen_entries(where, tune.Result("", ratios=ratios), alive)

    assert entries(present=1.0, pointers=0.995, by_tma=1.2) == {}
    assert entries(present=1.0, pointers=1.1, by_tma=0.9) == {by_tma.entry: by_tma.tile}
    chosen = entries(present=1.0, pointers=0.8, by_tma=0.9)
    assert chosen == {
        pointers.entry: pointers.tile,
        (family, "limits", "tma_from", "large"): None,
    }
    with overrides.forced(overrides.Overrides(chosen)):
        assert lora_tiles.tma_from(family, "large") is None
        assert lora_tiles.table_tile(family, "16bit", "large") == pointers.tile


@interpreted
def test_bench_tune_is_a_command_of_the_package(tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    options = ["--tune", str(out), "30", "--dry", "--only", "prefix/query 64"]
    assert package(["bench", *options]) == 0
    assert list(json.loads(out.read_text())["measured"]) == ["prefix/query 64"]


def test_prefix_attention_by_pointers_wins_over_its_entry_by_tma() -> None:
    where = target("prefix/key 128")
    found = {each.variant: each for each in reversed(tuning.candidates(where, "sm_90"))}
    alive = {"present": found["fused"], **found}

    def entries(**ratios: float) -> dict[Any, Any]:
        return tune.chosen_entries(where, tune.Result("", ratios={"present": 1.0, **ratios}), alive)

    pointers, by_tma = found["pointers"], found["fused"]
    assert by_tma.tile.tma and not pointers.tile.tma
    assert entries(fused=0.9, pointers=0.95) == {by_tma.entry: by_tma.tile}
    none = (*pointers.entry[:3], "tma key 128")
    assert entries(pointers=0.9) == {pointers.entry: pointers.tile, none: None}
    assert (
        tile_file.dumped(entries(pointers=0.9))["sm_90"]["prefix"]["16bit"]["tma key 128"] is None
    )


def test_no_gpu_is_said_where_none_was_waived(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        tune.main([str(tmp_path / "tiles.json"), "5"])


@interpreted
@pytest.mark.parametrize(
    ("out", "seconds", "only", "said"),
    [
        ("tiles.json", "0", "", "seconds must be a number above 0, got 0"),
        ("tiles.json", "5", "key 129", "--only 'key 129': there are prefix/key 128, "),
        ("file/tiles.json", "5", "", "nothing can be written to "),
    ],
)
def test_what_tunes_nothing_is_refused_before_it_begins(
    out: str, seconds: str, only: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        tune.main([str(tmp_path / out), seconds, "--dry", "--only", only])
    assert said in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.gpu
def test_tiles_are_compiled_tried_and_timed_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    options = ["--only", "prefix/key 64", "--most", "3", "--workers", "2"]
    assert tune.main([str(out), "200", *options]) == 0
    (measured,) = (
        each for name, each in json.loads(out.read_text())["measured"].items() if "drop" not in name
    )
    assert measured["ratios"]["present"] == 1.0 and measured["registers"]["present"] > 32
    assert len(measured["ratios"]) + len(measured["refused"]) == 4
    assert not [each for each in measured["refused"].values() if "spill" not in each]
    assert tile_file.load(out).source == str(out)
