"""What README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

from bench import readme
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
