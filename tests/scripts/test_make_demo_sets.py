"""Data sets of toy clips, for a base training of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import make_demo_sets
from selva.data.memmap.reader import MemmapDataset
from selva.models.variants import TINY_16K
from toyworld.classes import CLASSES


def test_two_sets_are_made_and_gone_on_with(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--sounds", "1", "--device", "cpu"]
    assert make_demo_sets.main([*arguments, "--videos", "1"]) == 0
    video, sound = (MemmapDataset(Path(line), TINY_16K) for line in capsys.readouterr().out.splitlines())
    assert (len(video), video.has_video, len(sound), sound.has_video) == (1, True, 1, False)
    first = (tmp_path / "clips" / "clip_00000.mp4").stat().st_mtime_ns
    words = {word.format(colour=colour)
             for kind in CLASSES.values() for word in kind.prompts for colour in kind.colours}
    assert set(video.prompts) | set(sound.prompts) <= words
    assert make_demo_sets.main([*arguments, "--videos", "2"]) == 0
    more = MemmapDataset(tmp_path / "sets" / "video", TINY_16K)
    assert len(more) == 2 and (more.rows["mean"][0] == video.rows["mean"][0]).all()
    assert (tmp_path / "clips" / "clip_00000.mp4").stat().st_mtime_ns == first


@pytest.mark.parametrize("size", ["81", "8"])
def test_a_size_that_no_video_has_is_refused(tmp_path, size, capsys):
    assert make_demo_sets.main(["--out", str(tmp_path), "--size", size]) == 2
    assert f"--size is {size}" in capsys.readouterr().err
