"""Files of a folder: links, subfolders, and the names of those that are not taken."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from make_media import clicks

from selva.data.folder import scan_folder
from selva.data.inspection.measures import inspect
from selva.inputs.jobs import collect_jobs, find_videos
from selva.inputs.media_files import visible_files
from selva.inputs.pairing import pair_recordings
from selva.media import read_audio
from selva.partition.cut import collect_recordings


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(folder: Path, recursive: bool = True) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in visible_files(folder, recursive))


@pytest.fixture
def linked(tmp_path) -> Path:
    """A folder with links: to a folder elsewhere (twice), to itself, within itself, and to nothing."""
    touch(tmp_path / "disk" / "day1" / "dog.mp4", tmp_path / "clips" / "here" / "cat.mp4")
    try:
        (tmp_path / "clips" / "day1").symlink_to(tmp_path / "disk" / "day1")
        (tmp_path / "clips" / "again").symlink_to(tmp_path / "disk" / "day1")
        (tmp_path / "clips" / "loop").symlink_to(tmp_path / "clips")
        (tmp_path / "disk" / "day1" / "back").symlink_to(tmp_path / "clips")
        (tmp_path / "clips" / "also_here").symlink_to(tmp_path / "clips" / "here")
        (tmp_path / "clips" / "gone.mp4").symlink_to(tmp_path / "nothing.mp4")
    except OSError:
        pytest.skip("this system allows no links")
    return tmp_path / "clips"


def test_linked_folders_are_followed_once(linked):
    found = names(linked)
    assert len([name for name in found if name.endswith("dog.mp4")]) == 1
    assert [name for name in found if not name.endswith("dog.mp4")] == ["gone.mp4", "here/cat.mp4"]
    assert names(linked, recursive=False) == ["gone.mp4"]


def test_videos_behind_links_become_clips(linked):
    assert [path.name for path in find_videos(linked, recursive=True)].count("dog.mp4") == 1
    assert {job.path.name for job in collect_jobs([linked], recursive=True)} == {"cat.mp4", "dog.mp4", "gone.mp4"}


def test_recordings_behind_links_are_paired(linked):
    touch(linked.parent / "disk" / "day1" / "dog.wav")
    assert list(pair_recordings(linked, [("dog", Path("dog.mp4"))])) == ["dog"]


def test_a_link_that_leads_nowhere_is_named(linked, tmp_path):
    touch(tmp_path / "r" / "rain.wav")
    (tmp_path / "r" / "wind.wav").symlink_to(tmp_path / "nothing.wav")
    recordings, left_out = collect_recordings(tmp_path / "r")
    assert [path.name for path in recordings.values()] == ["rain.wav"]
    assert [(item.path.name, item.reason, item.failed) for item in left_out] == [
        ("wind.wav", "leads to no file", True)]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, caplog):
    touch(tmp_path / "shut" / "a.mp4", tmp_path / "b.mp4")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert names(tmp_path) == ["b.mp4"]
    assert f"{tmp_path / 'shut'}: cannot be read (Permission denied); its files are left out" in caplog.text


LOOKS = {
    "extraction": lambda folder: find_videos(folder), "partition": lambda folder: collect_recordings(folder),
    "inspection": lambda folder: inspect(folder), "pairing": lambda folder: pair_recordings(folder, [("a", Path("a"))]),
}


@pytest.mark.parametrize("look", LOOKS)
def test_files_of_unknown_kinds_are_named(look, tmp_path, caplog):
    touch(tmp_path / "a.mp4", tmp_path / "a.wav", tmp_path / "b.insv", tmp_path / "c", tmp_path / "a.txt",
          tmp_path / "a.png", tmp_path / ".d.xyz", tmp_path / "dance.GIF")
    with caplog.at_level(logging.WARNING):
        LOOKS[look](tmp_path)
    assert "not taken, as their endings are of no known kind: b.insv, c, dance.GIF; known are ." in caplog.text


@pytest.mark.parametrize("look", ["extraction", "partition", "inspection"])
def test_subfolders_that_are_not_searched_are_named(look, tmp_path, caplog):
    touch(tmp_path / "a.mp4", tmp_path / "a.wav", tmp_path / "day1" / "b.MP4", tmp_path / "day1" / "b.wav",
          tmp_path / "notes" / "b.txt", tmp_path / ".hidden" / "c.mp4")
    with caplog.at_level(logging.WARNING):
        LOOKS[look](tmp_path)
    assert caplog.text.count("its subfolders are not searched, though there are such files in day1\n") == 1


def test_features_in_subfolders_are_named(tmp_path, caplog):
    touch(tmp_path / "a.npz", tmp_path / "dogs" / "b.npz")
    scan_folder(tmp_path)
    assert f"{tmp_path}: its subfolders are not searched, though there are such files in dogs" in caplog.text


@pytest.mark.parametrize("suffix, form", [(".w64", "W64"), (".caf", "CAF"), (".au", "AU"), (".rf64", "RF64"),
                                          (".aifc", "AIFF"), (".oga", "OGG"), (".bwf", "WAVEX")])
def test_more_kinds_of_recordings_are_taken_and_read(suffix, form, tmp_path):
    import soundfile

    sound = clicks([0.25], 1.0)
    soundfile.write(tmp_path / f"rain{suffix}", sound.T, 16_000, format=form)
    assert [path.name for path in collect_recordings(tmp_path)[0].values()] == [f"rain{suffix}"]
    waveform, rate = read_audio(tmp_path / f"rain{suffix}")
    assert (waveform.shape[1], rate) == (16_000, 16_000)


@pytest.mark.parametrize("place", ["extraction", "training"])
def test_a_list_of_prompts_in_capitals_is_named(place, tmp_path, caplog):
    touch(tmp_path / "a.mp4", tmp_path / "Prompts.TXT")
    if (tmp_path / "prompts.txt").exists():
        pytest.skip("upper and lower case are the same here")
    with caplog.at_level(logging.WARNING):
        collect_jobs([tmp_path]) if place == "extraction" else scan_folder(tmp_path)
    assert "Prompts.TXT: not read, as it is not called prompts.txt; rename it" in caplog.text
