"""A short campaign over damaged files of every kind: all are read or refused, nothing else happens."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

from scripts.fuzz import damage

ROOT = Path(__file__).resolve().parents[2]


def test_a_short_campaign_finds_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "fuzz.py"), "--media", "16", "--small", "34", "--seed", "3",
               "--keep", str(tmp_path / "found"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    for kind, count in (("media", 16), ("small", 34)):
        counts = re.search(rf"{kind}: {count} files, (\d+) ok, (\d+) refused, 0 traceback", done.stdout)
        assert counts and int(counts[1]) + int(counts[2]) == count and int(counts[2]) > count / 5
    assert not (tmp_path / "found").exists()


def test_the_same_seed_damages_alike_and_runs_nothing(tmp_path):
    good = [tmp_path / name for name in ("features.npz", "settings.yaml", "sound.wav")]
    np.savez(good[0], prompt="a dog", x=np.zeros(30))
    good[1].write_text("prompt: a dog\nsteps: 3\n")
    soundfile.write(good[2], np.zeros(3000), 8000)
    for path in good:
        results = []
        for number in range(10):
            for _ in range(2):
                copy = Path(shutil.copy(path, tmp_path / f"copy{path.suffix}"))
                damage(random.Random(number), copy, good, tmp_path / "marker")
                results.append(copy.read_bytes())
        assert results[::2] == results[1::2] and len(set(results)) > 5
    assert not (tmp_path / "marker").exists()
