"""Videos that a program made."""

from __future__ import annotations

import numpy as np
import pytest
from make_media import click_time, clicks, decode, number_in, picture_of

from selva.media import read_audio, write_video

PICTURES = [picture_of(i) for i in range(50)]


@pytest.mark.parametrize("lossless", [False, True])
def test_pictures_and_sound_arrive_at_their_times(tmp_path, lossless):
    write_video(tmp_path / "a.mp4", iter(PICTURES), 25, clicks([1.2], 2.0)[0], 16_000, lossless)
    frames, sound, rate = decode(tmp_path / "a.mp4")
    assert [number_in(frame.transpose(2, 0, 1)) for _, frame in frames] == list(range(50))
    assert [time for time, _ in frames] == pytest.approx([i / 25 for i in range(50)])
    assert rate == 16_000
    timed, _ = read_audio(tmp_path / "a.mp4")  # by its time stamps
    assert click_time(timed, rate) == pytest.approx(1.2, abs=0.005)
    if lossless:
        np.testing.assert_allclose(sound[0] / 32768, clicks([1.2], 2.0)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "pictures", "sound", "words"),
    [
        ("a.avi", PICTURES, np.zeros(9), "cannot write '.avi'"),
        ("a.mp4", [], np.zeros(9), "no pictures"),
        ("a.mp4", [np.zeros((63, 64, 3), np.uint8)], np.zeros(9), "64 x 63"),
        ("a.mp4", PICTURES, np.array([np.nan]), "not empty, all values finite"),
        ("a.mp4", PICTURES, np.zeros((1, 9)), r"expected \(samples,\)"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, pictures, sound, words):
    with pytest.raises(ValueError, match=words):
        write_video(tmp_path / name, pictures, 25, sound, 16_000)
    assert not list(tmp_path.iterdir())
