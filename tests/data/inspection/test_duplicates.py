"""Near-duplicates: copies are found, sounds and videos that are only alike are not."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from torchaudio.functional import resample

from selva.data.inspection import duplicates
from selva.data.inspection.duplicates import (
    correlations,
    fine_fingerprint,
    motion_fingerprint,
    same_sounds,
    same_videos,
    sound_fingerprint,
    waveform_correlation,
)
from selva.media import read_audio
from toyworld import sound as toys

RATE = 16_000


def knocks(seed, seconds=4.0):
    """Return (1, samples): a few decaying tones at random times over a little noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    tones = sum(np.exp(-20 * np.clip(t - s, 0, None)) * np.sin(f * t) * (t >= s)
                for s, f in zip(rng.uniform(0, seconds, 5), rng.uniform(1000, 9000, 5), strict=True))
    return torch.tensor(0.2 * tones + 1e-3 * rng.standard_normal(len(t)), dtype=torch.float32)[None]


def rain(seed, seconds=4.0):
    return 0.1 * torch.randn(1, round(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def strokes(kind, seconds, size, seed):
    """Return (1, samples): two strokes of a thing of the toy world, always at the same moments."""
    rng = np.random.default_rng(seed)
    sound = 1e-4 * rng.standard_normal(round((seconds + 3) * RATE))
    for start in (0.5, 1.7):
        stroke = getattr(toys, kind)(RATE, size, rng.uniform(0.7, 1), rng)
        sound[round(start * RATE):][: len(stroke)] += 0.3 * stroke
    return torch.tensor(sound[: round(seconds * RATE)], dtype=torch.float32)[None]


def groups_of(sounds):
    """Return the groups of near-duplicates of [(waveform, rate)] as ``inspect`` looks for them."""
    fine = [fine_fingerprint(*item) for item in sounds]
    return same_sounds([sound_fingerprint(*item) for item in sounds],
                       closely=lambda one, other: waveform_correlation(fine[one], fine[other]))[0]


@pytest.mark.parametrize("kind", ["gong", "bell", "shaker", "drop"])
def test_strokes_of_two_things_at_the_same_moments_are_no_copies(kind):
    """A dark gong of 8 s and a bronze one of 3 s, struck twice at the same moments, were called nearly the same."""
    sounds = [(strokes(kind, 8, 1.0, 1), RATE), (strokes(kind, 3, 1.03, 2), RATE), (strokes(kind, 3, 0.95, 3), RATE)]
    alike = correlations([sound_fingerprint(*item) for item in sounds], 12)
    assert alike[0, 1] > 0.85 and groups_of(sounds) == []  # their levels alone do not tell them apart
    copy = (torchaudio.functional.bass_biquad(sounds[1][0], RATE, 6.0, 300.0)[:, 4_800:] * 0.2, RATE)
    assert [indices for indices, _ in groups_of([*sounds, copy])] == [(1, 3)]


def test_waveforms_are_compared_over_what_both_have_and_at_any_shift():
    whole = fine_fingerprint(rain(1), RATE)
    for part in (rain(1)[:, 4_800:], rain(1)[:, :24_000], -rain(1), torch.cat([torch.zeros(1, 4_800), rain(1)], dim=1)):
        fine = fine_fingerprint(part, RATE)
        assert waveform_correlation(whole, fine) > 0.95 and waveform_correlation(fine, whole) > 0.95
    assert waveform_correlation(whole, fine_fingerprint(rain(2), RATE)) < 0.1
    assert waveform_correlation(whole, fine_fingerprint(torch.zeros(1, 64_000), RATE)) == 0
    assert waveform_correlation(whole, fine_fingerprint(rain(1)[:, 11_200:], RATE)) < 0.1  # later than 0.3 s


def test_what_is_too_much_to_compare_closely_is_counted(monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_WAVEFORMS", 2)
    sounds = [sound_fingerprint(strokes("bell", 3, 1.0, seed), RATE) for seed in range(4)]
    assert same_sounds(sounds, closely=lambda _one, _other: 0.0) == ([], 4)
    assert [indices for indices, _ in same_sounds(sounds, closely=lambda _one, _other: 1.0)[0]] == [(0, 1, 2)]


@pytest.mark.parametrize("make", [knocks, rain])
def test_copies_are_found_whatever_was_done_to_them(make, tmp_path):
    sound = make(1)
    soundfile.write(tmp_path / "a.mp3", sound[0].numpy(), RATE)
    copies = [
        (sound, RATE), (sound * 0.05, RATE), read_audio(tmp_path / "a.mp3"), (resample(sound, RATE, 44_100), 44_100),
        (sound.repeat(2, 1), RATE), (sound[:, 1_600:], RATE), (sound[:, :48_000], RATE),
        (sound + 0.1 * sound.std() * torch.randn(sound.shape), RATE),
    ]
    others = [(make(seed), RATE) for seed in (2, 3, 4)]
    groups = groups_of([*others, *copies])
    assert [indices for indices, _ in groups] == [tuple(range(3, 11))]
    assert 0.85 <= groups[0][1] <= 1.001


def test_steady_sounds_and_silence_are_nobodys_copy():
    """Pitfall J1: two recordings of rain, of a hum, or of nothing are not the same clip."""
    hum = torch.sin(torch.arange(64_000) * 0.1)[None]
    phases = [torch.sin(torch.arange(64_000) * 0.1 + p)[None] for p in (1, 2)]
    gusts = [rain(seed) * (1.2 + torch.sin(torch.arange(64_000) / 16_000 + 1)) for seed in (7, 8)]
    sounds = [rain(1), rain(2), hum, *phases, *gusts, torch.zeros(1, 64_000), torch.zeros(1, 64_000), rain(3, 0.05)]
    assert same_sounds([sound_fingerprint(sound, RATE) for sound in sounds]) == ([], 0)
    assert same_sounds([]) == ([], 0)


def test_correlation_is_over_what_both_have():
    a = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    b = a[10:40] * 3
    plain, shifted = correlations([a, b, -a])[0, 1:], correlations([a, b, -a], 10)[0, 1:]
    assert plain[0] < 0.5 and shifted[0] == pytest.approx(1, abs=1e-5)
    assert plain[1] == 0
    np.testing.assert_array_equal(correlations([a, b], 12), correlations([a, b], 12).T)


def video(seed, scene=0, tokens=192):
    """Return CLIP features of a scene, and sync features with a pattern that repeats in every segment."""
    rng = torch.Generator().manual_seed(seed)
    common = torch.randn(8, 64, generator=torch.Generator().manual_seed(99)).repeat(tokens // 8, 1) * 3
    clip = torch.nn.functional.one_hot(torch.tensor(scene), 64) + 0.01 * torch.randn(64, generator=rng)
    return clip, common + torch.randn(tokens, 64, generator=rng)


def test_the_same_scene_with_another_movement_is_no_copy():
    videos = [video(1), video(2), video(3, scene=1), video(4)]
    clip, sync = videos[1]
    videos.append((clip + 0.01, sync + 0.3 * torch.randn(sync.shape)))  # encoded anew
    videos.append((clip + 5, sync))  # moves the same, shows something else
    videos.append((clip, sync[:96]))  # shorter
    groups = same_videos([c for c, _ in videos], [motion_fingerprint(s) for _, s in videos])
    assert [indices for indices, _ in groups] == [(1, 4, 6)]
    assert same_videos([], []) == []


def test_one_segment_says_nothing_about_movement():
    clip, sync = video(1, tokens=8)
    assert same_videos([clip, clip], [motion_fingerprint(sync)] * 2) == []


def test_groups_are_connected():
    from selva.data.inspection.duplicates import _groups

    similarity = np.zeros((6, 6), np.float32)
    for i, j, value in ((0, 3, 0.97), (3, 5, 0.96), (1, 2, 0.99)):
        similarity[i, j] = similarity[j, i] = value
    groups, undecided = _groups(similarity, 0.95)
    assert undecided == 0
    assert [(g, round(s, 2)) for g, s in groups] == [((0, 3, 5), 0.96), ((1, 2), 0.99)]
