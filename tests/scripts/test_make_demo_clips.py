"""The demo clips: what is written, and that the labels are true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts import make_demo_clips
from selva.inputs.prompts import read_all_prompts, read_prompts
from selva.media import probe, read_audio
from toyworld import CLASSES, UNSEEN, get_class


def make(folder: Path, *options: str) -> int:
    return make_demo_clips.main(["--out", str(folder), "--duration", "2", "--size", "64", *options])


def test_clips_come_with_clean_sound_prompts_and_events(tmp_path, capsys):
    assert make(tmp_path, "--sound", "gong", "--count", "2", "--lossless") == 0
    videos = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [video.name for video in videos] == ["gong_001.mp4", "gong_002.mp4"]
    prompts = read_prompts(tmp_path / "prompts.txt")
    header, *rows = [line.split("\t") for line in (tmp_path / "events.tsv").read_text().splitlines()]
    assert tuple(header) == make_demo_clips.EVENT_COLUMNS
    for video in videos:
        assert probe(video).width == 64 and probe(video).duration_sec == pytest.approx(2, abs=0.05)
        heard, rate = read_audio(video)
        clean, _ = read_audio(video.with_suffix(".flac"))
        np.testing.assert_allclose(heard.numpy(), clean.numpy(), atol=1e-4)
        mine = [row for row in rows if row[0] == video.stem]
        assert mine and all(row[2] == "gong" for row in mine)
        first = int(float(mine[0][4]) * rate)
        assert np.abs(clean[0].numpy()[: first - 2]).max() < 1e-4 < 0.05 < np.abs(clean[0].numpy()[first:][:400]).max()
        wordings = [p.format(colour=mine[0][3]) for p in get_class("gong").prompts]
        assert prompts[f"{video.stem}.npz"] in wordings


def test_clips_can_have_several_prompts_of_which_the_last_is_their_own(tmp_path):
    assert make(tmp_path / "one", "--count", "2") == 0
    assert make(tmp_path / "three", "--count", "2", "--prompts_per_clip", "3") == 0
    one, several = (read_all_prompts(tmp_path / name / "prompts.txt") for name in ("one", "three"))
    assert list(one) == list(several)
    for name, prompts in several.items():
        assert len(set(prompts)) == 3 and prompts[-1:] == one[name]
    assert (tmp_path / "one" / "gong_001.mp4").read_bytes() == (tmp_path / "three" / "gong_001.mp4").read_bytes()


def test_the_same_seed_makes_the_same_clips(tmp_path):
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert make(tmp_path / folder, "--count", "1", "--seed", seed) == 0
    for name in ("gong_001.mp4", "gong_001.flac", "prompts.txt", "events.tsv"):
        a, b = ((tmp_path / folder / name).read_bytes() for folder in "ab")
        assert a == b, name
    assert (tmp_path / "a" / "gong_001.flac").read_bytes() != (tmp_path / "c" / "gong_001.flac").read_bytes()


def test_two_objects_sound_in_the_video_and_one_in_the_clean_sound(tmp_path):
    assert make(tmp_path, "--sound", "bell", "--objects", "2", "--count", "1", "--lossless") == 0
    mixture, _ = read_audio(tmp_path / "bell_001.mp4")
    clean, _ = read_audio(tmp_path / "bell_001.flac")
    names = {line.split("\t")[2] for line in (tmp_path / "events.tsv").read_text().splitlines()[1:]}
    assert len(names) == 2 and "bell" in names
    assert np.abs((mixture - clean).numpy()).max() > 0.05 and np.abs(clean.numpy()).max() > 0.05


def test_the_list_names_every_sound(capsys):
    assert make_demo_clips.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*UNSEEN, *CLASSES]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sound", "cow"), "--sound cow: expected one of gong"),
        (("--duration", "0.5"), "--duration is 0.5"),
        (("--size", "63"), "--size is 63"),
        (("--seed", "-1"), "--seed is -1"),
    ],
)
def test_wrong_usage_is_refused(tmp_path, capsys, options, words):
    assert make(tmp_path / "new", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert make_demo_clips.main([]) == 2


def test_prompts_of_others_are_not_replaced(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("dog: a dog")
    arguments = ["--out", str(tmp_path), "--count", "1", "--size", "64", "--duration", "2"]
    assert make_demo_clips.main(arguments) == 2
    assert "holds a prompts.txt that was not made with demo clips" in capsys.readouterr().err
    assert (tmp_path / "prompts.txt").read_text() == "dog: a dog"
    (tmp_path / "prompts.txt").unlink()
    assert make_demo_clips.main(arguments) == 0 == make_demo_clips.main(arguments)
