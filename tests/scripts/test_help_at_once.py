"""Help, and a mistake that can be seen without reading anything, are answered before PyTorch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchaudio", "transformers", "open_clip", "av", "matplotlib", "scipy", "tensordict")

# exit code, command line
MISTAKES = {
    "train_lora": [
        (2, "--data_dir . --ranks 4"),
        (2, "--data_dir . --rank four"),
        (2, "--data_dir . --rank 0"),
        (2, "--data_dir . --variant huge"),
        (2, "--data_dir missing"),
        (2, "--data_dir . --config missing.yaml"),
        (1, "--data_dir . --variant small_16k --selva_dir missing"),
    ],
    "scripts.train_base": [
        (2, "--data . --batch_size many"),
        (2, "--data missing"),
        (2, "--data .:0"),
        (2, "--data . --init missing.pth"),
        (1, "--data . --variant small_16k --selva_dir missing"),
    ],
    "infer": [
        (2, "--prompt rain --solvers euler"),
        (2, "--prompt rain --num_steps few"),
        (2, "--prompt rain --num_steps 0"),
        (2, "--prompt rain --cfg_interval 1 0"),
        (2, "--video missing.mp4"),
        (2, "--features missing.npz"),
        (2, "--prompt rain --adapter missing.pt"),
        (1, "--prompt rain --variant small_16k --selva_dir missing"),
        (1, f"{__file__} --prompt rain --variant large_44k"),
    ],
    "extract_features": [
        (2, ". --output_dir out --masks x"),
        (2, ". --output_dir out --duration long"),
        (2, ". --output_dir out --duration 0.1"),
        (2, ". --output_dir out --shard 3/2"),
        (2, "missing.mp4 --output_dir out"),
        (2, "missing --output_dir out"),
        (1, ". --output_dir out --variant small_16k --selva_dir missing"),
        (1, f"{__file__} --output_dir out --recordings . --captions {__file__} --variant small_16k"),
    ],
    "partition_clips": [
        (2, "--data_dir . --output_dir out --silent"),
        (2, "--data_dir . --output_dir out --start first"),
        (2, "--data_dir . --output_dir out --val_fraction 1"),
        (2, "--data_dir missing --output_dir out"),
    ],
}

RUN = """
import contextlib, io, sys
import {script}
for code, line in {cases}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        found = {script}.main(line.split())
    assert found == code, (line, found, err.getvalue())
    assert (out if code == 0 else err).getvalue().strip(), line
    heavy = [name for name in {heavy} if name in sys.modules]
    assert not heavy, (line, heavy)
"""


@pytest.mark.parametrize("script", MISTAKES)
def test_nothing_heavy_is_imported_for_help_and_for_mistakes(script, tmp_path):
    cases = [(0, "--help"), (0, "--version"), *MISTAKES[script]]
    code = RUN.format(script=script, cases=cases, heavy=HEAVY)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())  # and nothing is written
