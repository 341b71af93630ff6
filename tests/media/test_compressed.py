"""Sound in few bytes: it is the sound that was given, at a rate that MP3 knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selva.media import compress_sound, read_audio


@pytest.mark.parametrize(("rate", "channels", "rate_there"),
                         [(16_000, 1, 16_000), (44_100, 2, 44_100), (37_000, 1, 44_100)])
def test_a_tone_stays_a_tone_of_its_length(tmp_path, rate, channels, rate_there):
    tone = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(2 * rate) / rate).expand(channels, -1)
    (tmp_path / "a.mp3").write_bytes(compress_sound(tone, rate))
    sound, found = read_audio(tmp_path / "a.mp3")
    assert found == rate_there and len(sound) == channels
    assert abs(sound.shape[1] / found - 2) < 0.06  # MP3 pads to frames of 24 to 72 ms
    spectrum = np.abs(np.fft.rfft(sound[0].numpy()))
    assert abs(np.fft.rfftfreq(sound.shape[1], 1 / found)[spectrum.argmax()] - 1000) < 2
    assert 0.4 < sound.abs().max() < 0.6


def test_eight_seconds_are_small_even_if_they_are_noise():
    assert len(compress_sound(torch.randn(8 * 44_100) * 0.2, 44_100)) < 70_000
    assert len(compress_sound(torch.zeros(8 * 16_000), 16_000)) < 45_000


@pytest.mark.parametrize("sound", [torch.zeros(0), torch.full((100,), float("nan")), torch.zeros(3, 100)])
def test_what_is_no_sound_is_refused(sound):
    with pytest.raises(ValueError, match="expected 1 or 2 channels"):
        compress_sound(sound, 16_000)
