"""Loudness and true peak against the standard's tables and reference signals; bringing sounds to a level."""

from __future__ import annotations

import math

import pytest
import torch

from selva.audio import loudness
from selva.audio.config import DEFAULT_TARGETS, LOUDNESS_METHODS
from selva.audio.loudness import (
    head_filter,
    integrated_loudness,
    low_cut_filter,
    normalize_loudness,
    rms_db,
    true_peak_db,
)


def sine(db, seconds=5.0, rate=48_000, frequency=997.0):
    t = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return (10 ** (db / 20) * torch.sin(2 * math.pi * frequency * t))[None].float()


def test_filters_are_those_of_the_standard_at_48_khz():
    """ITU-R BS.1770-4, tables 1 and 2."""
    b, a = head_filter(48_000)
    assert b == pytest.approx((1.53512485958697, -2.69169618940638, 1.19839281085285), abs=1e-10)
    assert a == pytest.approx((1.0, -1.69065929318241, 0.73248077421585), abs=1e-10)
    b, a = low_cut_filter(48_000)
    assert b == (1.0, -2.0, 1.0)
    assert a == pytest.approx((1.0, -1.99004745483398, 0.99007225036621), abs=1e-10)


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("db", [0.0, -23.0, -60.0])
def test_a_sine_has_the_loudness_that_defines_the_scale(db, rate):
    assert integrated_loudness(sine(db, rate=rate), rate) == pytest.approx(db - 3.01, abs=0.05)


def test_channels_add_their_power():
    assert integrated_loudness(sine(-20).repeat(2, 1), 48_000) == pytest.approx(-20, abs=0.05)


def test_loud_treble_is_not_limited():
    """At 10 kHz the head filter adds 4 dB, which exceeds full scale."""
    assert integrated_loudness(sine(0, frequency=10_000), 48_000) == pytest.approx(4.0 - 3.01 - 0.691, abs=0.1)


def test_quiet_stretches_do_not_count():
    """EBU Tech 3341, case 3: 10 s at -36, 60 s at -23, 10 s at -36 dBFS in stereo are -23 LUFS."""
    sound = torch.cat([sine(-36, 10), sine(-23, 60), sine(-36, 10)], dim=1).repeat(2, 1)
    assert integrated_loudness(sound, 48_000) == pytest.approx(-23, abs=0.1)
    with_silence = torch.cat([sine(-23), torch.zeros(1, 480_000)], dim=1)
    assert integrated_loudness(with_silence, 48_000) == pytest.approx(-26, abs=0.2)


def test_what_has_no_loudness():
    assert integrated_loudness(torch.zeros(1, 48_000), 48_000) is None
    assert integrated_loudness(sine(-80), 48_000) is None
    assert integrated_loudness(sine(0, seconds=0.39), 48_000) is None


# ---------------------------------------------------------------------------------------------------------------
# true peak
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize(
    ("part", "phase_deg"), [(4, 0), (4, 45), (6, 60), (8, 67.5)]  # EBU Tech 3341, cases 15 to 18
)
def test_a_peak_between_the_samples_is_found(rate, part, phase_deg):
    """Sines of amplitude 0.5 whose samples miss the crest; -6.0 dBTP within +0.2 and -0.4 dB is asked for."""
    t = torch.arange(rate, dtype=torch.float64)
    sound = 0.5 * torch.sin(2 * math.pi * t / part + math.radians(phase_deg))
    sound *= torch.hann_window(rate, periodic=False, dtype=torch.float64).sqrt()  # no step at either end
    assert -6.4 <= true_peak_db(sound, rate) <= -5.8
    if phase_deg == 45:
        assert 20 * math.log10(sound.abs().max()) == pytest.approx(-9.03, abs=0.02)


def test_the_true_peak_is_never_below_the_samples():
    click = torch.zeros(2, 1000)
    click[1, 500] = -0.5
    assert true_peak_db(click, 48_000) == pytest.approx(-6.02, abs=0.01)


def test_silence_has_no_peak():
    assert true_peak_db(torch.zeros(1, 100), 16_000) == true_peak_db(torch.zeros(1, 0), 16_000) == -math.inf


# ---------------------------------------------------------------------------------------------------------------
# bringing to a level
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("method", ["rms", "lufs", "peak"])
@pytest.mark.parametrize("target", [None, -30.0])
def test_the_target_is_reached(method, rate, target):
    found, report = normalize_loudness(sine(-12, rate=rate)[0], rate, method, target)
    measured = {
        "rms": lambda: rms_db(found), "lufs": lambda: integrated_loudness(found[None], rate),
        "peak": lambda: true_peak_db(found, rate),
    }[method]()
    wanted = DEFAULT_TARGETS[method] if target is None else target
    assert measured == pytest.approx(wanted, abs=0.02) and not report.limited and not report.reason
    assert report.true_peak == pytest.approx(true_peak_db(found, rate), abs=0.01)
    assert f"to {wanted:.1f}" in str(report) and "\n" not in str(report)


@pytest.mark.parametrize("method", ["rms", "lufs", "peak"])
def test_the_gain_is_lowered_before_the_true_peak_exceeds_its_limit(method):
    """Clicks are quiet for their peak; one gain for all, so their shape stays."""
    sound = torch.zeros(1, 48_000)
    sound[0, ::6_000] = 0.25
    found, report = normalize_loudness(sound, 48_000, method, 0.0)
    assert report.limited and true_peak_db(found, 48_000) == pytest.approx(-1.0, abs=0.01)
    torch.testing.assert_close(found, sound * 10 ** (report.gain_db / 20))
    assert "to keep the true peak down" in str(report)
    lower, _ = normalize_loudness(sound, 48_000, method, 0.0, true_peak_limit_db=-6.0)
    assert true_peak_db(lower, 48_000) == pytest.approx(-6.0, abs=0.01)


def test_a_peak_between_the_samples_counts_for_the_limit():
    """Samples of this sine reach -1 dBFS when its crests are at +2 dBTP."""
    t = torch.arange(48_000, dtype=torch.float64)
    sound = 0.1 * torch.sin(math.pi / 2 * t + math.pi / 4) * torch.hann_window(48_000, dtype=torch.float64).sqrt()
    found, _ = normalize_loudness(sound, 48_000, "rms", 0.0)
    assert 20 * math.log10(found.abs().max()) < -3.9


def test_too_loud_a_sound_is_brought_down():
    found, report = normalize_loudness(sine(0, rate=16_000), 16_000, "rms")
    assert report.gain_db == pytest.approx(-27 + 3.01, abs=0.01) and rms_db(found) == pytest.approx(-27, abs=0.01)


@pytest.mark.parametrize("method", LOUDNESS_METHODS)
@pytest.mark.parametrize("level_db", [-math.inf, -100.0])
def test_silence_stays_silence(method, level_db):
    sound = 10 ** (level_db / 20) * torch.ones(16_000)
    found, report = normalize_loudness(sound, 16_000, method)
    assert torch.equal(found, sound) and report.gain_db == 0
    assert ("silence" if method != "none" else "not normalised") in str(report)


def test_none_changes_nothing_however_loud():
    sound = 1.5 * sine(0)
    found, report = normalize_loudness(sound, 48_000)
    assert torch.equal(found, sound) and report.true_peak == pytest.approx(3.5, abs=0.1)
    assert str(report) == "level left as it is (not normalised), true peak 3.5 dBTP"


def test_what_lufs_cannot_measure_is_left_and_said():
    sound = sine(-20, seconds=0.3)
    found, report = normalize_loudness(sound, 48_000, "lufs")
    assert torch.equal(found, sound) and report.level is None
    assert "left as it is (too short or too quiet for LUFS)" in str(report)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"method": "loud"}, "unknown method 'loud', expected one of none, rms, lufs, peak"),
     ({"method": "rms", "target": math.nan}, "target is nan"),
     ({"method": "rms", "true_peak_limit_db": math.inf}, "true peak limit is inf")],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        normalize_loudness(torch.ones(16_000), 16_000, **settings)
    with pytest.raises(ValueError, match="NaN or infinite"):
        normalize_loudness(torch.tensor([0.0, math.nan]), 16_000, "rms")


@pytest.mark.parametrize("samples", [1, 99, 100, 101, 1234])
def test_the_true_peak_piece_by_piece_is_that_of_all_at_once(monkeypatch, samples):
    sound = torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
    whole = true_peak_db(sound, 16_000)
    for block in (100, 7):
        monkeypatch.setattr(loudness, "TRUE_PEAK_BLOCK", block)
        assert true_peak_db(sound, 16_000) == pytest.approx(whole, abs=1e-12)
