"""Cutting: silence is avoided by the rule that is documented, whole recordings are held out, pieces are exact."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from make_data import noise

from selva.audio.silence import SilenceMap
from selva.media import read_audio
from selva.partition.config import CuttingConfig
from selva.partition.cut import avoid_silence, cut_recording, hold_out, same_recordings, write_piece
from selva.partition.segments import Segment
from selva.partition.windows import Window, partition

RATE = 8_000


def put(path, sounding, seconds, rate=RATE):
    """Write noise where ``sounding`` says (start, end) in seconds, and silence elsewhere."""
    t = np.arange(round(seconds * rate)) / rate
    heard = np.zeros(len(t), bool)
    for start, end in sounding:
        heard |= (t >= start) & (t < end)
    soundfile.write(path, np.random.default_rng(0).standard_normal(len(t)) * 0.1 * heard, rate)
    return path


def seconds(windows):
    return [(w.start_sample / RATE, w.end_sample / RATE) for w in windows]


AWAY = CuttingConfig(skip_silence=True)


def test_windows_with_sound_stay_where_they_are(tmp_path):
    path = put(tmp_path / "a.wav", [(0, 4.1), (20, 40)], 40)
    windows, left_out = cut_recording(path, AWAY)
    assert windows[0] == partition("a", 40 * RATE, RATE)[0]
    assert len(windows) == 3 and len(left_out) == 1


def test_a_silent_window_moves_to_where_least_is_silent_and_nearest(tmp_path):
    path = put(tmp_path / "a.wav", [(12, 40), (60, 70)], 80)
    before = partition("a", 80 * RATE, RATE)
    assert [start for start, _ in seconds(before)] == pytest.approx([0, 17.975, 35.95, 53.925, 71.9])
    windows, left_out = cut_recording(path, AWAY)
    # The second and the third stay. Of the others, in order: 0 goes to 26.1, the nearest free place without silence;
    # 53.925 to 60, and 71.9 to the only place left that is mostly sound, before the second.
    assert [start for start, _ in seconds(windows)] == pytest.approx([9.85, 17.975, 26.1, 35.95, 60])
    assert [w.id for w in windows] == [f"a_{i}" for i in range(5)] and left_out == []
    waveform, _ = read_audio(path)
    for window in windows:
        piece = waveform[0, window.start_sample : window.end_sample]
        assert (piece == 0).float().mean() <= 0.51


def test_the_place_is_the_least_silent_and_then_the_nearest():
    silent = np.ones(1000, bool)  # 50 s
    silent[300:500] = silent[700:900] = False  # sound from 15 to 25 s and from 35 to 45 s
    (window,), dropped = avoid_silence([Window("a_0", "a", 0, 64_800)], SilenceMap(silent, RATE, 400_000))
    assert (window.start_sample / RATE, dropped) == (15.0, [])
    (window,), _ = avoid_silence([Window("a_0", "a", 335_200, 400_000)], SilenceMap(silent, RATE, 400_000))
    assert window.start_sample / RATE == pytest.approx(45 - 8.1, abs=0.05)


def test_all_silent_is_left_out_and_the_threshold_is_the_users(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).standard_normal(10 * RATE) * 1e-4, RATE, "FLOAT")
    windows, (item,) = cut_recording(tmp_path / "a.wav", AWAY)
    assert windows == [] and (item.start_sec, item.end_sec) == (0, 8.1)
    assert item.reason == "more than half of it is silent, below -60 dB" and not item.failed
    windows, left_out = cut_recording(tmp_path / "a.wav", CuttingConfig(skip_silence=True, silence_db=-90))
    assert len(windows) == 1 and left_out == []


def test_rain_is_not_silence(tmp_path):
    """Pitfall J1: what never changes is kept."""
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).standard_normal(20 * RATE) * 0.003, RATE)
    assert cut_recording(tmp_path / "a.wav", AWAY) == (partition("a", 20 * RATE, RATE), [])


def test_silent_segments_are_dropped_not_moved(tmp_path):
    path = put(tmp_path / "a.wav", [(0, 5)], 10)
    segments = [Segment("a", 1, 3, "x"), Segment("a", 6, 9, "y"), Segment("a", 4, 7, "z")]
    windows, left_out = cut_recording(path, AWAY, segments)
    assert [w.id for w in windows] == ["x"]
    assert [(item.id, item.start_sec, item.end_sec) for item in left_out] == [("y", 6, 9), ("z", 4, 7)]


def test_segments_are_cut_where_they_say(tmp_path, caplog):
    path = put(tmp_path / "a.wav", [(0, 10)], 10)
    segments = [
        Segment("a", 1.5, 3, "x"), Segment("a", 9, 10.03, "end"), Segment("a", 9, 12, "over"),
        Segment("a", 5, 5.5, "short"), Segment("a", 10, 12, "behind"), Segment("a", 2, 2, "nothing"),
    ]
    with caplog.at_level(logging.WARNING):
        windows, left_out = cut_recording(path, CuttingConfig(), segments)
    assert windows == [
        Window("x", "a", 12_000, 24_000), Window("end", "a", 72_000, 80_000), Window("over", "a", 72_000, 80_000)
    ]
    assert [(item.id, item.reason) for item in left_out] == [
        ("short", "0.50 s long, expected at least 0.64 s"),
        ("behind", "begins after the end of the recording (10.00 s)"),
        ("nothing", "0.00 s long, expected at least 0.64 s"),
    ]
    assert caplog.text.count("cut there") == 1 and "over ends at 12.00 s" in caplog.text
    assert len(cut_recording(path, CuttingConfig(min_length_sec=0.5), segments)[0]) == 4
    assert len(cut_recording(path, CuttingConfig(min_length_sec=0), segments)[0]) == 4
    assert "no segment" in cut_recording(path, CuttingConfig(), [])[1][0].reason


@pytest.mark.parametrize("config", [CuttingConfig(), AWAY])
def test_a_recording_that_was_cut_short_gives_no_windows_beyond_its_end(config, tmp_path):
    path = put(tmp_path / "a.flac", [(0, 20)], 20)
    path.write_bytes(path.read_bytes()[:4_000])
    windows, (item,) = cut_recording(path, config)
    assert windows == [] and item.failed and "damaged" in item.reason


def test_bad_settings_are_refused():
    cases: tuple[dict[str, Any], ...] = (
        {"min_length_sec": -1}, {"min_length_sec": float("nan")}, {"max_segments": 0}, {"silence_db": 3},
    )
    for wrong in cases:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CuttingConfig(**wrong)


def test_recordings_are_held_out_whole_and_the_same_in_any_order():
    names = [f"take_{i}" for i in range(50)]
    held = hold_out(names, 0.2, seed=1)
    assert len(held) == 10 and held == hold_out(names[::-1], 0.2, seed=1) != hold_out(names, 0.2, seed=2)
    assert len(held & hold_out([*names, "new"], 0.2, seed=1)) >= 9
    assert len(hold_out("ab", 0.01, 1)) == len(hold_out("ab", 0.99, 1)) == 1
    for names, fraction in (("a", 0.5), ("ab", 0.0), ("ab", 1.0)):
        with pytest.raises(ValueError):
            hold_out(names, fraction, 1)


def test_recordings_of_the_same_content_stay_on_one_side(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2)):
        soundfile.write(tmp_path / f"{name}.wav", noise(1, RATE, seed=seed), RATE)
    same = same_recordings({name: tmp_path / f"{name}.wav" for name in "abcd"})
    assert same == [["a", "b"]]
    for seed in range(20):
        for fraction in (0.1, 0.25, 0.5, 0.9):
            held = hold_out("abcd", fraction, seed, same)
            assert ("a" in held) == ("b" in held) and 0 < len(held) < 4
    assert {len(hold_out("abc", 0.1, seed, same)) for seed in range(20)} == {1}
    assert all(hold_out("bcd", 0.3, seed, [["b"]]) == hold_out("bcd", 0.3, seed) for seed in range(9))
    with pytest.raises(ValueError, match="2 recordings of the same content cannot be split"):
        hold_out("ab", 0.5, 1, same)


def test_pieces_are_exact_and_a_second_run_writes_only_what_is_missing(tmp_path):
    sound = np.stack([noise(3, RATE), noise(3, RATE, seed=1)], axis=1)
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype="PCM_24")
    window = Window("a_0", "a", 7_001, 15_003)
    path = write_piece(tmp_path / "a.wav", window, tmp_path / "out", "rain")
    assert path == tmp_path / "out" / "a_0.flac" and (tmp_path / "out" / "a_0.txt").read_text() == "rain\n"
    whole, piece = read_audio(tmp_path / "a.wav")[0], read_audio(path)[0]
    assert torch.equal(piece, whole[:, 7_001:15_003])
    stamps = {}
    for file in (tmp_path / "out").iterdir():
        os.utime(file, ns=(10**18, 10**18))
        stamps[file] = file.stat().st_mtime_ns
    write_piece(tmp_path / "a.wav", window, tmp_path / "out", "rain")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == stamps
    path.write_bytes(path.read_bytes()[:500])
    write_piece(tmp_path / "a.wav", window, tmp_path / "out", "wind")
    assert torch.equal(read_audio(path)[0], piece) and (tmp_path / "out" / "a_0.txt").read_text() == "wind\n"
    soundfile.write(tmp_path / "a.wav", sound / 2, RATE, subtype="PCM_24")
    write_piece(tmp_path / "a.wav", window, tmp_path / "out")
    assert not torch.equal(read_audio(path)[0], piece)


def test_loud_pieces_are_scaled_and_impossible_ones_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(2, RATE) * 40, RATE, subtype="FLOAT")
    path = write_piece(tmp_path / "a.wav", Window("a_0", "a", 0, 16_000), tmp_path / "out")
    assert read_audio(path)[0].abs().max() == pytest.approx(1, abs=1e-6)
    soundfile.write(tmp_path / "b.wav", np.zeros((9_000, 9)), RATE)
    with pytest.raises(ValueError, match=r"b\.wav: has 9 channels"):
        write_piece(tmp_path / "b.wav", Window("b_0", "b", 0, 9_000), tmp_path / "out")
    soundfile.write(tmp_path / "c.wav", np.zeros(9_000), 700_000)
    with pytest.raises(ValueError, match=r"c\.wav: has a rate of 700000 Hz, but \.flac holds up to 655350; convert it"):
        write_piece(tmp_path / "c.wav", Window("c_0", "c", 0, 9_000), tmp_path / "out")
    with pytest.raises(ValueError, match=r"a\.wav: ends after 2\.00 s"):
        write_piece(tmp_path / "a.wav", Window("a_0", "a", 8_000, 24_000), tmp_path / "out")


def test_channels_that_cancel_are_named(tmp_path, caplog):
    sound = noise(9.0, RATE)
    soundfile.write(tmp_path / "a.wav", np.stack([sound, -sound], axis=1), RATE)
    (window, *_) = partition("a", 9 * RATE, RATE)
    write_piece(tmp_path / "a.wav", window, tmp_path / "out")
    assert f"a.wav: {window.id}: its channels cancel each other" in caplog.text
