"""docs/python.md: its examples run in their order, and the functions refuse what they do not know."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_media import clicks, make_video

import selva
from selva.training.config import RunConfig
from selva.utils.errors import UserError
from selva.utils.settings import from_names

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"


def test_the_examples_run_in_their_order(tmp_path, monkeypatch, capsys):
    (tmp_path / "clips").mkdir()
    for number in range(2):
        sound = 0.3 * np.sin(np.arange(32_000) * (0.1 + 0.05 * number))
        make_video(tmp_path / "clips" / f"dog_{number}.mp4", 2.0, sound=sound[None].astype(np.float32))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5 and "steps=200" in blocks[1]
    for block in blocks:
        exec(block.replace("steps=200", "steps=2, preview=False, warmup_steps=0"), {})  # a test has no time for more
    out = capsys.readouterr().out
    assert "2 clips, 0 failed" in out and f"run{'/'}adapter_final.pt" in out and "0.0003 16" in out
    assert {path.name for path in (tmp_path / "sounds").iterdir()} >= {"dog_0.flac", "dog_0.mp4", "dog_1.flac"}
    assert (tmp_path / "dog.flac").is_file() and (tmp_path / "dog.mp4").is_file()


SCRIPT = """
import os
os.sched_getaffinity = lambda _pid: set(range(4))  # more cores than one, on any machine
import selva

def extract(**more):
    return selva.extract(inputs="clips", output_dir="out", prompt="a dog", duration=0.64, variant="tiny_16k", **more)

print([row["status"] for row in extract()])
try:
    extract(overwrite=True, workers=1)
except ValueError as error:
    print(error)
"""


def test_a_script_without_a_guard_works_or_is_told_of_it(tmp_path):
    """Every process that reads videos imports the main script: it must not extract there again."""
    (tmp_path / "clips").mkdir()
    for number in range(3):
        make_video(tmp_path / "clips" / f"dog_{number}.mp4", 0.8, sound=clicks([0.3], 0.9))
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    first, *others = done.stdout.splitlines()
    assert first == "['done', 'done', 'done']", done.stderr
    (second,) = others
    assert re.search(r"script\.py: a process that was to read videos has ended .* if __name__ == \"__main__\":", second)
    assert "selva.extract was called again by a process that only imports this script" in done.stderr


@pytest.mark.parametrize("settings, message", [
    ({"data": "."}, "unknown setting data; did you mean data_dir"),
    ({"data_dir": ".", "epochs": 3}, "unknown setting epochs; did you mean steps"),
    ({}, "data_dir is missing"),
    ({"data_dir": ".", "lr_schedule": "linear"}, "lr_schedule is 'linear', expected one of constant"),
    ({"data_dir": ".", "checkpoint_blocks": 0}, "checkpoint_blocks is 0, expected at least 1"),
])
def test_settings_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        selva.train(**settings)


def test_names_and_types_are_those_of_the_flags(tmp_path):
    config = from_names(RunConfig, {"data_dir": tmp_path, "network_dim": 4, "mixed_precision": "no",
                                    "preserve": "a bell", "target": ["attn.qkv", "linear1:2"]})
    assert config.data_dir == [str(tmp_path)] and config.lora.rank == 4 and config.precision == "fp32"
    assert list(config.preserve) == ["a bell"] and dict(config.lora.target_ranks or {}) == {"linear1": 2}
