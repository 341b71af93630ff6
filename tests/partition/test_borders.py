"""Borders of given segments: merged, moved, trimmed; what becomes of the empty, the overlapping and the too long."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import soundfile

from selva.audio.silence import SilenceMap
from selva.partition.config import CuttingConfig
from selva.partition.cut import cut_recording
from selva.partition.segments import Segment, merge_segments, move_borders

RATE = 8_000


@pytest.fixture
def talk(tmp_path):
    """10 s of sound from 1 to 4 s and from 6 to 9 s, with silence around."""
    t = np.arange(10 * RATE) / RATE
    heard = ((t >= 1) & (t < 4)) | ((t >= 6) & (t < 9))
    path = tmp_path / "talk.wav"
    soundfile.write(path, np.random.default_rng(0).standard_normal(len(t)) * 0.1 * heard, RATE)
    return path


def cut(path, segments, **settings):
    windows, left_out = cut_recording(path, CuttingConfig(**settings), segments)
    return [(w.id, w.start_sample / RATE, w.end_sample / RATE) for w in windows], [(i.id, i.reason) for i in left_out]


def given(*times) -> list[Segment]:
    return [Segment("talk", start, end, f"s{i}", f"text {i}") for i, (start, end) in enumerate(times)]


# -- moved -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start, end, expected", [(-0.25, 0.5, (1.75, 4.5)), (0.25, -0.5, (2.25, 3.5)),
                                                  (0.0, 0.5, (2.0, 4.5)), (-0.25, 0.0, (1.75, 4.0)), (1, 1, (3, 5))])
def test_borders_move_both_ways(talk, start, end, expected):
    clips, left_out = cut(talk, given((2, 4)), slice_start_offset=start, slice_end_offset=end)
    assert clips == [("s0", *expected)] and left_out == []


def test_what_is_beyond_the_recording_is_cut_with_a_word(talk, caplog):
    clips, left_out = cut(talk, given((0.5, 4), (7, 9.5)), slice_start_offset=-1, slice_end_offset=1)
    assert clips == [("s0", 0, 5), ("s1", 6, 10)] and left_out == []
    assert "s0 begins 0.50 s before the recording with its moved border; cut there" in caplog.text
    assert "s1 ends at 10.50 s, but the recording after 10.00 s; cut there" in caplog.text


def test_a_segment_of_which_nothing_is_left_is_named(talk):
    times = ((2, 3), (5, 7), (9, 9.9))
    clips, left_out = cut(talk, given(*times), slice_start_offset=1.2, slice_end_offset=-0.1)
    assert clips == [("s1", 6.2, 6.9)]
    assert left_out == [("s0", "the moved borders leave nothing of it (3.20 to 2.90 s of 10.00 s)"),
                        ("s2", "the moved borders leave nothing of it (10.20 to 9.80 s of 10.00 s)")]
    clips, left_out = cut(talk, given((0.5, 1)), slice_start_offset=-3, slice_end_offset=-2)
    assert clips == [] and "nothing of it (-2.50 to -1.00 s" in left_out[0][1]
    clips, left_out = cut(talk, given((2, 3)), slice_start_offset=0.5)
    assert clips == [] and left_out == [("s0", "0.50 s long, expected at least 0.64 s")]


def test_segments_that_come_to_overlap_are_named_and_others_not(talk, caplog):
    segments = given((6, 9), (1, 2), (2.1, 4), (3.5, 5))
    moved = move_borders(segments, -0.1, 0.1)
    assert [s.start_sec for s in moved] == pytest.approx([5.9, 0.9, 2.0, 3.4])
    assert [s.end_sec for s in moved] == pytest.approx([9.1, 2.1, 4.1, 5.1])
    assert "talk: with moved borders, these reach into the next segment: s1" in caplog.text.splitlines()[0]
    caplog.clear()
    move_borders(segments, 0.1, -0.1)
    assert caplog.text == ""


# -- merged ------------------------------------------------------------------------------------------------------------


def test_segments_that_are_close_become_one():
    segments = [Segment("a", 5, 6, "third", "c"), Segment("a", 0, 1, "first", "a"), Segment("a", 1.3, 2, "second"),
                Segment("a", 6.5, 7, "fourth", "d")]
    assert merge_segments(segments, 0.4) == [Segment("a", 0, 2, "first", "a"), segments[0], segments[3]]
    assert merge_segments(segments, 0.6) == [Segment("a", 0, 2, "first", "a"), Segment("a", 5, 7, "third", "c d")]
    assert merge_segments(segments, 0.0) == sorted(segments, key=lambda s: s.start_sec)


def test_overlapping_segments_are_one_with_any_gap():
    segments = [Segment("a", 0, 5, "long", "a"), Segment("a", 1, 2, "inside", "b"), Segment("a", 5, 6, "next", "c")]
    assert merge_segments(segments, 0.0) == [Segment("a", 0, 5, "long", "a b"), segments[2]]
    assert merge_segments(segments, 0.1) == [Segment("a", 0, 6, "long", "a b c")]


# -- trimmed -----------------------------------------------------------------------------------------------------------


def test_silence_at_both_ends_is_cut_off(talk):
    times = ((0.5, 4.5), (1.5, 3), (3.5, 6.5), (4.2, 5.8), (3.7, 5.5))
    clips, left_out = cut(talk, given(*times), trim_silence=True)
    assert clips == [("s0", 1, 4), ("s1", 1.5, 3), ("s2", 3.5, 6.5)]  # silence inside stays
    assert left_out == [
        ("s3", "all of it is silent, below -60 dB"),
        ("s4", "0.30 s long without the silence at its ends, expected at least 0.64 s"),
    ]
    clips, left_out = cut(talk, given((3, 5.5)), trim_silence=True, min_length_sec=1.5)
    assert clips == [] and "1.00 s long without the silence" in left_out[0][1]


def test_segments_are_trimmed_before_their_silence_is_judged(talk):
    segments = given((3, 5.5))  # 60 % of it is silent
    assert cut(talk, segments, skip_silence=True)[0] == []
    assert cut(talk, segments, skip_silence=True, trim_silence=True) == ([("s0", 3, 4)], [])


def test_windows_are_trimmed_where_they_have_moved_to(talk):
    assert cut(talk, None, trim_silence=True)[0] == [("talk_0", 1, 8.1)]
    assert cut(talk, None, trim_silence=True, min_length_sec=9)[0] == [("talk_0", 1, 8.1)]  # of recordings


def test_trimming_keeps_the_borders_within_the_stretch():
    silence = SilenceMap(np.array([True, False, False, True]), 1_000, 175)  # blocks of 50, the last one of 25
    expected = {(0, 175): (50, 150), (60, 140): (60, 140), (10, 120): (50, 120), (150, 175): (150, 150),
                (0, 40): (0, 0), (70, 170): (70, 150)}
    assert {stretch: silence.trimmed(*stretch) for stretch in expected} == expected


def test_without_the_new_settings_nothing_changes(talk, caplog):
    segments = given((6, 9), (1, 2), (1.5, 4))
    with caplog.at_level(logging.INFO):
        assert cut(talk, segments) == ([("s0", 6, 9), ("s1", 1, 2), ("s2", 1.5, 4)], [])
    assert caplog.text == ""
