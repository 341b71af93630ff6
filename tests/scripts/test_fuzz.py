"""A short campaign over damaged files of every kind: all are read or refused, nothing else happens."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import fuzz_files

    return fuzz_files


def test_a_short_campaign_finds_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "fuzz.py"), "--media", "16", "--small", "34", "--seed", "3",
               "--keep", str(tmp_path / "found"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    for kind, count in (("media", 16), ("small", 34)):
        counts = re.search(rf"{kind}: {count} files, (\d+) ok, (\d+) refused, 0 traceback", done.stdout)
        assert counts and int(counts[1]) + int(counts[2]) == count and int(counts[2]) > count / 5
    assert not (tmp_path / "found").exists()


def test_good_files_are_of_every_kind_and_the_same_seed_damages_alike(files, tmp_path):
    names = files.make_good_files(tmp_path / "good")
    assert set(files.SMALL) <= set(names) and {"video.mp4", "video.mkv", "sound.wav", "sound.flac"} <= set(names)
    good = [tmp_path / "good" / name for name in ("features.npz", "settings.yaml", "sound.wav")]
    for path in good:
        results = []
        for number in range(10):
            for _ in range(2):
                copy = Path(shutil.copy(path, tmp_path / path.name))
                files.damage(random.Random(number), copy, good, tmp_path / "marker")
                results.append(copy.read_bytes())
        assert results[::2] == results[1::2] and len(set(results)) > 5
    assert not (tmp_path / "marker").exists()
