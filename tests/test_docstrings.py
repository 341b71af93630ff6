"""Docstrings open as readers of the field expect: a noun phrase, or a verb."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPENERS = re.compile(r"(What|Where|How|Which|Whether|Who|Whatever)\b|Return (what|whether|how|where|why|which)\b")


def openers(root: Path) -> Iterator[str]:
    """Yield `file: first line` of every docstring that opens with a question."""
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "").split("\n")[0]
                if OPENERS.match(first):
                    yield f"{path.relative_to(root.parent)}: {first}"


def test_no_docstring_opens_with_a_question():
    folders = ("selva", "toyworld", "comfyui", "scripts", "benchmarks")
    assert [line for folder in folders for line in openers(ROOT / folder)] == []


def test_a_question_is_found(tmp_path):
    (tmp_path / "a.py").write_text('"""What is in here."""\n\n\ndef f():\n    """Return whether it is so."""\n')
    (tmp_path / "b.py").write_text('"""Things."""\n\n\ndef f():\n    """Return the whether."""\n')
    assert len(list(openers(tmp_path))) == 2
