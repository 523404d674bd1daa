"""Puts files of the repository into pages of the site, so that each text is written once.

A line that is nothing but a link with the title "include" stands for what it links:

    [README: Install](../README.md#install "include")

is replaced by that file, or by its part under the heading of that anchor. In a reader of Markdown
that knows nothing of this it stays a link that works. Headings go one level down, below the page's
own title, and the title of a whole file is left out. Links in the text are turned to the pages that
hold what they name; what no page holds is named by its path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What is included whole, or is the subject of a page: file or folder in the repository, page.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "bench/results/h200/README.md": "h200.md",
    "peft_kernels/adapter/README.md": "methods/adapter.md",
    "peft_kernels/lora/README.md": "methods/lora.md",
    "peft_kernels/prefix/README.md": "methods/prefix.md",
    "peft_kernels/prompt/README.md": "methods/prompt.md",
}
INCLUDE = re.compile(r'^\[[^\]]+\]\(([^)#\s]+)(?:#([a-z0-9_-]+))? "include"\)$', re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]+)?\)")
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return a page's text with its includes in place (called by mkdocs)."""
    return expanded(markdown, page.file.src_uri)


def expanded(markdown: str, page: str) -> str:
    """Return the text of ``page``, its path in docs, with its includes in place."""
    folder = (ROOT / "docs" / page).parent

    def included(found: re.Match[str]) -> str:
        file = (folder / found[1]).resolve()
        return text_of(file, found[2], page)

    return INCLUDE.sub(included, markdown)


def text_of(file: Path, anchor: str | None, page: str) -> str:
    """Return a file of the repository, or one of its sections, as it stands in ``page``."""
    text = file.read_text(encoding="utf-8")
    text = _without_title(text) if anchor is None else _section(text, anchor, file)
    return _outside_code(text, lambda each: _deeper(_turned(each, file, page))).strip()


def slug(heading: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def _without_title(text: str) -> str:
    return text.split("\n", 1)[1] if text.startswith("# ") else text


def _section(text: str, anchor: str, file: Path) -> str:
    """Return what stands under a heading, with it, up to the next of its level.

    Of the title, what stands above the first section, without it.
    """
    start, level = None, 0
    for found in _HEADING.finditer(_FENCED.sub(lambda code: " " * len(code[0]), text)):
        if start is not None and len(found[1]) <= level:
            return text[start : found.start()]
        if start is None and slug(found[2]) == anchor:
            title = found[1] == "#"
            start, level = (found.end(), 2) if title else (found.start(), len(found[1]))
    if start is None:
        raise ValueError(f"{file} has no heading with the anchor {anchor}")
    return text[start:]


def _deeper(text: str) -> str:
    return _HEADING.sub(lambda found: f"#{found[1]} {found[2]}", text)


def _turned(text: str, file: Path, page: str) -> str:
    """Return text whose links, made for the place of ``file``, fit the page."""

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        path = Path(os.path.normpath(file.parent / target)).relative_to(ROOT).as_posix()
        docs = path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path)
        if docs == page:
            return f"[{label}]({anchor})" if anchor else label
        if docs is None:
            return label if label == path else f"{label} (`{path}`)"
        return f"[{label}]({os.path.relpath(docs, os.path.dirname(page) or '.')}{anchor})"

    return _LINK.sub(link, text)


def _outside_code(text: str, change: Any) -> str:
    parts = _FENCED.split(text)
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))
