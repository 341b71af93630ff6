"""Blocks of a Markdown document that a program writes, between two marks; the text around them stays."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from selva.utils.files import atomic_write_text

END_MARK = "<!-- end of figures -->"


def begin_mark(script: str) -> str:
    """Return the line before the figures of a script, such as ``benchmarks/run.py``."""
    return f"<!-- figures: {script} -->"


def marked_block(begin: str, parts: Iterable[str], end: str = END_MARK) -> str:
    """Return Markdown parts between the two marks."""
    return "\n".join([begin, "", *parts, end, ""])


def with_block(text: str, begin: str, block: str, end: str = END_MARK) -> str:
    """Return a document with its block replaced, or added at the end where it has none."""
    if begin in text and end in text:
        return text[: text.index(begin)] + block + text[text.index(end, text.index(begin)) + len(end) + 1 :]
    return f"{text.rstrip()}\n\n{block}" if text else block


def update_document(path: Path, begin: str, block: str, title: str = "") -> None:
    """Write the block into a document, or into a new one under ``title``."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    atomic_write_text(path, with_block(text or title, begin, block))
