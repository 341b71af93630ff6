"""``docs/pitfalls.md`` explains every label that code and documents use, and names tests that exist."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pitfalls.md"

# "Pitfall K:", "(pitfall B1)", "Pitfalls D1 and D2", "Pitfalls A6, A8, I2", and with words between them
# "Pitfalls F3: also at steps ...; F5: noise ...".
LABEL = r"(?:[A-K]\d{1,2}\b|[A-K](?=[:.,;)]))"
IN_USE = re.compile(rf"\b[Pp]itfall(s?)\s+({LABEL}(?:(?:,|\s+and)\s+{LABEL})*)")
FURTHER = re.compile(rf";\s+({LABEL}):")
ENTRY = re.compile(r"^\*\*([A-K]\d{0,2})\. .+?(?=^\*\*[A-K]\d{0,2}\. |^## |\Z)", re.MULTILINE | re.DOTALL)
TEST = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")


def sources() -> Iterator[Path]:
    """Yield the Python files and documents of the repository, without virtual environments and hidden folders."""
    for folder, names, files in os.walk(ROOT):
        names[:] = [n for n in names if not n.startswith(".") and not Path(folder, n, "pyvenv.cfg").exists()]
        yield from (Path(folder, name) for name in files if name.endswith((".py", ".md")))


def labels_in(text: str) -> list[str]:
    """Return the labels that a text refers to."""
    labels = []
    for match in IN_USE.finditer(text):
        labels += re.findall(LABEL, match[2] + ":")
        if match[1]:
            end = text.find('"""', match.end())
            labels += FURTHER.findall(text[match.end() : end if end >= 0 else None])
    return labels


def entries() -> list[tuple[str, str]]:
    """Return (label, text) of every entry of the page."""
    return [(match[1], match[0]) for match in ENTRY.finditer(PAGE.read_text(encoding="utf-8"))]


@cache
def functions_in(path: str) -> frozenset[str]:
    """Return the names of the test functions in a file, none where there is no such file."""
    file = ROOT / path
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return frozenset(re.findall(r"^ *def (test_\w+)\(", text, re.MULTILINE))


def test_every_label_in_use_is_explained():
    used = {}
    for path in sources():
        for label in labels_in(path.read_text(encoding="utf-8")):
            used.setdefault(label, path.relative_to(ROOT).as_posix())
    assert len(used) > 40 and {"A1", "D2", "F6", "K"} <= used.keys()  # every way of writing them is understood
    explained = {label for label, _ in entries()}
    assert {label: where for label, where in used.items() if label not in explained} == {}


def test_every_named_test_exists():
    named = TEST.findall(PAGE.read_text(encoding="utf-8"))
    assert len(named) > 100
    assert [f"{path}::{name}" for path, name in named if name not in functions_in(path)] == []


def test_every_entry_stands_once_and_names_its_tests():
    found = entries()
    assert [label for label, count in Counter(label for label, _ in found).items() if count > 1] == []
    held = [label for label, text in found if TEST.search(text.partition("**Tests:**")[2])]
    assert [label for label, text in found if label not in held and "Not offered." not in text] == []
    spelt = [code for _, text in found for code in re.findall(r"`([^`]*(?:tests/|::)[^`]*)`", text)]
    assert [code for code in spelt if not TEST.fullmatch(code)] == []
