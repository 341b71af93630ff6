"""partition_clips.py: the table it writes, what it says about files it cannot use, its exit codes."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from make_media import make_video

from partition_clips import main
from selva.clips import read_clips


def record(folder, name, seconds, rate=8_000):
    folder.mkdir(exist_ok=True)
    soundfile.write(folder / name, np.zeros(round(seconds * rate)), rate)


@pytest.fixture
def recordings(tmp_path):
    for name, seconds in (("b.flac", 20), ("a.wav", 9), ("c.ogg", 8.0), ("d.flac", 17)):
        record(tmp_path / "in", name, seconds)
    return tmp_path / "in"


def test_the_table(recordings, tmp_path, capsys):
    assert main(["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out' / 'clips.tsv'}\n"
    windows = read_clips(tmp_path / "out" / "clips.tsv")
    assert [(window.id, window.start_sample, window.end_sample) for window in windows] == [
        ("a_0", 0, 64_800),
        ("b_0", 0, 64_800),
        ("b_1", 95_200, 160_000),
        ("d_0", 0, 64_800),
        ("d_1", 71_200, 136_000),
    ]
    assert "c.ogg: 8.00 s long, a clip takes 8.1 s" in captured.err
    assert "5 clips from 3 of 4 recordings, 0 unreadable" in captured.err
    assert (tmp_path / "out" / "clips_config.yaml").exists()


def test_a_range_of_the_sorted_files(recordings, tmp_path, capsys):
    arguments = ["--data-dir", str(recordings), "--output-dir", str(tmp_path / "out")]
    assert main([*arguments, "--start", "1", "--end", "3"]) == 0
    assert capsys.readouterr().out.strip().endswith("clips_1_3.tsv")
    assert {window.name for window in read_clips(tmp_path / "out" / "clips_1_3.tsv")} == {"b"}
    assert main([*arguments, "--start", "3"]) == 0
    assert {window.name for window in read_clips(tmp_path / "out" / "clips_3_4.tsv")} == {"d"}
    for wrong in (["--start", "4"], ["--start", "-1"], ["--start", "2", "--end", "2"], ["--start", "x"], ["--unknown"]):
        assert main([*arguments, *wrong]) == 2
    assert "0 ... 3" in capsys.readouterr().err


def test_unreadable_files_are_named_and_the_rest_is_done(recordings, tmp_path, capsys):
    (recordings / "e.wav").write_bytes(b"rubbish")
    (recordings / "notes.txt").write_text("ignored")
    assert main(["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "e.wav: cannot be read" in captured.err and "1 unreadable" in captured.err
    assert "notes" not in captured.err
    assert len(read_clips(tmp_path / "out" / "clips.tsv")) == 5


def test_equal_names_are_taken_once(recordings, tmp_path, capsys):
    record(recordings, "a.flac", 30)
    record(recordings, "d.mp3", 60)
    assert main(["--data_dir", str(recordings), "--output_dir", str(tmp_path / "out")]) == 0
    windows = read_clips(tmp_path / "out" / "clips.tsv")
    assert [window.id for window in windows if window.name in "ad"] == ["a_0", "a_1", "a_2", "d_0", "d_1"]
    error = capsys.readouterr().err
    assert "a.wav: a.flac has the same name" in error and "d.mp3: d.flac has the same name" in error


def test_sound_that_only_pyav_reads(tmp_path):
    (tmp_path / "in").mkdir()
    make_video(tmp_path / "in" / "talk.mp4", 9.0, fps=5, sound=np.zeros((1, 72_000), np.float32), rate=8_000)
    (tmp_path / "in" / "talk.mp4").rename(tmp_path / "in" / "talk.m4a")
    assert main(["--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]) == 0
    (window,) = read_clips(tmp_path / "out" / "clips.tsv")
    assert (window.id, window.start_sample, window.end_sample) == ("talk_0", 0, 64_800)


def test_nothing_to_do_is_an_error_and_writes_nothing(tmp_path, capsys):
    output = ["--output_dir", str(tmp_path / "out")]
    assert main(["--data_dir", str(tmp_path / "nowhere"), *output]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["--data_dir", str(tmp_path / "empty"), *output]) == 1
    assert "no recordings in it" in capsys.readouterr().err
    record(tmp_path / "short", "a.wav", 3)
    assert main(["--data_dir", str(tmp_path / "short"), *output]) == 1
    assert "none of 1 recordings gives a clip of 8.1 s" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["--help"]) == 0
