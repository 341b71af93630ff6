"""Sounds: the frequencies that were asked for, at any rate, and none that fold back."""

from __future__ import annotations

import numpy as np
import pytest

from toyworld import make_scene, random_sound
from toyworld.sound import VIOLIN_HZ, band_noise, partials, sweep


def spectrum(sound: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray]:
    return np.fft.rfftfreq(len(sound), 1 / rate), np.abs(np.fft.rfft(sound))


def test_partials_lie_where_they_should_and_none_above_half_the_rate():
    hertz, level = spectrum(partials(16_000, 1.0, (500, 9000), (1, 1), (0.5, 0.5)), 16_000)
    assert hertz[level.argmax()] == pytest.approx(500, abs=1)
    assert level[hertz > 2000].max() < 0.02 * level.max()


def test_a_sweep_has_the_frequency_of_every_moment():
    rate = 16_000
    sound = sweep(rate, np.linspace(400, 800, rate))
    for begin, expected in ((0, 425), (rate * 7 // 8, 775)):
        hertz, level = spectrum(sound[begin : begin + rate // 8], rate)
        assert hertz[level.argmax()] == pytest.approx(expected, abs=30)


def test_noise_stays_in_its_band():
    hertz, level = spectrum(band_noise(np.random.default_rng(0), 16_000, 16_000, 1000, 2000), 16_000)
    inside = (hertz > 1000) & (hertz < 2000)
    assert np.square(level[inside]).sum() > 0.7 * np.square(level).sum()


def test_the_hum_of_a_fan_follows_its_speed():
    scene = make_scene(1, ["motor"])
    sound, thing = scene.sound(), scene.objects[0]
    for event in thing.events:
        assert event.end_sec is not None
        part = sound[int((event.time_sec + 0.05) * 16_000) : int(event.end_sec * 16_000)]
        hertz, level = spectrum(part, 16_000)
        speed = 0.7 + (2.2 - 0.7) * (event.strength - 0.5) / 0.5
        assert hertz[level.argmax()] == pytest.approx(75 / thing.size * speed, abs=16_000 / len(part) + 1)


def test_a_violin_holds_its_note_as_long_as_it_is_bowed():
    scene = make_scene(1, ["violin"])
    sound, thing = scene.sound(), scene.objects[0]
    for event in thing.events:
        assert event.end_sec is not None
        begin, end = round((event.time_sec + 0.05) * 16_000), round(event.end_sec * 16_000)
        note = VIOLIN_HZ / thing.size * 1.5 ** ((event.strength - 0.5) / 0.5)
        hertz, level = spectrum(sound[begin:end], 16_000)
        assert hertz[level.argmax()] == pytest.approx(note, rel=0.03)  # the vibrato is 1.2 %
        early, late = sound[begin : begin + 3200], sound[end - 3200 : end]
        assert np.square(late).mean() == pytest.approx(np.square(early).mean(), rel=0.2)


def test_no_two_steps_on_gravel_are_alike_and_none_has_a_pitch():
    scene = make_scene(1, ["gravel"])
    sound = scene.sound()
    steps = [sound[round(e.time_sec * 16_000) :][:3200] / e.strength for e in scene.objects[0].events]
    first, second = steps[:2]
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.3
    hertz, level = spectrum(np.concatenate(steps), 16_000)
    bands = np.square(level)[(hertz > 300) & (hertz < 2500)]
    assert bands.max() < 0.02 * bands.sum()
    struck = make_scene(1, ["bell"]).sound()
    tones = np.square(spectrum(struck, 16_000)[1])
    assert tones.max() > 0.02 * tones.sum()  # which a bell does have


def test_a_clip_sounds_the_same_at_another_rate():
    scene = make_scene(0, ["bell"], duration_sec=2.0)
    low, high = scene.sound(16_000), scene.sound(48_000)
    assert len(high) == 3 * len(low)
    bands = [np.abs(np.fft.rfft(sound))[: 2 * 4000].reshape(-1, 200).sum(axis=1) for sound in (low, high)]
    assert np.corrcoef(*bands)[0, 1] > 0.99


def test_random_sounds_are_of_the_right_kind():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sound = random_sound(rng, 2.0)
        assert sound.shape == (32_000,) and sound.dtype == np.float32 and 0.2 < np.abs(sound).max() < 0.96
