"""Numbers that clips get, and keep."""

from __future__ import annotations

import unicodedata

import pytest
import torch

from selva.features import FeatureBundle, load_settings, save_features
from selva.inputs.names import numbered_names


def write(path, settings):
    save_features(path, FeatureBundle(torch.zeros(1, 8, 4), torch.zeros(1, 8, 4), 1.0, settings=settings))


def made_of(source, start=0.0):
    return {"source": source, "start_sec": start, "duration_sec": 8.0}


def test_fresh_numbers_follow_the_order(tmp_path):
    clips = [("b.mp4", 0.0), ("a.mp4", 0.0), ("a.mp4", 8.0)]
    for folder in (None, tmp_path, tmp_path / "none"):
        assert numbered_names("dog", clips, folder) == ["dog_001", "dog_002", "dog_003"]
    assert numbered_names("../a\\b\0c", clips[:1]) == [".._a_b_c_001"]
    with pytest.raises(ValueError, match="empty"):
        numbered_names("", clips)


def test_clips_keep_their_numbers_and_nobody_elses_is_used(tmp_path, caplog):
    write(tmp_path / "dog_001.npz", made_of("a.mp4"))
    write(tmp_path / "dog_002.npz", None)  # of another program
    (tmp_path / "dog_003.npz").write_bytes(b"damaged")
    write(tmp_path / "dog_005.npz", made_of("a.mp4", 8.0))
    write(tmp_path / "doggy_004.npz", made_of("b.mp4"))
    clips = [("c.mp4", 0.0), ("a.mp4", 8.0), ("a.mp4", 0.0), ("b.mp4", 0.0)]
    assert numbered_names("dog", clips, tmp_path) == ["dog_004", "dog_005", "dog_001", "dog_006"]
    assert "dog_003.npz" in caplog.text
    assert numbered_names("cat", clips, tmp_path)[0] == "cat_001"


def test_one_video_after_the_other_collects_them(tmp_path):
    for number, source in enumerate(["a.mp4", "b.mp4", "a.mp4", "c.mp4"]):
        (name,) = numbered_names("dog", [(source, 0.0)], tmp_path)
        assert name == ["dog_001", "dog_002", "dog_001", "dog_003"][number]
        write(tmp_path / f"{name}.npz", made_of(source))


def test_processes_that_start_later_agree(tmp_path):
    clips = [(f"{index}.mp4", 0.0) for index in range(6)] + [("0.mp4", 0.0)]  # one twice, with another mask say
    write(tmp_path / "dog_002.npz", None)
    first = numbered_names("dog", clips, tmp_path)
    for done in (4, 1, 6, 0):
        write(tmp_path / f"{first[done]}.npz", made_of(*clips[done]))
        if done == 6:  # of two equal clips the later one alone is there: they may swap, the set stays
            assert sorted(numbered_names("dog", clips, tmp_path)) == sorted(first)
        else:
            assert numbered_names("dog", clips, tmp_path) == first


def test_a_disk_that_decomposes_accents_keeps_the_numbers_too(tmp_path):
    written, found = (unicodedata.normalize(form, "b\u00e9b\u00e9") for form in ("NFC", "NFD"))
    write(tmp_path / f"{found}_001.npz", made_of("a.mp4"))
    assert numbered_names(written, [("b.mp4", 0.0), ("a.mp4", 0.0)], tmp_path) == [f"{written}_002", f"{written}_001"]


def test_sounds_without_features_may_count(tmp_path):
    """Not where several processes write: the sound of a clip comes before its features."""
    (tmp_path / "dog_001.flac").touch()
    (tmp_path / "dog_001b.wav").touch()
    assert numbered_names("dog", [("a.mp4", 0.0)], tmp_path) == ["dog_001"]
    assert numbered_names("dog", [("a.mp4", 0.0)], tmp_path, keep_sounds=True) == ["dog_002"]
    write(tmp_path / "dog_001.npz", made_of("a.mp4"))
    assert numbered_names("dog", [("a.mp4", 0.0)], tmp_path, keep_sounds=True) == ["dog_001"]


def test_settings_are_read_alone(tmp_path):
    write(tmp_path / "a.npz", made_of("a.mp4"))
    assert load_settings(tmp_path / "a.npz") == made_of("a.mp4")
    write(tmp_path / "b.npz", None)
    assert load_settings(tmp_path / "b.npz") is None
    (tmp_path / "c.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"c\.npz: cannot be read as a feature file"):
        load_settings(tmp_path / "c.npz")
    with pytest.raises(FileNotFoundError):
        load_settings(tmp_path / "d.npz")
