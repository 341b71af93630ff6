"""The data summary: measurements against closed forms, and what it warns of."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from make_data import TINY, noise, put_clip, put_sound

from selva.data import summary as data_summary
from selva.data.folder_dataset import FolderDataset, load_clip_dataset
from selva.data.summary import measure_sound, summarise


def tone(seconds=2.0, rate=48_000, level=1.0, frequency=997.0):
    return (level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def summary_of(folder):
    clips, problems = load_clip_dataset(folder, TINY, None, torch.device("cpu"))
    assert isinstance(clips, FolderDataset)
    return summarise(clips, problems)


@pytest.mark.parametrize("level", [0.5, 0.01])
def test_loudness_is_that_of_the_standard(tmp_path, level):
    """BS.1770: a 997 Hz sine at full scale in one channel is -3.01 LUFS."""
    put_sound(tmp_path / "a.wav", tone(level=level), 48_000)
    stats = measure_sound(tmp_path / "a.wav")
    assert stats.loudness_lufs == pytest.approx(-3.01 + 20 * math.log10(level), abs=0.05)
    assert stats.peak_db == pytest.approx(20 * math.log10(level), abs=0.01)
    assert (stats.duration_sec, stats.rate, stats.channels) == (2, 48_000, 1)
    assert stats.silent_share == stats.clipped_samples == 0


def test_silence_is_counted_in_blocks(tmp_path):
    sound = tone(4.0)
    sound[48_000:] *= 1e-4
    put_sound(tmp_path / "a.wav", sound, 48_000)
    assert measure_sound(tmp_path / "a.wav").silent_share == pytest.approx(0.75)
    put_sound(tmp_path / "b.wav", sound * 0, 48_000)
    nothing = measure_sound(tmp_path / "b.wav")
    assert (nothing.loudness_lufs, nothing.peak_db, nothing.silent_share) == (None, None, 1.0)


def test_only_runs_at_full_scale_are_clipped(tmp_path):
    sound = tone(level=0.5)
    sound[[10, 20, 21]] = 1.0
    put_sound(tmp_path / "a.wav", sound, 48_000)
    assert measure_sound(tmp_path / "a.wav").clipped_samples == 0
    sound[100:104] = -1.0
    sound[200:203] = 1.5
    put_sound(tmp_path / "a.wav", sound, 48_000)
    assert measure_sound(tmp_path / "a.wav").clipped_samples == 7


def test_sounds_of_any_shape_are_measured(tmp_path):
    put_sound(tmp_path / "short.wav", tone(0.1), 48_000)
    assert measure_sound(tmp_path / "short.wav").loudness_lufs is None
    put_sound(tmp_path / "tiny.wav", np.ones(2, np.float32), 48_000)
    assert measure_sound(tmp_path / "tiny.wav").clipped_samples == 0
    put_sound(tmp_path / "many.wav", np.repeat(tone()[:, None], 6, axis=1), 48_000)
    many = measure_sound(tmp_path / "many.wav")
    assert many.channels == 6 and many.loudness_lufs == pytest.approx(-3.01 + 10 * math.log10(6), abs=0.05)


def test_everything_odd_is_named(tmp_path):
    data = tmp_path / "knocks"
    put_clip(data, "a", seed=1)
    put_clip(data, "b", seed=2)
    shutil.copy2(data / "a.wav", data / "b.wav")
    put_clip(data, "c", seed=3, prompt="", sound=np.concatenate([noise(0.2), np.zeros(20_000, np.float32)]))
    put_clip(data, "d", seed=4, sound=np.clip(noise(1.1) * 100, -1, 1))
    put_clip(data, "e", seed=5, sound=tone(1.1, 8_000, 0.0025), rate=8_000)
    put_clip(data, "f", seed=5, seconds=1.0)
    put_clip(data, "g", seed=7, seconds=9.0)
    put_sound(data / "lonely.wav", noise(1))
    summary = summary_of(data)
    warnings = "\n".join(summary.warnings())
    for text in (
        "the same sound in a, b", "the same video in e, f", "1 clip: mostly silence: c", "1 clip: clipped sound: d",
        "1 clip: quieter than -50 LUFS, so its noise floor is trained too: e", "below the 16000 Hz of the model",
        "the name of the folder is used: c", "longer than 8 s, trained on in windows: g",
    ):
        assert text in warnings
    assert len(summary.warnings()) == 8
    text = "\n".join(summary.lines())
    assert "7 clips, 15 s in all, trained at 1 to 8 s, 1 file left out" in text
    assert "'a knock' x 6 (from features), 'knocks' x 1 (from folder)" in text
    assert max(map(len, summary.lines())) < 120
    stored = json.loads(summary.to_json())
    assert stored["left_out"][0][0].endswith("lonely.wav") and [c["id"] for c in stored["clips"]] == list("abcdefg")
    assert stored["clips"][6]["num_windows"] == 4 and stored["clips"][0]["sound"]["rate"] == 16_000


def test_clean_data_give_no_warnings_and_are_measured_once(tmp_path, monkeypatch):
    for seed in range(3):
        put_clip(tmp_path / "data", f"clip{seed}", seed=seed)
    measured = []
    original = measure_sound
    monkeypatch.setattr(data_summary, "measure_sound", lambda path: measured.append(path.name) or original(path))
    first = summary_of(tmp_path / "data")
    assert first.warnings() == [] and len(measured) == 3
    assert summary_of(tmp_path / "data") == first and len(measured) == 3
    put_sound(tmp_path / "data" / "clip1.wav", noise(1.2, seed=9))
    assert summary_of(tmp_path / "data") != first and measured[3:] == ["clip1.wav"]


def test_nothing_usable(tmp_path):
    put_sound(tmp_path / "lonely.wav", noise(1))
    summary = summary_of(tmp_path)
    assert summary.lines() == ["no usable clips, 1 file left out"] and summary.warnings() == []
