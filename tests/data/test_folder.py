"""The data folder: pairing, prompts, what is left out and why; and the order of the clips in training."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from golden_case import GOLDEN

from selva.data.folder import scan_folder
from selva.features import FeatureBundle, save_features
from selva.inputs.prompts import read_prompts
from selva.inputs.suffixes import AUDIO_SUFFIXES


def put_clip(folder, stem, prompt="", suffix=".wav"):
    save_features(folder / f"{stem}.npz", FeatureBundle(torch.zeros(1, 8, 4), torch.zeros(1, 16, 4), 1.0, prompt))
    if suffix:
        (folder / f"{stem}{suffix}").write_bytes(b"sound")


def reasons(scan):
    return {path.name: reason for path, reason in scan.skipped}


def test_pairs_are_found_in_order_of_their_names(tmp_path):
    for stem in ("b", "a", "c.d", "B"):
        put_clip(tmp_path, stem)
    (tmp_path / "sub").mkdir()
    put_clip(tmp_path / "sub", "deeper")
    scan = scan_folder(tmp_path)
    assert [clip.id for clip in scan.clips] == ["B", "a", "b", "c.d"]
    assert [clip.audio_path.name for clip in scan.clips] == ["B.wav", "a.wav", "b.wav", "c.d.wav"]
    assert all(clip.features_path == tmp_path / f"{clip.id}.npz" for clip in scan.clips)
    assert scan.skipped == []


def test_the_sound_that_was_extracted_with_the_features_is_taken(tmp_path, caplog):
    put_clip(tmp_path, "a", suffix=".wav")
    put_clip(tmp_path, "b", suffix=".wav")
    for stem in ("a", "b"):
        (tmp_path / f"{stem}.flac").write_bytes(b"sound")
    save_features(tmp_path / "b.npz", FeatureBundle(
        torch.zeros(1, 8, 4), torch.zeros(1, 16, 4), 1.0, origin={"sound": "b.flac", "sound_sha256": "0"}))
    assert [clip.audio_path.name for clip in scan_folder(tmp_path).clips] == ["a.wav", "b.flac"]
    assert "b.flac is used as the sound of b, not b.wav" in caplog.text


def test_everything_left_out_is_named_and_ids_stay_with_their_files(tmp_path):
    put_clip(tmp_path, "a")
    put_clip(tmp_path, "b", suffix="")
    put_clip(tmp_path, "c")
    put_clip(tmp_path, "d")
    (tmp_path / "c.npz").write_bytes(b"rubbish")
    (tmp_path / "e.flac").write_bytes(b"sound")
    (tmp_path / "notes.md").write_text("not part of the data")
    (tmp_path / "._a.npz").write_bytes(b"what macOS leaves on foreign disks")
    scan = scan_folder(tmp_path)
    assert [(clip.id, clip.features_path.name, clip.audio_path.name) for clip in scan.clips] == [
        ("a", "a.npz", "a.wav"),
        ("d", "d.npz", "d.wav"),
    ]
    found = reasons(scan)
    assert set(found) == {"b.npz", "c.npz", "e.flac"}
    assert "no sound beside it" in found["b.npz"] and "b.wav" in found["b.npz"]
    assert len(found["b.npz"]) < 80  # not all of the two dozen kinds of sound
    assert found["c.npz"].startswith("cannot be read")
    assert "no features beside it (e.npz)" in found["e.flac"]


def test_the_choice_between_sounds_is_fixed_and_said(tmp_path, caplog):
    """Pitfall A7."""
    put_clip(tmp_path, "a", suffix="")
    for suffix in (".ogg", ".mp3", ".FLAC", ".aif"):
        (tmp_path / f"a{suffix}").write_bytes(b"sound")
    assert scan_folder(tmp_path).clips[0].audio_path.name == "a.FLAC"
    assert "a.FLAC is used as the sound of a, not a.mp3, a.ogg, a.aif" in caplog.text
    assert isinstance(AUDIO_SUFFIXES, tuple)  # a set would order them differently in every process


def test_prompt_priority(tmp_path):
    data = tmp_path / "dog barks"
    data.mkdir()
    put_clip(data, "a", prompt="from the features")
    put_clip(data, "b", prompt="from the features")
    put_clip(data, "c")
    (data / "prompts.txt").write_text("a.npz: from the list\n")
    found = [(clip.prompt, clip.prompt_source) for clip in scan_folder(data).clips]
    assert found == [("from the list", "prompts.txt"), ("from the features", "features"), ("dog barks", "folder")]


def test_prompts_file(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        "\ufeffa.npz: first: with a colon\r\n"
        "  # a.npz: a comment\n"
        "\n"
        "no separator\n"
        "  b  :  größer  \n"
        "c.npz: old\n"
        "c.npz: new\n"
        "d.npz: full name wins\n"
        "d: stem\n"
        "e.npz:\n".encode()
    )
    assert read_prompts(path) == {
        "a.npz": "first: with a colon",
        "b.npz": "größer",
        "c.npz": "new",
        "d.npz": "full name wins",
    }
    assert "no prompt after 'e.npz'" in caplog.text
    path.write_bytes(b"a.npz: caf\xe9\n")
    with pytest.raises(ValueError, match=r"prompts\.txt, line 1: is not UTF-8 text; save it as UTF-8"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        read_prompts(tmp_path / "none.txt")


def test_what_is_known_about_the_features_without_reading_them_again(tmp_path):
    put_clip(tmp_path, "a", prompt="words")
    put_clip(tmp_path, "b", prompt="other words")
    bundle = FeatureBundle(torch.zeros(1, 9, 4), torch.ones(1, 8, 5), 1.2, text_features=torch.zeros(1, 77, 3))
    save_features(tmp_path / "c.npz", bundle)
    (tmp_path / "c.wav").write_bytes(b"sound")
    a, b, c = scan_folder(tmp_path).clips
    assert (a.clip_shape, a.sync_shape, a.text_shape, a.duration_sec) == ((8, 4), (16, 4), None, 1.0)
    assert (c.clip_shape, c.sync_shape, c.text_shape, c.duration_sec) == ((9, 4), (8, 5), (77, 3), 1.2)
    assert (a.extracted_prompt, c.extracted_prompt) == ("words", "")
    assert a.features_hash == b.features_hash != c.features_hash


def test_path_tricks_in_prompts_reach_nothing(tmp_path, caplog):
    data = tmp_path / "data"
    data.mkdir()
    put_clip(data, "a", prompt="own")
    put_clip(tmp_path, "outside")
    (data / "prompts.txt").write_text(f"../outside.npz: x\n{tmp_path}/outside.npz: x\n./a.npz: x\n%s: x\n")
    scan = scan_folder(data)
    assert [(clip.id, clip.prompt) for clip in scan.clips] == [("a", "own")]
    assert "../outside.npz" in caplog.text  # said, because it is most likely a mistake


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        scan_folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: is a file"):
        scan_folder(tmp_path / "file")
    scan = scan_folder(tmp_path)
    assert scan.clips == [] and scan.skipped == []


def test_importing_it_loads_no_media_library():
    heavy = {"av", "soundfile", "torchvision", "torchaudio", "open_clip", "transformers"}
    code = f"import sys, selva.data.folder; print({heavy} & set(sys.modules))"
    root = GOLDEN.parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "set()"


def test_one_damaged_feature_file_never_stops_a_folder(tmp_path):
    for stem in "abcd":
        put_clip(tmp_path, stem)
    (tmp_path / "b.npz").write_bytes((tmp_path / "b.npz").read_bytes().replace(b"{'descr'", b"{'descr("))
    encrypted = bytearray((tmp_path / "c.npz").read_bytes())
    encrypted[6] = encrypted[encrypted.index(b"PK\x01\x02") + 8] = 1
    (tmp_path / "c.npz").write_bytes(encrypted)
    scan = scan_folder(tmp_path)
    assert [clip.id for clip in scan.clips] == ["a", "d"]
    assert [path.name for path, _ in scan.skipped] == ["b.npz", "c.npz"]
    assert all("cannot be read as a feature file" in reason for _, reason in scan.skipped)
