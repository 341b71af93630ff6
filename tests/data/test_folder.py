"""The data folder: pairing, prompts, what is left out and why; and the order of the clips in training."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
from golden_case import GOLDEN

from selva.data.folder import AUDIO_SUFFIXES, EpochSampler, read_prompts, scan_folder
from selva.features import FeatureBundle, save_features


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
    with pytest.raises(ValueError, match=r"prompts\.txt: is not UTF-8 text \(byte 10\)"):
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


# --- EpochSampler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_items", "batch_size"), [(10, 4), (7, 3), (5, 5), (5, 1), (3, 8), (1, 2), (6, 5)])
def test_every_epoch_holds_every_item_once(num_items, batch_size):
    sampler = EpochSampler(num_items, batch_size, seed=1)
    drawn = [index for _ in range(6 * num_items) for index in next(sampler)]
    assert len(drawn) == 6 * num_items * batch_size
    for start in range(0, len(drawn), num_items):
        assert sorted(drawn[start : start + num_items]) == list(range(num_items))


@pytest.mark.parametrize(("num_items", "batch_size"), [(10, 4), (7, 3), (5, 5), (6, 5), (2, 2)])
def test_no_batch_holds_an_item_twice(num_items, batch_size):
    sampler = EpochSampler(num_items, batch_size, seed=2)
    for _ in range(200):
        batch = next(sampler)
        assert len(set(batch)) == batch_size


def test_batches_larger_than_the_data_are_balanced():
    batch = next(EpochSampler(3, 8, seed=0))
    assert sorted(Counter(batch).values()) == [2, 3, 3]


def test_epochs_differ_and_every_item_comes_first_equally_often():
    sampler = EpochSampler(4, 4, seed=0)
    epochs = [tuple(next(sampler)) for _ in range(400)]
    assert len(set(epochs)) == 24  # all orders occur
    first = Counter(epoch[0] for epoch in epochs)
    assert all(60 < first[index] < 140 for index in range(4))  # 100 +- 8.7


def test_the_seed_alone_decides():
    torch.manual_seed(1)
    a = EpochSampler(10, 3, seed=5)
    first = [next(a) for _ in range(10)]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = EpochSampler(10, 3, seed=5)
    assert [next(b) for _ in range(10)] == first
    assert torch.equal(torch.get_rng_state(), before)  # and leaves the global state alone
    c = EpochSampler(10, 3, seed=6)
    assert [next(c) for _ in range(10)] != first


@pytest.mark.parametrize("steps", [0, 1, 3, 7, 20])
def test_resuming_continues_exactly(steps, tmp_path):
    sampler = EpochSampler(10, 4, seed=3)
    for _ in range(steps):
        next(sampler)
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    expected = [next(sampler) for _ in range(30)]
    resumed = EpochSampler(10, 4, seed=99)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [next(resumed) for _ in range(30)] == expected


def test_a_state_of_other_data_is_refused():
    with pytest.raises(ValueError, match="over 10 items, but there are 9"):
        EpochSampler(9, 4, 0).load_state_dict(EpochSampler(10, 4, 0).state_dict())
    with pytest.raises(ValueError, match="batches of 4 from 0 items"):
        EpochSampler(0, 4, 0)
