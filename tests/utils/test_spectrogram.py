"""The look of all pictures of sounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selva.utils.plots import new_figure
from selva.utils.spectrogram import NUM_PIXELS, RANGE_DB, draw_levels, from_mel, mel_levels, to_mel

RATE = 16_000


def tone(hertz: float) -> torch.Tensor:
    return torch.from_numpy(0.5 * np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE))


@pytest.mark.parametrize("hertz", [200.0, 1000.0, 4000.0])
def test_a_tone_is_at_its_place(hertz):
    image = mel_levels(tone(hertz), RATE)
    row = image.mean(axis=1).argmax() + 0.5
    assert from_mel(row / NUM_PIXELS * to_mel(RATE / 2)) == pytest.approx(hertz, rel=0.05)
    assert image.max() == pytest.approx(20 * np.log10(0.5), abs=1.5)


def test_axes_have_units_and_frequencies_where_they_belong():
    axes = new_figure(4, 2).subplots()
    image = draw_levels(axes, mel_levels(tone(1000.0), RATE), 1.0, RATE, -6.0)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("seconds", "kHz")
    places = dict(zip((label.get_text() for label in axes.get_yticklabels()), axes.get_yticks(), strict=True))
    assert from_mel(places["1"] / NUM_PIXELS * to_mel(RATE / 2)) == pytest.approx(1000)
    assert image.get_clim() == (-6.0 - RANGE_DB, -6.0) and image.get_cmap().name == "magma"
    assert "16" not in places


def test_silence_is_black_though_it_is_its_own_loudest_point():
    levels = mel_levels(torch.zeros(RATE), RATE)
    image = draw_levels(new_figure(4, 2).subplots(), levels, 1.0, RATE, float(levels.max()))
    assert image.norm(levels).max() == 0
