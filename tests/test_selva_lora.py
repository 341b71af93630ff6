"""selva_lora: another package called selva, such as the official one, is noticed before anything of it is used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import selva_lora

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for folder in (".", "scripts", "benchmarks") for path in (ROOT / folder).glob("*.py")
                 if "__main__" in path.read_text(encoding="utf-8"))


def run(place: Path, *before: Path) -> subprocess.CompletedProcess[str]:
    """Start a copy of infer.py, as pip installs it, with these folders to import from."""
    (place / "bin").mkdir(exist_ok=True)
    script = place / "bin" / "infer.py"
    script.write_bytes((ROOT / "infer.py").read_bytes())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, before))}
    return subprocess.run([sys.executable, str(script), "--version"], cwd=place, env=environment, capture_output=True,
                          text=True, timeout=120)


@pytest.mark.parametrize("with_init", [True, False])
def test_another_package_of_that_name_is_named(tmp_path, with_init):
    other = tmp_path / "SelVA" / "selva"
    (other / "utils").mkdir(parents=True)
    if with_init:
        (other / "__init__.py").write_text("raise RuntimeError('is not to be imported')\n")
    else:  # Python prefers a package with this file, wherever it lies
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / "selva_lora.py").write_bytes((ROOT / "selva_lora.py").read_bytes())
    result = run(tmp_path, other.parent, ROOT if with_init else tmp_path / "ours")
    assert result.returncode == 1 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: Python finds another package called selva in {other}, ")
    assert "environment of its own" in line


def test_ours_is_not_complained_about(tmp_path):
    result = run(tmp_path, ROOT)
    assert result.returncode == 0 and result.stdout.startswith("selva-lora"), result.stderr


def test_every_script_looks_before_it_imports():
    assert len(SCRIPTS) > 15
    for path in SCRIPTS:
        first = re.search(r"^(?:from|import) (selva\w*|toyworld)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert path.name == "setup.py" or (first and first[1] == "selva_lora"), path


@pytest.mark.parametrize(("given", "expected"), [
    ({}, {"GOMP_SPINCOUNT": "20000"}),
    ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
])
def test_threads_wait_briefly_unless_the_user_has_said_how(given, expected):
    environment = dict(given)
    selva_lora.wait_briefly(environment)
    assert environment == expected


@pytest.mark.parametrize("script", ["train_lora.py", "infer.py", "extract_features.py", "scripts/train_base.py"])
def test_how_threads_wait_is_set_before_pytorch_is_loaded(script):
    """It is read once, when PyTorch is loaded, which shows it then."""
    code = f"import runpy; runpy.run_path({str(ROOT / script)!r}); import torch"
    unset = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    if "GOMP_" not in shown.stderr:
        pytest.skip("this PyTorch has another library of threads")
    assert "GOMP_SPINCOUNT = '20000'" in shown.stderr
