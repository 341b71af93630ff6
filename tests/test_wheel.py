"""The wheel holds everything that a user needs, and its scripts run outside of a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("partition_clips.py", "extract_features.py", "train_lora.py", "infer.py", "scripts/download_weights.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of what is packaged: building leaves folders behind.
    (folder / "scripts").mkdir()
    for name in ("selva", "toyworld", *SCRIPTS, "selva_lora.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(folder / name)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = (folder / "out").glob("*.whl")
    return path


def test_what_is_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"selva/py.typed", "selva/weights/assets/tiny_16k_generator.safetensors", "toyworld/scene.py"} <= names
    assert {name.rpartition("/")[2] for name in names if ".data/scripts/" in name} == {
        name.rpartition("/")[2] for name in SCRIPTS}
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name and ".data" not in name}
    assert packages == {"selva", "toyworld", "selva_lora.py"}
    sources = (path for package in ("selva", "toyworld") for path in (ROOT / package).rglob("*.py"))
    missing = [str(path.relative_to(ROOT)) for path in sources if str(path.relative_to(ROOT)) not in names]
    assert not missing


def test_it_runs_outside_of_the_checkout(wheel, tmp_path):
    place, work = tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    install = ["pip", "install", "-q", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}

    def run(*command: str, code: int = 0) -> str:
        result = subprocess.run([sys.executable, *command], cwd=work, env=environment, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        return result.stderr if code else result.stdout

    assert "--data_dir" in run(str(place / "bin" / "train_lora.py"), "--help")
    imported = run("-c", "import selva; from selva import SoundGenerator; print(selva.__file__)").strip()
    assert Path(imported).is_relative_to(place)
    # What a message tells people to do works here too, where there is no folder scripts/.
    error = run(str(place / "bin" / "infer.py"), "--prompt", "rain", "--variant", "small_16k", code=1)
    assert "fetch with: download_weights.py --variant small_16k --selva_dir DIR" in error
    listed = run(str(place / "bin" / "download_weights.py"), "--variant", "small_16k", "--selva_dir", "no", "--list")
    assert "generator_small_16k_sup_5.pth" in listed
    made = run(str(place / "bin" / "infer.py"), "--prompt", "rain", "--variant", "tiny_16k", "--duration", "1",
               "--num_steps", "2").split()
    assert made == [str(Path("output") / "rain.flac")] and (work / made[0]).stat().st_size > 1000
