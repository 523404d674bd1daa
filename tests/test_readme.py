"""What README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import cuda_build

from bench import readme

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_examples_run_and_print_what_their_comments_say() -> None:
    layers, model = (
        _printed(code) for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    )
    assert layers[0] == ["linear1", "linear2"]
    assert "lora_linear runs on" in str(layers[1])
    assert str(model[0]).startswith("accelerated 14 of 14 layers (lora_linear)")


def _printed(code: str) -> list[object]:
    printed: list[object] = []
    exec(compile(code, "README.md", "exec"), {"print": printed.append})
    return printed


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


def test_its_table_of_builds_has_every_choice_and_every_architecture() -> None:
    setup = (Path(__file__).parent.parent / "setup.py").read_text(encoding="utf-8")
    (choices,) = re.findall(r"^CHOICES = \((.*)\)$", setup, re.MULTILINE)
    table = README[README.index("| `PEFT_KERNELS_BUILD`") : README.index("## Use")]
    named = re.findall(r"^\| `([a-z]+)`", table, re.MULTILINE)
    assert [f'"{name}"' for name in named] == choices.split(", ")
    *most, last = cuda_build.ARCHITECTURES
    assert f"all of {', '.join(most)} and {last}" in " ".join(table.split())
