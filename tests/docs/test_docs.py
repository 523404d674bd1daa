"""The documentation: its examples run, its tables are those of the source, its site builds."""

from __future__ import annotations

import html
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_build
import pytest

import peft_kernels
from bench import pages, plots, readme
from tests.examples_in_text import blocks, keeps, printed, promised

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
# What a page takes in from README, test_readme runs.
TEXTS = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("peft_kernels/*/README.md"))]
WITH_EXAMPLES = [path for path in TEXTS if blocks(path.read_text(encoding="utf-8"))]
SOURCES = ("peft_kernels", "csrc", "bench", "examples", "setup.py", "Makefile", ".github")
ENVIRONMENT = (DOCS / "environment.md").read_text(encoding="utf-8")


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_most_pages_have_examples() -> None:
    assert {"models.md", "backends.md", "numerics.md", "migration.md", "lora.md"} <= {
        path.name for path in WITH_EXAMPLES
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:transformers")
@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=_named)
def test_examples_run_and_print_what_their_comments_say(path: Path) -> None:
    names: dict[str, Any] = {}
    for code in blocks(path.read_text(encoding="utf-8")):
        shown, promises = printed(code, _named(path), names), promised(code)
        assert len(shown) == len(promises), f"{shown} beside {promises}"
        for line, promise in zip(shown, promises, strict=True):
            assert keeps(line, promise), f"{line!r}, promised {promise!r}"


def test_a_promise_is_kept_by_its_own_line_alone() -> None:
    assert keeps("torch.Size([2])", "torch.Size([2])")
    assert keeps("lora_linear cpp\nand more", "lora_linear ...")
    assert not keeps("torch.Size([2])", "torch.Size([3])")
    assert not keeps("lora_linear cpp", "lora_linear")


def _source_files() -> list[Path]:
    found = [ROOT / name for name in SOURCES if (ROOT / name).is_file()]
    for name in SOURCES:
        found += (ROOT / name).rglob("*")
    kinds = {"", ".py", ".cpp", ".cu", ".h", ".yml"}
    return [path for path in found if path.is_file() and path.suffix in kinds]


def _rows(text: str) -> list[str]:
    return re.findall(r"^\| `([A-Z_]+)` \|", text, re.MULTILINE)


def test_the_table_of_variables_has_every_one_of_ours_and_no_other() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in _source_files())
    found = set(re.findall(r"\bPEFT_KERNELS_[A-Z_]+\b", text))
    # What the compilers are given, and what sources ask about; a variable may lend its name.
    macros = set(re.findall(r"(?:-D|#ifdef |#ifndef |defined\()(PEFT_KERNELS_[A-Z_]+)", text))
    found = found - macros | set(re.findall(r'"(PEFT_KERNELS_[A-Z_]+)"', text))
    table = ENVIRONMENT[: ENVIRONMENT.index("## What an install compiles")]
    assert {name for name in _rows(table) if name.startswith("PEFT_KERNELS_")} == found


def test_the_table_of_variables_has_all_that_package_build_and_report_read() -> None:
    files = [*(ROOT / "peft_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.py")]
    files += [ROOT / "setup.py", ROOT / "bench" / "gpu_report.py", ROOT / "bench" / "store.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    read = set(re.findall(r'os\.environ(?:\.get\(|\[)\s*"([A-Z_]+)"', text))
    read |= set(re.findall(r'_DEMAND: Any = "([A-Z_]+)"', text))
    table = _rows(ENVIRONMENT[: ENVIRONMENT.index("## What an install compiles")])
    assert len(table) == len(set(table))
    assert read == set(table)


def test_the_table_of_builds_has_every_choice_and_every_architecture() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    (choices,) = re.findall(r"^CHOICES = \((.*)\)$", setup, re.MULTILINE)
    table = ENVIRONMENT[ENVIRONMENT.index("## What an install compiles") :]
    named = re.findall(r"^\| `([a-z]+)`", table, re.MULTILINE)
    assert [f'"{name}"' for name in named] == choices.split(", ")
    *most, last = cuda_build.ARCHITECTURES
    assert f"of {', '.join(most)} and {last}" in ENVIRONMENT


def test_the_benchmarks_are_those_of_the_committed_results() -> None:
    written = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert written == pages.page(), "python -m bench.pages writes the page anew"


def test_the_methods_show_every_public_function_and_layer() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    assert shown == set(peft_kernels.__all__) - {"__version__"}


def test_the_changelog_names_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\](.*)$", text, re.MULTILINE)
    if headings[0][0] == "Unreleased":
        planned = re.findall(r"^The (?:first|next) release will be (\S+);", text, re.MULTILINE)
        assert planned == [peft_kernels.__version__]
        headings = headings[1:]
    else:
        assert headings[0][0] == peft_kernels.__version__
    for version, date in headings:
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert re.fullmatch(r" - \d{4}-\d{2}-\d{2}", date), f"when was {version} released?"


@pytest.fixture(scope="module")
def include() -> ModuleType:
    spec = importlib.util.spec_from_file_location("include", DOCS / "include.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_section_is_included_with_its_headings_below_the_page(
    include: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(include, "ROOT", tmp_path)
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    text = "# Title\n\nAbove.\n\n## One\n\n```\n# no heading\n```\n\n### Part\n\n## Two\n\nEnd.\n"
    (tmp_path / "README.md").write_text(text)
    page = 'Before.\n\n[README](../../README.md#{} "include")\n'
    one = include.expanded(page.format("one"), "methods/lora.md")
    assert one == "Before.\n\n### One\n\n```\n# no heading\n```\n\n#### Part\n"
    assert include.expanded(page.format("title"), "methods/lora.md") == "Before.\n\nAbove.\n"
    with pytest.raises(ValueError, match="no heading with the anchor three"):
        include.expanded(page.format("three"), "methods/lora.md")


def test_links_of_what_is_included_lead_to_pages(include: ModuleType) -> None:
    text = "[a](../../CHANGELOG.md#x) [b](../../setup.py) [c](#d) [e](../../docs/methods/lora.md)"
    file = ROOT / "peft_kernels" / "lora" / "README.md"
    turned = include._turned(text, file, "methods/lora.md")
    assert turned == "[a](../changelog.md#x) b (`setup.py`) [c](#d) e"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as ``make docs`` does."""
    for name in ("material", "mkdocstrings", "matplotlib"):
        pytest.importorskip(name)
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def _text(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_the_site_has_every_page(site: Path) -> None:
    found = {str(path.relative_to(site).parent) for path in site.rglob("index.html")}
    wanted = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")}
    assert found - {"."} == wanted - {"index"}


def test_the_site_shows_maths_tables_and_examples(site: Path) -> None:
    page = site / "methods" / "lora" / "index.html"
    shown = _text(page)
    assert "y = x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ" in shown
    assert ">>> layer(torch.randn(4, 32)).shape\ntorch.Size([4, 16])" in shown
    assert "<table>" in page.read_text(encoding="utf-8")
    # Neither an include left as a link, nor what docs/docstrings.py takes out.
    assert '"include"' not in shown and "Make the layer" not in shown
    attributes = shown[shown.index("Attributes:") : shown.index("Raises:")]
    assert "lora_A" in attributes and "Parameter" not in attributes


def test_the_site_draws_the_results_that_the_benchmarks_are_made_of(site: Path) -> None:
    page = site / "benchmarks" / "index.html"
    shown = re.findall(r'<img alt="[^"]+" src="([^"]+)"', page.read_text(encoding="utf-8"))
    results = [
        readme.source_of((ROOT / "README.md").read_text("utf-8")),
        pages.ON_GPU / "rows.json",
    ]
    wanted = [f"{each.stem}-{name}.png" for each in results for name in plots.FIGURES]
    assert [each.rpartition("/")[2] for each in shown] == wanted
    assert all((page.parent / each).read_bytes().startswith(b"\x89PNG") for each in shown)
    assert '"figures"' not in _text(page)


def test_the_site_asks_no_other_host_for_anything(site: Path) -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in site.rglob("*.html"))
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//", text)
    assert loaded == []
