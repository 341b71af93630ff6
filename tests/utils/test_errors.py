"""selva.utils.errors: mistakes of users are told from defects."""

from __future__ import annotations

import re
from pathlib import Path

from selva.utils.errors import UsageError, UserError

ROOT = Path(__file__).parents[2]


def test_mistakes_of_users_have_a_class_of_their_own():
    """A plain ValueError ends in a traceback, so none is raised for a user; those who caught one still do."""
    assert issubclass(UsageError, UserError) and issubclass(UserError, ValueError)
    folders = ("selva", "toyworld", "scripts", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    plain = [f"{path.relative_to(ROOT)}:{number}" for path in [*files, *ROOT.glob("*.py")]
             for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
             if re.search(r"\braise ValueError\b|\bValueError\(", line)]
    assert plain == []
