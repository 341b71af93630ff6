"""The tables of flags in docs/ are those of the settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts.update_docs import BEGIN, DOCS, END, TABLES, flags_block, main, tree_block
from selva.utils.settings import settings_of


def test_the_tables_are_up_to_date():
    assert main(["--check"]) == 0, "run `python scripts/update_docs.py`"


def test_a_stale_table_is_found_and_mended(tmp_path, capsys):
    docs = Path(shutil.copytree(DOCS, tmp_path / "docs"))
    page = docs / "training.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("| `--rank N` | 16 |", "| `--rank N` | 8 |"), encoding="utf-8")
    assert main(["--check", "--docs", str(docs)]) == 1
    assert capsys.readouterr().out.split() == [str(page)] and page.read_text(encoding="utf-8") != text
    assert main(["--docs", str(docs)]) == 0
    assert page.read_text(encoding="utf-8") == text  # and nothing around the table has changed
    assert main(["--check", "--docs", str(docs)]) == 0


def test_a_page_without_a_place_for_its_flags_is_named(tmp_path, capsys):
    for name in TABLES:
        (tmp_path / name).write_text("# A page\n", encoding="utf-8")
    assert main(["--docs", str(tmp_path)]) == 1
    assert "training.md: has no place for its tables" in capsys.readouterr().err


@pytest.mark.parametrize("config", TABLES.values(), ids=lambda config: config.__name__)
def test_every_setting_has_a_row_of_its_own(config: type):
    lines = flags_block(config).splitlines()
    assert lines[0] == BEGIN and lines[-1] == END
    for setting in settings_of(config):
        start = f"| `{setting.info.metavar} ..." if setting.info.positional else f"| `--{setting.name}"
        rows = [line for line in lines if line.startswith((f"{start}`", f"{start} ", f"{start}/"))]
        assert len(rows) == 1 and setting.info.help.replace("|", "\\|") in rows[0], setting.name


def test_tables_hold_bars_and_choices():
    block = flags_block(TABLES["training.md"])
    assert "| `--init standard\\|pissa` | `standard` |" in block and "| `--preview/--no_preview` | on |" in block


def test_the_tree_has_a_line_for_every_file(tmp_path):
    for path, text in (("a.py", '"""A script.\n\nMore."""'), ("selva/__init__.py", '"""The library."""'),
                       ("selva/x/__init__.py", '"""A room: of things."""'), ("selva/x/b.py", '"""Of b. More."""')):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n", encoding="utf-8")
    lines = [line for line in tree_block(tmp_path).splitlines() if line][1:-1]
    assert lines == ["**The command line**", "- `a.py` A script", "**`selva/`** The library",
                     "**`selva/x/`** A room: of things", "- `b.py` Of b"]
    (tmp_path / "selva" / "x" / "c.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"c\.py: has no docstring"):
        tree_block(tmp_path)
