"""Puts figures of committed results into pages of the site, drawn while it is built.

A line that is nothing but a link with the title "figures" stands for what ``bench.plots`` draws of
the result file that it links:

    [Drawn from](../bench/results/h200/rows.json "figures")

In a reader of Markdown that knows nothing of this it stays a link that works.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # mkdocs runs this file without its folder

from bench import plots  # noqa: E402 -- the path comes first

FIGURES = re.compile(r'^\[[^\]]+\]\(([^)#\s]+\.json) "figures"\)$', re.MULTILINE)
FOLDER = "figures"
# What is said of a figure where it is not seen.
WORDS = {
    "speedup": "How many times faster than each baseline peft_kernels is, case by case",
    "roofline": "Achieved FLOP/s against FLOPs a byte, under the peaks of the same machine",
    "saved": "Bytes saved for backward beyond x and the parameters, case by case",
}


def on_files(files: Any, *, config: Any) -> Any:
    """Add the figures of every page to the site's files (called by mkdocs)."""
    drawn: dict[Path, list[Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for page in files.documentation_pages():
            for source in sources(page.content_string, page.src_uri):
                if source not in drawn:
                    drawn[source] = plots.draw(source, Path(folder))
        for path in (each for paths in drawn.values() for each in paths):
            uri = f"{FOLDER}/{path.name}"
            files.append(File.generated(config, uri, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Any, **_: Any) -> str:
    """Return a page's text with its figures in place (called by mkdocs)."""
    there = {file.src_uri for file in files}
    return expanded(markdown, page.file.src_uri, there)


def sources(markdown: str, page: str) -> list[Path]:
    """Return the result files whose figures ``page``, its path in docs, shows."""
    folder = (ROOT / "docs" / page).parent
    return [(folder / found[1]).resolve() for found in FIGURES.finditer(markdown)]


def expanded(markdown: str, page: str, there: set[str]) -> str:
    """Return the text of ``page`` with images in place of its figures, of those that are there."""

    def images(found: re.Match[str]) -> str:
        stem = Path(found[1]).stem
        uris = {name: f"{FOLDER}/{stem}-{name}.png" for name in WORDS}
        above = os.path.dirname(page) or "."
        return "\n\n".join(
            f"![{WORDS[name]}]({os.path.relpath(uri, above)})"
            for name, uri in uris.items()
            if uri in there
        )

    return FIGURES.sub(images, markdown)
