"""What README shows runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench import readme
from bench.method import GPU
from bench.rows import row_of
from bench.targets import figures
from tests.examples_in_text import blocks, printed

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_examples_run_and_print_what_their_comments_say() -> None:
    layers, model = (printed(code, "README.md") for code in blocks(README))
    assert layers[0] == "['linear1', 'linear2']"
    assert "lora_linear runs on" in layers[1]
    assert model[0].startswith("accelerated 14 of 14 layers (lora_linear)")


def test_every_make_target_it_names_exists() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_every_file_it_links_exists() -> None:
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert linked
    assert all((Path(__file__).parent.parent / name).exists() for name in linked)


def test_its_figures_are_those_of_the_result_file_it_names() -> None:
    assert readme.fill(README, readme.source_of(README)) == README


def test_what_the_gpu_did_not_reach_is_named() -> None:
    content = json.loads((readme.ON_GPU / "rows.json").read_text(encoding="utf-8"))
    asked = figures([row_of(each) for each in content["rows"]], suites=[GPU])
    missed = [each for each in asked if each.reached is False]
    assert asked and len(missed) < len(asked)
    for each in missed:
        assert f"{each.target} at {'least' if each.at_least else 'most'} {each.limit:g}" in README
