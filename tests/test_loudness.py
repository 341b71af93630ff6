"""Loudness against the standard's tables and reference signals."""

from __future__ import annotations

import math

import pytest
import torch

from selva.loudness import head_filter, integrated_loudness, low_cut_filter


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
