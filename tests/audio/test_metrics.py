"""Numbers about sounds against closed forms: sines, white noise, gains, click trains and impacts."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from selva.audio import metrics
from selva.audio.metrics import (
    cepstra,
    compare_sounds,
    log_spectral_distance,
    match_events,
    mel_cepstral_distortion,
    onset_strength,
    onset_times,
    power_frames,
    spectral_shape,
)

RATES = [16_000, 44_100]


def sine(frequency, rate=16_000, seconds=2.0, level=0.5):
    return level * torch.sin(2 * math.pi * frequency * torch.arange(round(seconds * rate)).double() / rate).float()


def white(rate=16_000, seconds=4.0, level=0.1, seed=0):
    return level * torch.randn(round(seconds * rate), generator=torch.Generator().manual_seed(seed))


def impacts(times, rate, rng, background_db=None, seconds=6.0):
    """Decaying modes or noise bursts, up to 20 dB apart in level, at ``times``."""
    sound, t = np.zeros(round(seconds * rate)), np.arange(rate) / rate
    for time in times:
        if rng.random() < 0.3:
            hit = rng.standard_normal(rate) * np.exp(-t / rng.uniform(0.02, 0.15))
        else:
            modes = zip(rng.uniform(100, 5000, 4), rng.uniform(0.03, 0.25, 4), strict=True)
            hit = sum(np.sin(2 * np.pi * f * t + rng.uniform(0, 6)) * np.exp(-t / decay) for f, decay in modes)
        start = round(time * rate)
        sound[start : start + rate] += 0.1 * 10 ** rng.uniform(-1, 0) * hit[: len(sound) - start]
    if background_db is not None:
        sound += sound.std() * 10 ** (background_db / 20) * rng.standard_normal(len(sound))
    return torch.from_numpy(sound).float()


# ---------------------------------------------------------------------------------------------------------------
# spectra
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("frequency", [200.0, 1234.5, 5000.0])
def test_a_sine_has_its_frequency_as_centroid_and_rolloff(rate, frequency):
    shape = spectral_shape(sine(frequency, rate), rate)
    resolution = rate / 2 ** round(math.log2(0.05 * rate))
    assert shape.centroid_hz == pytest.approx(frequency, abs=resolution)  # the cuts at both ends spread a little
    assert shape.rolloff_hz == pytest.approx(frequency, abs=2 * resolution)
    assert shape.flatness < 1e-3


def test_two_sines_have_the_centroid_of_their_powers():
    sound = sine(1000, level=0.4) + sine(4000, level=0.2)  # powers 4 : 1
    shape = spectral_shape(sound, 16_000)
    assert shape.centroid_hz == pytest.approx(1600, abs=10) and shape.rolloff_hz == pytest.approx(4000, abs=32)


@pytest.mark.parametrize("rate", RATES)
def test_white_noise_is_flat(rate):
    shape = spectral_shape(white(rate, seconds=10), rate)
    assert shape.flatness > 0.98
    assert shape.centroid_hz == pytest.approx(rate / 4, rel=0.02)
    assert shape.rolloff_hz == pytest.approx(0.85 * rate / 2, rel=0.02)


def test_power_of_a_full_scale_sine_is_one():
    power = power_frames(sine(1000, level=1.0), 16_000, 0.05)
    assert power[10].max().item() == pytest.approx(1.0, abs=1e-3)  # 1000 Hz is the middle of bin 64 of 1024


def test_shapes_do_not_depend_on_the_level():
    a, b = spectral_shape(white(), 16_000), spectral_shape(white(level=1e-3), 16_000)
    assert a.centroid_hz == pytest.approx(b.centroid_hz) and a.flatness == pytest.approx(b.flatness, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# distances
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [log_spectral_distance, mel_cepstral_distortion])
def test_identical_sounds_are_at_distance_zero_and_others_are_not(distance):
    a, b = white(seed=1), white(seed=2)
    assert distance(a, a, 16_000) == 0 and distance(a, b, 16_000) > 1
    assert distance(a, b, 16_000) == pytest.approx(distance(b, a, 16_000))


@pytest.mark.parametrize("gain_db", [-12.0, 3.0])
def test_a_gain_is_its_own_log_spectral_distance_and_no_cepstral_one(gain_db):
    sound = white()
    louder = sound * 10 ** (gain_db / 20)
    assert log_spectral_distance(sound, louder, 16_000) == pytest.approx(abs(gain_db), rel=1e-3)
    assert mel_cepstral_distortion(sound, louder, 16_000) < 1e-3


def test_what_lies_below_the_floor_counts_as_the_floor():
    assert log_spectral_distance(torch.zeros(16_000), torch.full((16_000,), 1e-9), 16_000) == 0


@pytest.mark.parametrize("order", [1, 5, 13, 14])
def test_a_ripple_over_the_bands_has_its_root_mean_square_as_distortion(order):
    """ln P changed by A cos(pi d (m + 1/2) / M): 10 / ln 10 * A / sqrt(2) dB, unless d is beyond 13."""
    ripple = 0.7 * torch.cos(math.pi * order * (torch.arange(80.0) + 0.5) / 80)[None]
    c = cepstra(torch.randn(1, 80) * 0 + ripple)
    found = (10 / math.log(10) * (2 * c.square().sum(dim=1)).sqrt()).item()
    expected = 10 / math.log(10) * 0.7 / math.sqrt(2) if order <= 13 else 0.0
    assert found == pytest.approx(expected, abs=1e-5)


def test_distortion_grows_with_a_change_of_colour():
    sound = white()
    spectrum = torch.fft.rfft(sound)
    tilts = [torch.fft.irfft(spectrum * torch.linspace(1, 10 ** (-db / 20), len(spectrum))) for db in (6, 20)]
    small, large = (mel_cepstral_distortion(sound, tilted, 16_000) for tilted in tilts)
    assert 0.3 < small < large


# ---------------------------------------------------------------------------------------------------------------
# onsets
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("background_db", [None, -20.0])
def test_impacts_are_found(rate, background_db):
    """More than 95 % within 30 ms, precision and recall together; and nothing systematic in the times."""
    rng = np.random.default_rng(7)
    pairs = events = 0
    offsets = []
    for _ in range(12):
        times = list(itertools.accumulate(rng.uniform(0.2, 0.9, 9)))
        times = [time for time in times if time < 5.9]
        match = match_events(onset_times(impacts(times, rate, rng, background_db), rate), times, 0.03)
        pairs, events = pairs + len(match.pairs), events + match.num_found + match.num_true
        offsets.append(match.mean_offset_sec)
    assert 2 * pairs / events > 0.95
    assert abs(np.mean(offsets)) < 0.01


def test_a_click_train_is_found_click_by_click():
    sound, times = torch.zeros(64_000), [0.5, 1.0, 1.5, 2.25, 2.35, 3.9]
    for time in times:
        sound[round(time * 16_000)] = 0.5
    found = onset_times(sound, 16_000)
    assert len(found) == len(times) and np.allclose(found, times, atol=0.02)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("colour", [0.0, 0.5])
@pytest.mark.parametrize("level", [0.5, 1e-2, 1e-4])
def test_steady_noise_has_no_onsets(rate, colour, level):
    """White noise, and pink noise whose low bands fluctuate more; its beginning and its end are no events either."""
    for seed in range(3):
        noise = white(rate, 8.0, 1.0, seed)
        spectrum = torch.fft.rfft(noise)
        spectrum = spectrum / torch.arange(len(spectrum)).clamp(min=160) ** colour
        noise = torch.fft.irfft(spectrum)
        assert onset_times(level * noise / noise.abs().max(), rate) == []


@pytest.mark.parametrize("frequency", [70.0, 440.0, 3000.0])
def test_a_steady_tone_has_no_onsets_and_its_start_is_one(frequency):
    tone = sine(frequency, seconds=2)
    assert onset_times(tone, 16_000) == []
    (found,) = onset_times(torch.cat([torch.zeros(16_000), tone]), 16_000)
    assert found == pytest.approx(1.0, abs=0.02)


def test_a_stroke_at_the_very_beginning_counts():
    sound = impacts([0.0, 1.0], 16_000, np.random.default_rng(1), seconds=2)
    assert np.allclose(onset_times(sound, 16_000), [0.0, 1.0], atol=0.03)


def test_onsets_do_not_depend_on_the_level():
    sound = impacts([0.5, 1.1, 2.0], 16_000, np.random.default_rng(3), seconds=3)
    assert len(onset_times(sound, 16_000)) == 3
    assert np.allclose(onset_times(sound, 16_000), onset_times(sound * 0.1, 16_000), atol=0.009)


def test_blocks_do_not_show(monkeypatch):
    sound = impacts([0.5, 1.1, 2.0], 16_000, np.random.default_rng(3), seconds=3)
    whole = onset_strength(sound, 16_000)
    monkeypatch.setattr("selva.audio.metrics.BLOCK_FRAMES", 100)
    for a, b in zip(whole, onset_strength(sound, 16_000), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("samples", [1, 100, 700])
def test_short_and_silent_sounds_have_none(samples):
    assert onset_times(torch.zeros(samples), 16_000) == [] and onset_times(torch.ones(samples), 16_000) == []


# ---------------------------------------------------------------------------------------------------------------
# matching
# ---------------------------------------------------------------------------------------------------------------


def brute_force(found, true, tolerance):
    """The most pairs, and the least sum of distances with so many, over all one-to-one matchings."""
    best = (0, 0.0)
    for size in range(1, min(len(found), len(true)) + 1):
        for chosen in itertools.combinations(range(len(found)), size):
            for partners in itertools.permutations(range(len(true)), size):
                distances = [abs(found[i] - true[j]) for i, j in zip(chosen, partners, strict=True)]
                if max(distances) <= tolerance:
                    best = max(best, (size, -sum(distances)))
    return best


def test_matching_is_the_best_there_is():
    rng = np.random.default_rng(0)
    for _ in range(60):
        found, true = rng.uniform(0, 0.5, rng.integers(0, 5)), rng.uniform(0, 0.5, rng.integers(0, 5))
        match = match_events(list(found), list(true), 0.1)
        assert len({i for i, _ in match.pairs}) == len({j for _, j in match.pairs}) == len(match.pairs)
        distances = [abs(found[i] - true[j]) for i, j in match.pairs]
        assert all(d <= 0.1 for d in distances)
        count, closeness = brute_force(found, true, 0.1)
        assert len(match.pairs) == count and sum(distances) == pytest.approx(-closeness)


def test_scores():
    match = match_events([0.10, 0.52, 0.9, 2.0], [0.5, 0.12, 3.0], 0.08)
    assert match.pairs == ((0, 1), (1, 0))
    assert (match.precision, match.recall, match.f1) == (2 / 4, 2 / 3, pytest.approx(4 / 7))
    assert match.mean_offset_sec == pytest.approx(0.0, abs=1e-12)


def test_a_found_event_serves_one_true_event_only():
    match = match_events([1.0], [0.95, 1.05], 0.08)
    assert len(match.pairs) == 1 and match.recall == 0.5


@pytest.mark.parametrize(
    ("found", "true", "scores"), [([], [], (1, 1, 1)), ([1.0], [], (0, 0, 0)), ([], [1.0], (0, 0, 0))]
)
def test_scores_without_events(found, true, scores):
    match = match_events(found, true)
    assert (match.precision, match.recall, match.f1) == scores and match.mean_offset_sec is None


# ---------------------------------------------------------------------------------------------------------------
# everything at once
# ---------------------------------------------------------------------------------------------------------------


def test_a_sound_is_its_own_best_match():
    sound = impacts([0.5, 1.1, 2.0], 16_000, np.random.default_rng(3), seconds=3)
    result = compare_sounds(sound, sound, 16_000)
    assert result["log_spectral_distance_db"] == result["mel_cepstral_distortion_db"] == 0
    assert result["onset_precision"] == result["onset_recall"] == result["onset_f1"] == 1
    assert result["onset_offset_sec"] == 0 and result["num_onsets"] == 3 and result["duration_sec"] == 3


def test_onsets_in_other_places_do_not_agree():
    rng = np.random.default_rng(3)
    sound, other = (impacts(times, 16_000, rng, seconds=3) for times in ([0.5, 1.1, 2.0], [0.5, 1.4, 2.6]))
    result = compare_sounds(sound, other, 16_000)
    assert result["onset_precision"] == result["onset_recall"] == result["onset_f1"] == pytest.approx(1 / 3)


def test_levels_of_a_sine():
    result = compare_sounds(sine(997, level=0.1), None, 16_000)
    assert result["rms_db"] == pytest.approx(-23.01, abs=0.01) and result["lufs"] == pytest.approx(-23.01, abs=0.1)
    assert result["true_peak_db"] == pytest.approx(-20, abs=0.1)
    assert not any(key.startswith(("onset_", "log_", "mel_")) for key in result)


def test_silence_has_no_numbers_but_can_be_written():
    result = compare_sounds(torch.zeros(8000), torch.zeros(8000), 16_000)
    for key in ("rms_db", "lufs", "true_peak_db", "centroid_hz", "rolloff_hz", "flatness", "onset_offset_sec"):
        assert result[key] is None
    assert result["onset_f1"] == 1
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("level", [0, 1e-6])
@pytest.mark.parametrize("silent_one", ["sound", "reference"])
def test_a_silent_sound_has_no_distances(level, silent_one):
    loud, silent = white(seconds=1), white(seconds=1) * level
    sound, reference = (silent, loud) if silent_one == "sound" else (loud, silent)
    result = compare_sounds(sound, reference, 16_000)
    assert result["log_spectral_distance_db"] is None and result["mel_cepstral_distortion_db"] is None
    assert result["onset_precision"] is not None


def test_a_faint_sound_has_distances():
    sound = white(seconds=1)
    assert compare_sounds(sound, sound * 1e-2, 16_000)["log_spectral_distance_db"] == pytest.approx(40, abs=1)


def test_the_common_beginning_is_compared():
    sound = white(seconds=2)
    result = compare_sounds(sound, sound[:20_000], 16_000)
    assert result["log_spectral_distance_db"] == 0 and result["duration_sec"] == 2
    assert compare_sounds(sound[:20_000], sound, 16_000)["log_spectral_distance_db"] == 0


@pytest.mark.parametrize(
    ("sound", "message"),
    [(torch.zeros(2, 100), r"\(2, 100\), expected"), (torch.zeros(0), "at least one"),
     (torch.tensor([0.0, math.nan]), "NaN"), (torch.tensor([0.0, math.inf]), "infinite")],
)
def test_what_is_no_sound(sound, message):
    with pytest.raises(ValueError, match=message):
        compare_sounds(sound, None, 16_000)
    with pytest.raises(ValueError, match=message):
        compare_sounds(torch.zeros(10), sound, 16_000)


# ---------------------------------------------------------------------------------------------------------------
# long sounds: piece by piece, with the values of all at once
# ---------------------------------------------------------------------------------------------------------------


def strength_at_once(waveform, rate):
    """Return what `onset_strength` is defined as, of all frames together."""
    size = power_frames(waveform, rate, 0.032, 0.004, padded=False).shape[1]
    to_bands = metrics._mel_bands(size, rate, 40, 60.0, min(8000.0, rate / 2))
    bands = power_frames(waveform, rate, 0.032, 0.004, padded=False) @ to_bands
    level = 10 * bands.clamp(min=1e-30).log10()
    floor = max(-95.0, level.max().item() - 60.0)
    level = level.clamp(min=floor)
    before = torch.cat([level[:125].median(dim=0).values.expand(8, -1), level])[: len(level)]
    rise = (level - before).clamp(min=0)
    above = (bands - 10 ** (floor / 10)).clamp(min=0)
    share = above / above.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.maximum(rise.mean(dim=1) / 5.0, (share * rise).sum(dim=1) / 12.0).numpy()


def times_at_once(waveform, rate):
    """Return what `onset_times` is defined as: every frame against every peak so far, medians of all windows."""
    strength, frame_times = strength_at_once(waveform, rate), onset_strength(waveform, rate)[1]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(strength, 125, mode="symmetric"), 251)
    strength = strength - np.median(windows, axis=1)
    peaks = []
    for frame in np.argsort(-strength, kind="stable"):
        if strength[frame] >= 1 and all(abs(frame - other) > 15 for other in peaks):
            peaks.append(frame)
    times = []
    for frame in sorted(peaks):
        first, threshold = frame - 8, 0.75 * strength[frame]
        while frame > max(0, first) and strength[frame - 1] >= threshold:
            frame -= 1
        times.append(float(frame_times[frame]))
    return times


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("block", "seconds"), [(7, 0.5), (100, 3.0), (1024, 9.0)])
def test_pieces_give_the_onsets_of_all_at_once(monkeypatch, rate, block, seconds):
    monkeypatch.setattr(metrics, "BLOCK_FRAMES", block)
    rng = np.random.default_rng(block)
    sound = impacts(np.arange(0.1, seconds - 0.1, 0.17), rate, rng, background_db=-30, seconds=seconds)
    strength, _ = onset_strength(sound, rate)
    np.testing.assert_allclose(strength, strength_at_once(sound, rate), rtol=1e-12, atol=1e-12)
    times = onset_times(sound, rate)
    assert times == times_at_once(sound, rate) and len(times) > 1


@pytest.mark.parametrize("samples", [1, 500, 5000, 40_000])
def test_pieces_give_the_spectra_of_all_at_once(monkeypatch, samples):
    sound, other = white(seconds=samples / 16_000), white(seconds=samples / 16_000, seed=1)
    whole = compare_sounds(sound, other, 16_000)
    frames = power_frames(sound, 16_000, 0.05)
    monkeypatch.setattr(metrics, "BLOCK_FRAMES", 3)
    torch.testing.assert_close(power_frames(sound, 16_000, 0.05), frames, rtol=1e-10, atol=1e-18)  # of the FFT
    for key, value in compare_sounds(sound, other, 16_000).items():
        assert value == whole[key] or value == pytest.approx(whole[key], rel=1e-12, abs=1e-12), key


def test_no_more_frames_are_held_than_a_block(monkeypatch):
    largest, transform = [], torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda frames: (largest.append(len(frames)), transform(frames))[1])
    compare_sounds(white(seconds=30), white(seconds=30, seed=1), 16_000)
    assert max(largest) == metrics.BLOCK_FRAMES and sum(largest) > 5 * metrics.BLOCK_FRAMES


def match_at_once(found, true, tolerance):
    """Return (pairs, sum of distances) of the best matching by the whole table."""
    found, true = sorted(found), sorted(true)
    best = [[(0, 0.0)] * (len(true) + 1) for _ in range(len(found) + 1)]
    for i, f in enumerate(found, 1):
        for j, t in enumerate(true, 1):
            best[i][j] = max(best[i - 1][j], best[i][j - 1])
            if abs(f - t) <= tolerance + 1e-9:
                pairs, closeness = best[i - 1][j - 1]
                best[i][j] = max(best[i][j], (pairs + 1, closeness - abs(f - t)))
    return best[-1][-1]


@pytest.mark.parametrize("tolerance", [0.0, 0.08, 0.5, 10.0])
def test_a_band_of_the_table_gives_the_matching_of_all_of_it(tolerance):
    rng = np.random.default_rng(0)
    for _ in range(200):
        found, true = (rng.uniform(0, rng.uniform(0.2, 3), rng.integers(0, 15)).round(2).tolist() for _ in range(2))
        match = match_events(found, true, tolerance)
        count, closeness = match_at_once(found, true, tolerance)
        assert len(match.pairs) == count
        assert sum(abs(found[f] - true[t]) for f, t in match.pairs) == pytest.approx(-closeness, abs=1e-9)
        assert all(abs(found[f] - true[t]) <= tolerance + 1e-9 for f, t in match.pairs)


def test_an_hour_of_events_takes_no_table_of_all_pairs():
    times = [0.1 * number for number in range(36_000)]  # the whole table would have 1.3 billion cells
    match = match_events([time + 0.01 for time in times], times)
    assert len(match.pairs) == 36_000 and match.mean_offset_sec == pytest.approx(0.01)
