"""Features and sound in a folder: placed together, never onto what somebody else put there."""

from __future__ import annotations

import contextlib
import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from make_media import clicks, make_video

import extract_features
from selva.extraction import outputs, pairs
from selva.extraction.leftovers import leftovers
from selva.extraction.manifest import read_manifest
from selva.extraction.pairs import PairFolder
from selva.features import FeatureBundle, load_features, save_features

ARGUMENTS = ["--variant", "tiny_16k", "--device", "cpu", "--workers", "0", "--duration", "1"]


def extract(source, out, *more) -> int:
    return extract_features.main([str(source), "--output_dir", str(out), "--prompt", "a dog", *ARGUMENTS, *more])


def state(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.*"))
            if path.suffix in (".npz", ".flac", ".wav")}


@pytest.fixture(scope="module")
def two_videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for day in (1, 2):
        (folder / f"day{day}").mkdir()
    return [make_video(folder / f"day{day}" / "GOPR0001.mkv", 3.2, sound=clicks([day / 10, 2.4], 3.3),
                       audio_codec="pcm_s16le") for day in (1, 2)]


@pytest.fixture
def own_sound(tmp_path):
    def write(name):
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.2 * np.sin(np.arange(16_000) / 10), 16_000)
        return path, path.read_bytes()

    return write


# -- the user's own sound ---------------------------------------------------------------------------------------------


def test_a_sound_of_the_users_own_is_never_replaced_without_a_word(two_videos, tmp_path, own_sound, capsys):
    path, content = own_sound("GOPR0001.flac")
    assert extract(two_videos[0], tmp_path / "out") == 1
    assert f"{path}: is in the way" in capsys.readouterr().err
    assert state(tmp_path / "out") == {"GOPR0001.flac": content}
    (row,) = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert row["status"] == "failed" and "--overwrite" in row["reason"]
    assert extract(two_videos[0], tmp_path / "out", "--overwrite") == 0
    assert "was not written by extract_features.py and is replaced" in capsys.readouterr().err
    assert path.read_bytes() != content


def test_a_sound_put_beside_features_without_one_is_kept(two_videos, tmp_path, own_sound, capsys):
    assert extract(two_videos[0], tmp_path / "out", "--audio", "none") == 0
    path, content = own_sound("GOPR0001.flac")
    before = state(tmp_path / "out")
    assert extract(two_videos[0], tmp_path / "out") == 0  # the same features
    assert "is your own sound" in capsys.readouterr().err
    assert extract(two_videos[0], tmp_path / "out", "--prompt", "a cat") == 1
    assert f"{path}: is in the way" in capsys.readouterr().err and state(tmp_path / "out") == before
    assert extract(two_videos[0], tmp_path / "out", "--prompt", "a cat", "--audio", "none") == 0
    assert path.read_bytes() == content


def test_a_sound_that_replaced_the_extracted_one_is_kept(two_videos, tmp_path, own_sound, capsys):
    assert extract(two_videos[0], tmp_path / "out") == 0
    path, content = own_sound("GOPR0001.flac")
    assert extract(two_videos[0], tmp_path / "out") == 0
    assert f"{path}: is your own sound" in capsys.readouterr().err and path.read_bytes() == content
    assert extract(two_videos[0], tmp_path / "out", "--start", "1") == 1 and path.read_bytes() == content


def test_a_sound_of_another_kind_beside_it_is_refused(two_videos, tmp_path, own_sound, capsys):
    path, content = own_sound("GOPR0001.wav")
    assert extract(two_videos[0], tmp_path / "out") == 1
    assert f"{path}: is in the way of GOPR0001.flac" in capsys.readouterr().err
    assert path.read_bytes() == content and not list((tmp_path / "out").glob("*.npz"))
    assert not (tmp_path / "out" / "GOPR0001.flac").exists()
    assert extract(two_videos[0], tmp_path / "out", "--overwrite") == 0
    assert f"{path}: lies beside the extracted sound" in capsys.readouterr().err
    assert path.read_bytes() == content and (tmp_path / "out" / "GOPR0001.flac").exists()
    assert extract(two_videos[0], tmp_path / "out") == 0
    assert "training uses this extracted sound, not GOPR0001.wav" in capsys.readouterr().err


# -- another video of the same name -----------------------------------------------------------------------------------


def test_another_video_of_the_same_file_name_does_not_replace_the_first(two_videos, tmp_path, capsys):
    out = tmp_path / "out"
    assert extract(two_videos[0], out) == 0
    before = state(out)
    assert extract(two_videos[1], out) == 1
    assert "another video; give each its own name" in capsys.readouterr().err and state(out) == before
    assert extract(two_videos[1], out, "--overwrite") == 0 and state(out).keys() == before.keys()
    assert state(out) != before


def test_with_a_name_they_are_two_clips(two_videos, tmp_path):
    out = tmp_path / "out"
    for source in (*two_videos, two_videos[0]):
        assert extract(source, out, "--name", "dog") == 0
    hashes = [load_features(out / f"dog_00{number}.npz").source_sha256 for number in (1, 2)]
    assert len(set(hashes)) == 2 and not (out / "dog_003.npz").exists()


def test_a_video_that_was_moved_or_edited_is_the_same_clip(two_videos, tmp_path, capsys):
    video, out = tmp_path / "a" / "GOPR0001.mkv", tmp_path / "out"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    shutil.copy(two_videos[0], video)
    assert extract(video, out) == 0
    video = video.rename(tmp_path / "b" / video.name)
    assert extract(video, out) == 0 and "1 already current" in capsys.readouterr().err
    assert extract(video, out, "--start", "1") == 0
    shutil.copy(two_videos[1], video)  # edited in place
    assert extract(video, out) == 0 and "1 extracted" in capsys.readouterr().err


def test_features_of_another_program_are_not_replaced(two_videos, tmp_path, capsys):
    path = tmp_path / "GOPR0001.npz"
    save_features(path, FeatureBundle(torch.ones(1, 8, 4), torch.ones(1, 8, 4), 1.0))
    before = path.read_bytes()
    assert extract(two_videos[0], tmp_path) == 1
    assert f"{path}: is in the way" in capsys.readouterr().err and path.read_bytes() == before


# -- together ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(6))
def test_features_never_lie_beside_the_sound_of_another_moment(two_videos, tmp_path, monkeypatch, step):
    """Killed before any of the first six steps of placing a clip, the first command puts everything right."""
    out = tmp_path / "out"
    assert extract(two_videos[0], out) == 0
    first = state(out)
    steps, in_place = [], []
    place = outputs.PairFolder.place

    def placing(*arguments):
        in_place.append(True)
        place(*arguments)
        in_place.clear()

    class Killed(BaseException):
        pass

    def dying(function):
        def call(*arguments, **options):
            steps.extend(function for _ in in_place)
            if len(steps) > step:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(pairs.os, "replace", dying(pairs.os.replace))
        patch.setattr(pairs.Path, "unlink", dying(pairs.Path.unlink))
        patch.setattr(outputs.PairFolder, "_note", dying(outputs.PairFolder._note))
        patch.setattr(outputs.PairFolder, "place", placing)
        with contextlib.suppress(Killed):
            extract(two_videos[0], out, "--start", "2")
    assert bool(in_place) == (step < 6)
    left = state(out)
    if "GOPR0001.npz" in left and "GOPR0001.flac" in left:
        same = left["GOPR0001.npz"] == first["GOPR0001.npz"], left["GOPR0001.flac"] == first["GOPR0001.flac"]
        assert same[0] == same[1]
    assert extract(two_videos[0], out) == 0
    assert state(out) == first


def test_features_whose_sound_was_placed_by_a_killed_run_are_made_again(two_videos, tmp_path):
    """As it was: the sound of second 2 beside the features of second 0."""
    out = tmp_path / "out"
    assert extract(two_videos[0], out) == 0
    first = state(out)
    assert extract(two_videos[0], out, "--start", "2") == 0
    (out / "GOPR0001.npz").write_bytes(first["GOPR0001.npz"])
    assert extract(two_videos[0], out) == 0 and state(out) == first


def test_the_sound_of_an_earlier_kind_goes(two_videos, tmp_path, capsys):
    out = tmp_path / "out"
    assert extract(two_videos[0], out, "--audio", "copy") == 0 and set(state(out)) == {"GOPR0001.npz", "GOPR0001.wav"}
    assert extract(two_videos[0], out, "--start", "2") == 0
    assert set(state(out)) == {"GOPR0001.npz", "GOPR0001.flac"}
    assert "GOPR0001.wav: removed" in capsys.readouterr().err
    (row,) = read_manifest(out / "manifest.jsonl")
    assert row["files"] == ["GOPR0001.npz", "GOPR0001.flac"]


def test_the_old_sound_does_not_stay_beside_new_features_without_sound(two_videos, tmp_path, capsys):
    out = tmp_path / "out"
    assert extract(two_videos[0], out) == 0
    before = state(out)
    assert extract(two_videos[0], out, "--start", "2", "--audio", "none") == 1
    assert "the sound of an earlier extraction" in capsys.readouterr().err and state(out) == before
    assert extract(two_videos[0], out, "--prompt", "a cat", "--audio", "none") == 0  # of the same moment
    assert state(out)["GOPR0001.flac"] == before["GOPR0001.flac"]


def test_what_earlier_versions_wrote_is_known_by_its_samples(two_videos, tmp_path, own_sound, capsys):
    out = tmp_path / "out"
    assert extract(two_videos[0], out) == 0
    first = state(out)

    def as_an_earlier_version_left_it():
        (out / ".extract" / "written.jsonl").unlink(missing_ok=True)
        path = out / "GOPR0001.npz"
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files if key != "origin"}
        np.savez(path, **arrays)

    as_an_earlier_version_left_it()
    assert extract(two_videos[0], out) == 0 and "1 already current" in capsys.readouterr().err
    assert extract(two_videos[0], out, "--start", "2") == 0
    assert state(out)["GOPR0001.flac"] != first["GOPR0001.flac"]
    as_an_earlier_version_left_it()
    _, content = own_sound("GOPR0001.flac")
    assert extract(two_videos[0], out) == 1 and state(out)["GOPR0001.flac"] == content


def test_the_file_says_what_was_placed(two_videos, tmp_path):
    assert extract(two_videos[0], tmp_path) == 0
    origin = load_features(tmp_path / "GOPR0001.npz").origin
    assert origin is not None and origin["sound"] == "GOPR0001.flac"
    assert origin["sound_sha256"] == pairs.source_hash(tmp_path / "GOPR0001.flac")
    (line,) = (tmp_path / ".extract" / "written.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == str(two_videos[0].resolve())
    assert not (tmp_path / ".extract" / "waiting").exists()


def test_a_sound_that_comes_while_another_job_ends_stays(tmp_path, monkeypatch):
    folder = PairFolder(tmp_path, tmp_path / ".extract")
    folder.waiting.mkdir(parents=True)

    def after_another_job_began_to_write(remove):
        def removing(path, *more, **options):
            (folder.waiting / "dog.flac").write_bytes(b"of the other job")
            return remove(path, *more, **options)
        return removing

    for owner, name in ((Path, "rmdir"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, after_another_job_began_to_write(getattr(owner, name)))
    folder.close()
    assert (folder.waiting / "dog.flac").is_file()


def test_the_folder_of_waiting_sounds_goes_with_the_last_of_them(tmp_path):
    folder = PairFolder(tmp_path, tmp_path / ".extract")
    folder.close()  # there is none
    folder.waiting.mkdir(parents=True)
    (folder.waiting / "dog.flac").touch()
    folder.close()
    assert folder.waiting.is_dir()
    (folder.waiting / "dog.flac").unlink()
    folder.close()
    assert not folder.waiting.exists()


# -- what is left of other lists --------------------------------------------------------------------------------------


@pytest.fixture
def three_clips(two_videos, tmp_path):
    """Three clips that were extracted; then one is taken out of the list, and one is spoilt."""
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(two_videos[0], videos / f"{name}.mkv")
    assert extract(videos, out) == 0
    (videos / "a.mkv").unlink()
    (videos / "b.mkv").write_bytes(b"no video")
    return videos, out


def test_pairs_that_the_list_did_not_make_are_named_and_pruned(three_clips, capsys):
    videos, out = three_clips
    capsys.readouterr()
    assert extract(videos, out) == 1
    error = capsys.readouterr().err
    assert "1 clip of an earlier run, failed or left out in this one" in error
    assert "trained on; --prune removes them: b" in error
    assert "not in this list" in error and "trained on; --prune removes them: a" in error and len(state(out)) == 6
    assert extract(videos, out, "--prune") == 1
    assert "--prune: removed 2 clips, not in the list or failed: a, b" in capsys.readouterr().err
    assert set(state(out)) == {"c.npz", "c.flac"}
    assert extract(videos, out) == 1 and "--prune" not in capsys.readouterr().err


def test_pruning_leaves_a_sound_of_the_users_own(three_clips, own_sound, capsys):
    videos, out = three_clips
    path, content = own_sound("a.flac")
    assert extract(videos, out, "--prune") == 1
    assert set(state(out)) == {"a.npz", "a.flac", "c.npz", "c.flac"} and path.read_bytes() == content
    assert "which --prune does not remove" in capsys.readouterr().err


def test_a_clip_is_listed_however_its_disk_writes_the_accent_in_its_name(tmp_path):
    """Some disks hand out decomposed names: what was just extracted would be pruned."""
    decomposed = unicodedata.normalize("NFD", "b\u00e9b\u00e9")
    for name in (decomposed, "other"):
        (tmp_path / f"{name}.npz").touch()
    rows = [{"id": unicodedata.normalize("NFC", decomposed), "status": "done"}]
    assert leftovers(tmp_path, rows) == (["other"], [])
    assert leftovers(tmp_path, [{**rows[0], "status": "failed"}]) == (["other"], [decomposed])


def test_training_says_which_clips_are_not_of_the_last_extraction(three_clips, caplog):
    from selva.data.folder import scan_folder

    videos, out = three_clips
    scan_folder(out)
    assert "last extraction" not in caplog.text
    assert extract(videos, out) == 1
    scan_folder(out)
    assert "1 of 3 clips failed in the last extraction" in caplog.text and "and used: b.npz" in caplog.text
    assert "1 of 3 clips are not of the last extraction" in caplog.text and "and used: a.npz" in caplog.text


def test_a_full_disk_is_a_failure_of_its_clip_that_names_the_file(two_videos, tmp_path, monkeypatch, capsys):
    def full(*_arguments, **_more):
        raise soundfile.LibsndfileError(2)

    monkeypatch.setattr(soundfile, "write", full)
    assert extract(two_videos[0], tmp_path) == 1
    error = capsys.readouterr().err
    assert "GOPR0001.flac: cannot be written" in error and "Traceback" not in error and not state(tmp_path)
