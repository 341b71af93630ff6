"""The quickstart without running its steps: its shells call one Python script, whose flags exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart.sh"


def bash(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_help_explains_and_does_nothing():
    done = bash("--help")
    assert done.returncode == 0 and "--fast" in done.stdout and "report.html" in done.stdout


def test_an_unknown_option_is_wrong_usage():
    done = bash("--quick")
    assert done.returncode == 2 and "--quick" in done.stderr


@pytest.fixture
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT.with_suffix(".py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_step_has_flags_that_exist_and_a_failed_one_ends_it(quickstart, tmp_path, monkeypatch, capsys):
    lines = []

    def called(words, **_):
        lines.append(words[1:])
        return subprocess.CompletedProcess(words, returncode=int("make_report" in words[1]))

    monkeypatch.setattr(quickstart.subprocess, "run", called)
    assert quickstart.main(["--fast", "--sound", "bird", "--out", str(tmp_path / "my out")]) == 1
    assert "this step failed" in capsys.readouterr().err
    assert [Path(words[0]).stem for words in lines] == [
        "make_demo_clips", "extract_features", "train_lora", "make_demo_clips", "infer", "infer", "make_report"]
    notes = (tmp_path / "my out" / "bird_fast" / "commands.txt").read_text()
    assert notes.count("python ") == 6 and '"' in notes  # the page lists what made it, quoted where it has to be
    for words in lines:
        source = (SCRIPT.parents[1] / words[0]).read_text()
        flags = [word for word in words if word.startswith("--")]
        known = source + "".join(path.read_text() for path in (SCRIPT.parents[1] / "selva").rglob("config.py"))
        known += (SCRIPT.parents[1] / "selva" / "cli.py").read_text()
        assert all(re.search(rf"\b{flag[2:]}\b", known) for flag in flags), (words, flags)


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_both_shells_have_the_same_scripts(name):
    shell, power = (SCRIPT.with_name(f"{name}.{suffix}").read_text() for suffix in ("sh", "ps1"))
    assert ("quickstart.py" if name == "quickstart" else "-m pytest") in shell
    assert ("quickstart.py" if name == "quickstart" else "-m pytest") in power
    assert "setup_env.sh" in shell and "setup_env.ps1" in power
