"""Figures of a benchmark in files: a block of a Markdown document, and a JSON file of settings and results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from selva.utils.files import atomic_write_text

END_MARK = "<!-- end of figures -->"


def begin_mark(script: str) -> str:
    """Return the line before the figures of a script, such as ``benchmarks/run.py``."""
    return f"<!-- figures: {script} -->"


def marked_block(begin: str, parts: Iterable[str]) -> str:
    """Return Markdown parts between the two marks."""
    return "\n".join([begin, "", *parts, END_MARK, ""])


def with_block(text: str, begin: str, block: str) -> str:
    """Return a document with its block replaced, or added at the end where it has none."""
    if begin in text and END_MARK in text:
        return text[: text.index(begin)] + block + text[text.index(END_MARK) + len(END_MARK) + 1 :]
    return f"{text.rstrip()}\n\n{block}" if text else block


def update_document(path: Path, begin: str, block: str, title: str = "") -> None:
    """Write the block into a document, or into a new one under ``title``; what people wrote around it stays."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    atomic_write_text(path, with_block(text or title, begin, block))


def write_results(path: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write results together with the settings that they were measured with."""
    words = {name: str(value) for name, value in settings.items()}
    atomic_write_text(path, json.dumps({"settings": words, "results": results}, indent=2) + "\n")
