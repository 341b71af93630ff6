"""Silence: which blocks count, and that a recording read in pieces gives what it gives as a whole."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from make_data import noise

from selva.audio import silence
from selva.audio.silence import find_silence, silent_share
from selva.media import audio_blocks


def put(path, sound, rate):
    soundfile.write(path, sound, rate, subtype="FLOAT")
    return path


def test_the_threshold_is_the_level_of_a_block():
    tone = torch.sin(torch.arange(16_000) / 5)[None] * 2**0.5  # RMS 1
    assert silent_share(tone * 10 ** (-59.9 / 20), 16_000) == 0
    assert silent_share(tone * 10 ** (-60.1 / 20), 16_000) == 1
    assert silent_share(tone * 10 ** (-60.1 / 20), 16_000, silence_db=-61) == 0


def test_steady_sound_is_no_silence():
    """Pitfall J1: rain hardly changes its level."""
    assert silent_share(0.005 * torch.randn(1, 48_000), 16_000) == 0


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100])
def test_silent_stretches_are_found_where_they_are(tmp_path, rate, monkeypatch):
    monkeypatch.setattr(silence, "READ_SEC", 0.37)
    sound = noise(6, rate)
    sound[2 * rate : 5 * rate] = 0
    found = find_silence(put(tmp_path / "a.wav", sound, rate))
    assert found.num_samples == len(sound)
    np.testing.assert_allclose(found.share(np.array([0, 2 * rate, 5 * rate]), rate), [0, 1, 0], atol=0.051)
    assert found.share(rate, 2 * rate) == pytest.approx(0.5, abs=0.03)
    assert found.share(0, 6 * rate) == pytest.approx(0.5, abs=0.02)


def test_pieces_and_channels_do_not_change_the_result(tmp_path, monkeypatch):
    sound = np.stack([noise(5), np.zeros(80_000, np.float32)], axis=1) * (np.arange(80_000) // 9_000 % 2)[:, None]
    path = put(tmp_path / "a.wav", sound.astype(np.float32), 16_000)
    whole = find_silence(path)
    monkeypatch.setattr(silence, "READ_SEC", 0.123)
    starts = np.arange(0, 60_000, 777)
    np.testing.assert_array_equal(find_silence(path).share(starts, 16_000), whole.share(starts, 16_000))
    assert 0.3 < whole.share(0, 80_000) < 0.7


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of this process from Linux")
def test_memory_does_not_grow_with_the_recording(tmp_path):
    """15 minutes are 173 MB as float32."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(900 * 48_000, np.int16), 48_000)

    def megabytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    next(audio_blocks(path))
    before = megabytes()
    find_silence(path)
    assert megabytes() - before < 60
