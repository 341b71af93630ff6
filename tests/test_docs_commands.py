"""What README and docs tell a reader to type: every command is understood, and every page runs from top to bottom.

A block that cannot run here (it needs the published weights, say) has the reason in a comment before it:
``<!-- not run: published weights -->``. Its flags are parsed all the same.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from documents import (
    PAGES,
    REASONS,
    ROOT,
    Command,
    blocks_of,
    broken_links,
    commands_of,
    fresh_folder,
    parser_of,
    shell_text,
)

RUN = ("bash", "python", "yaml")
COMMANDS = [command for page in PAGES for command in commands_of(page)]
BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.language]
# docs/python.md has a test of its own, which makes the clips that its reader has.
RUN_PAGES = [page for page in PAGES if page != "docs/python.md"
             and any(b.language in RUN and not b.reason for b in blocks_of(page))]


def arguments_of(command: Command) -> list[str]:
    """Return the arguments of a command without a settings file that the page itself makes."""
    given = list(command.arguments)
    if "--config" in given and not (ROOT / given[given.index("--config") + 1]).exists():
        at = given.index("--config")
        del given[at : at + 2]
    return given


def test_commands_are_found():
    scripts = {command.script for command in COMMANDS}
    assert {"train_lora.py", "infer.py", "extract_features.py", "partition_clips.py"} <= scripts
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.place} {Path(c.script).name}")
def test_every_documented_command_is_understood(command, monkeypatch, capsys):
    script = ROOT / command.script if (ROOT / command.script).exists() else ROOT / "scripts" / command.script
    assert script.exists(), f"{command.place} names {command.script}, which does not exist"
    if script.suffix == ".sh":
        text = script.read_text(encoding="utf-8")
        unknown = [word for word in command.arguments if word.startswith("--") and word not in text]
        assert unknown == [], f"{command.place}: {command.script} knows no {unknown}"
        return
    monkeypatch.chdir(ROOT)  # settings files are named from here
    parser, given = parser_of(str(script.relative_to(ROOT))), arguments_of(command)
    if "..." in given or "…" in given:  # shortened: what is there must exist
        names = [parser._underscored(word).partition("=")[0] for word in given if word.startswith("--")]
        assert [name for name in names if name not in parser._option_string_actions] == [], command.place
        return
    try:
        parser.parse_args(given)
    except SystemExit as stop:
        error = capsys.readouterr().err
        shortened = ":" not in command.place and "arguments are required" in error  # between backticks
        no_files = "no file fits" in error  # of a pattern, which is looked up at once
        if stop.code and not shortened and not no_files:
            pytest.fail(f"{command.place}: {command.script} {' '.join(given)}\n{error}")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=str)
def test_tests_and_presets_that_a_page_names_exist(block):
    named = re.findall(r"(?<![\w/])(?:tests|configs)/[\w./]+", block.text)
    assert [name for name in named if not (ROOT / name).exists()] == [], str(block)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.reason or b.language == "python"], ids=str)
def test_blocks_that_are_not_run_give_a_reason_and_are_valid(block):
    assert not block.reason or block.reason in REASONS
    if block.language == "python":
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("selva", "toyworld"):
                module = importlib.import_module(str(node.module))
                assert [a.name for a in node.names if not hasattr(module, a.name)] == [], str(block)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_documented_settings_files_are_understood(block, tmp_path, monkeypatch):
    (command,) = [c for c in commands_of(block.page) if c.place == str(block)]
    path = tmp_path / "settings.yaml"
    path.write_text(block.text, encoding="utf-8")
    parsed = parser_of(command.script).parse_args([*arguments_of(command), "--config", str(path)])
    assert set(yaml.safe_load(block.text)) <= set(vars(parsed))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the blocks are for bash")
@pytest.mark.parametrize("page", RUN_PAGES)
def test_every_page_runs_from_top_to_bottom(page, tmp_path):
    environment = fresh_folder(tmp_path)
    for block in blocks_of(page):
        if block.language not in RUN or block.reason:
            continue
        done = subprocess.run(shell_text(block, tmp_path), cwd=tmp_path, env=environment, capture_output=True,
                              text=True, timeout=900, check=False)
        assert done.returncode == 0, f"{block}\n{block.text}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
