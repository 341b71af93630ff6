"""scripts/convert_dataset.py on small data sets, in-process."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from make_data import TINY, put_clip, put_memmap
from script_args import TINY as ARGS

from scripts import convert_dataset
from selva.data.folder import scan_folder
from selva.data.folder_dataset import load_clip_dataset
from selva.data.latents import encode_latents, load_waveform
from selva.data.memmap.reader import MemmapDataset
from selva.extraction import convert as convert_module
from selva.extraction.extractor import FeatureExtractor
from selva.features import load_features
from selva.media import read_audio
from selva.models.zoo import build_mel
from selva.sequence import sequence_config
from selva.weights.load import load_vae


def convert(*arguments) -> int:
    return convert_dataset.main([*map(str, arguments), *ARGS])


def put_folder(folder: Path) -> Path:
    """Write three clips of 8 s, one of them with another rate and text features, and one that is too short."""
    put_clip(folder, "a", 8.0, "a knock", seed=1)
    put_clip(folder, "b", 8.0, "a bell", seed=2, rate=44_100, text=True)
    put_clip(folder, "c", 8.0, "a dog", seed=3)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


# -- folder -> memmap --------------------------------------------------------------------------------------------------


def test_a_memmap_holds_what_training_on_the_folder_would_use(tmp_path, capsys):
    source = put_folder(tmp_path / "clips")
    (source / "prompts.txt").write_text("c.npz: a wolf\n")
    assert convert(source, tmp_path / "data") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'data'}\n"

    found = MemmapDataset(tmp_path / "data", TINY)
    expected, problems = load_clip_dataset(source, TINY, None, torch.device("cpu"))
    assert problems == [] and found.ids == expected.ids == ["a", "b", "c"]
    for index in range(3):
        row, clip = found.clip(index), expected.clip(index)
        assert row.prompt == clip.prompt
        for name in ("mean", "std", "text_f", "clip_f", "sync_f"):
            assert torch.equal(getattr(row, name), getattr(clip, name)), (name, index)
    assert found.prompts == ["a knock", "a bell", "a wolf"]


def test_tensordict_alone_reads_it(tmp_path):
    from tensordict import TensorDict

    convert(put_folder(tmp_path / "clips"), tmp_path / "data")
    tensors = TensorDict.load_memmap(tmp_path / "data")
    waveform = load_waveform(tmp_path / "clips" / "b.wav", sequence_config("16k"), "peak")
    mean, _ = encode_latents(waveform[None], build_mel("16k"), load_vae("tiny_16k", None, "cpu"))
    assert torch.equal(tensors["mean"][1], mean[0])
    assert (tensors["text_features"][1] == 0.5).all()  # those of the feature file
    text = FeatureExtractor(TINY, None, torch.device("cpu")).text_features("a knock")
    assert torch.equal(tensors["text_features"][0], text[0])


def test_clips_that_cannot_be_converted_are_named(tmp_path, caplog):
    source = put_folder(tmp_path / "clips")
    put_clip(source, "short", 3.0)
    put_clip(source, "long", 10.0)
    put_clip(source, "silent", 8.0, sound=np.zeros(8 * 16_000, np.float32))
    put_clip(source, "mute", 8.0)
    (source / "mute.wav").unlink()
    assert convert(source, tmp_path / "data") == 1
    assert MemmapDataset(tmp_path / "data", TINY).ids == ["a", "b", "c"]
    for text in ("short.npz: covers 3 s", "long.npz: covers 10 s", "silent.wav: the sound is silent",
                 "mute.npz: no sound beside it"):
        assert f"left out {source}/{text}" in caplog.text
    assert "3 converted, 0 already current, 4 left out" in caplog.text
    assert "without a prompt" not in caplog.text


def test_clips_that_take_the_name_of_the_folder_as_prompt_are_named(tmp_path, caplog):
    source = put_folder(tmp_path / "clips")
    put_clip(source, "nameless", 8.0, prompt="")
    assert convert(source, tmp_path / "data") == 0
    assert "1 clip without a prompt, so their prompt is the name of the folder, 'clips': nameless" in caplog.text


def test_rows_hold_padded_sound_and_say_so(tmp_path, caplog):
    source = tmp_path / "clips"
    put_clip(source, "full", 8.0)
    put_clip(source, "knock", 8.0, sound=np.ones(32_000, np.float32) * 0.1)
    assert convert(source, tmp_path / "data") == 0
    warned = [line for line in caplog.messages if "the rest of its row is silence" in line]
    assert len(warned) == 1 and f"{source}/knock.wav: only 2.00 s of sound for features of 8 s" in warned[0]
    sound = load_waveform(source / "knock.wav", sequence_config("16k"), "peak")
    assert not sound[32_000:].any()
    mean, _ = encode_latents(sound[None], build_mel("16k"), load_vae("tiny_16k", None, "cpu"))
    clip = MemmapDataset(tmp_path / "data", TINY).clip(1)
    assert torch.equal(clip.mean, mean[0]) and clip.padding is None


def test_a_second_run_converts_what_has_changed(tmp_path, caplog):
    source = put_folder(tmp_path / "clips")
    convert(source, tmp_path / "data")
    before = snapshot(tmp_path / "data")
    assert convert(source, tmp_path / "data") == 0
    assert snapshot(tmp_path / "data") == before and "0 converted, 3 already current" in caplog.text

    put_clip(source, "b", 8.0, "a bell", seed=9, text=True)
    assert convert(source, tmp_path / "data") == 0
    assert "1 converted, 2 already current" in caplog.text
    assert snapshot(tmp_path / "data")["mean.memmap"] != before["mean.memmap"]
    assert convert(source, tmp_path / "data", "--normalize_audio", "none") == 0
    assert "3 converted, 0 already current" in caplog.text


def test_a_label_that_mmaudio_cannot_read_becomes_the_name_of_the_folder(tmp_path, caplog):
    """Its reader takes such texts for missing values, and its trainer stops at them."""
    source = put_folder(tmp_path / "dogs")
    put_clip(source, "b", 8.0, "null", seed=2, text=True)
    (source / "prompts.txt").write_text("c.npz: NaN\n")
    assert convert(source, tmp_path / "data") == 0
    assert (tmp_path / "data.tsv").read_text() == "id\tlabel\na\ta knock\nb\tdogs\nc\tdogs\n"
    assert "the folder's name, 'dogs', is the prompt: 2 of 3 clips: b ('null'), c ('NaN')" in caplog.text
    text = FeatureExtractor(TINY, None, torch.device("cpu")).text_features("dogs")
    assert torch.equal(MemmapDataset(tmp_path / "data", TINY).clip(1).text_f, text[0])  # not those of "null"
    put_clip(source, "NA", 8.0, "a cat")
    assert convert(source, tmp_path / "other") == 1
    assert "MMAudio's reader takes the ids 'NA' for missing values; rename" in caplog.text
    assert not (tmp_path / "other.tsv").exists()


# -- memmap -> folder --------------------------------------------------------------------------------------------------


def test_feature_files_hold_everything_of_the_rows(tmp_path, capsys, caplog):
    tensors = put_memmap(tmp_path / "data", rows=3)
    assert convert(tmp_path / "data", tmp_path / "clips") == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "clips" / f"id_{i}.npz") for i in range(3)]
    assert "a memmap holds no sound" in caplog.text
    for index in range(3):
        bundle = load_features(tmp_path / "clips" / f"id_{index}.npz")
        assert (bundle.duration, bundle.prompt, bundle.variant) == (8.0, f'says "{index}"', "tiny_16k")
        for key, value in (("mean", bundle.latent_mean), ("std", bundle.latent_std),
                           ("text_features", bundle.text_features), ("clip_features", bundle.clip_features),
                           ("sync_features", bundle.sync_features)):
            assert value is not None and torch.equal(value[0], tensors[key][index])


@pytest.mark.parametrize(("rows", "flags"), [(3, []), (1, ["--decode_audio"])])
def test_there_and_back_is_the_same_set(tmp_path, rows, flags):
    put_memmap(tmp_path / "data", rows)
    assert convert(tmp_path / "data", tmp_path / "clips", *flags) == 0
    assert convert(tmp_path / "clips", tmp_path / "again") == 0
    for path in (tmp_path / "data").iterdir():
        if path.suffix == ".memmap":
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert (tmp_path / "data.tsv").read_bytes() == (tmp_path / "again.tsv").read_bytes()


def test_a_folder_comes_back_with_all_but_its_sound(tmp_path):
    source = put_folder(tmp_path / "clips")
    convert(source, tmp_path / "data")
    convert(tmp_path / "data", tmp_path / "back")
    for path in source.glob("*.npz"):
        before, after = load_features(path), load_features(tmp_path / "back" / path.name)
        assert torch.equal(before.clip_features, after.clip_features)
        assert torch.equal(before.sync_features, after.sync_features)
        assert (before.prompt, before.duration) == (after.prompt, after.duration)
    assert not list((tmp_path / "back").glob("*.wav"))


def test_decoded_sound_lies_beside_the_features(tmp_path, caplog):
    put_memmap(tmp_path / "data", rows=1)
    assert convert(tmp_path / "data", tmp_path / "back") == 0
    assert convert(tmp_path / "data", tmp_path / "back", "--decode_audio") == 0
    assert "approximations" in caplog.text
    scan = scan_folder(tmp_path / "back")
    assert [clip.id for clip in scan.clips] == ["id_0"] and scan.skipped == []
    waveform, rate = read_audio(tmp_path / "back" / "id_0.flac")
    assert (tuple(waveform.shape), rate) == ((1, 128_000), 16_000) and waveform.any()


def test_sound_that_replaces_what_was_decoded_counts(tmp_path):
    put_memmap(tmp_path / "data", rows=1)
    convert(tmp_path / "data", tmp_path / "clips", "--decode_audio")
    (tmp_path / "clips" / "id_0.flac").unlink()
    put_clip(tmp_path / "other", "id_0", 8.0)
    shutil.copy(tmp_path / "other" / "id_0.wav", tmp_path / "clips")
    convert(tmp_path / "clips", tmp_path / "again")
    waveform = load_waveform(tmp_path / "clips" / "id_0.wav", sequence_config("16k"), "peak")
    mean, _ = encode_latents(waveform[None], build_mel("16k"), load_vae("tiny_16k", None, "cpu"))
    assert torch.equal(MemmapDataset(tmp_path / "again", TINY).clip(0).mean, mean[0])


def test_a_second_run_writes_what_is_missing(tmp_path, capsys):
    put_memmap(tmp_path / "data", rows=3)
    convert(tmp_path / "data", tmp_path / "clips")
    before = snapshot(tmp_path / "clips")
    (tmp_path / "clips" / "id_1.npz").unlink()
    capsys.readouterr()
    assert convert(tmp_path / "data", tmp_path / "clips") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'clips' / 'id_1.npz'}\n"
    after = snapshot(tmp_path / "clips")
    assert after["id_1.npz"][0] == before.pop("id_1.npz")[0] and before.items() <= after.items()


def test_an_edited_label_is_converted_again(tmp_path, caplog):
    put_memmap(tmp_path / "data", rows=2)
    assert convert(tmp_path / "data", tmp_path / "clips", "--decode_audio") == 0
    before = snapshot(tmp_path / "clips")
    (tmp_path / "data.tsv").write_text("id\tlabel\nid_0\ta wolf\nid_1\tsays \"1\"\n")
    caplog.clear()
    assert convert(tmp_path / "data", tmp_path / "clips") == 0
    assert "1 converted, 1 already current, 0 left out" in caplog.text
    assert load_features(tmp_path / "clips" / "id_0.npz").prompt == "a wolf"
    after = snapshot(tmp_path / "clips")
    assert [name for name in before if before[name] != after[name]] == ["id_0.npz"]  # the sound is the same

    caplog.clear()
    assert convert(tmp_path / "data", tmp_path / "clips", "--decode_audio") == 0
    assert "0 converted, 2 already current" in caplog.text and snapshot(tmp_path / "clips") == after


def test_an_edited_label_does_not_keep_the_text_features_of_the_old_one(tmp_path, caplog):
    convert(put_folder(tmp_path / "clips"), tmp_path / "data")
    convert(tmp_path / "data", tmp_path / "back")
    assert "edited after" not in caplog.text
    table = tmp_path / "data.tsv"
    table.write_text(table.read_text().replace("a bell", "a violin"))
    assert convert(tmp_path / "data", tmp_path / "back") == 0 and "1 converted, 2 already current" in caplog.text
    assert ("1 label was edited after the extraction, so no text features are written, which training makes of the new "
            "words; the video features stay those of the label before: b") in caplog.text
    assert load_features(tmp_path / "back" / "a.npz").text_features is not None
    bundle = load_features(tmp_path / "back" / "b.npz")
    assert bundle.prompt == "a violin" and bundle.text_features is None and bundle.latent_mean is not None
    assert convert(tmp_path / "data", tmp_path / "back") == 0 and "0 converted, 3 already current" in caplog.text

    assert convert(tmp_path / "back", tmp_path / "again") == 0
    row = MemmapDataset(tmp_path / "again", TINY).clip(1)
    text = FeatureExtractor(TINY, None, torch.device("cpu")).text_features("a violin")
    assert row.prompt == "a violin" and torch.equal(row.text_f, text[0])


def test_an_edited_list_of_prompts_is_converted_again(tmp_path, caplog):
    source = put_folder(tmp_path / "clips")
    assert convert(source, tmp_path / "data") == 0
    (source / "prompts.txt").write_text("b.npz: a gong\n")
    assert convert(source, tmp_path / "data") == 0 and "1 converted, 2 already current" in caplog.text
    assert "several prompts" not in caplog.text
    (source / "prompts.txt").write_text("b.npz: struck\nb.npz: a gong\n")
    assert convert(source, tmp_path / "data") == 0 and "b: several prompts, of which a row of a memmap" in caplog.text
    assert MemmapDataset(tmp_path / "data", TINY).prompts == ["a knock", "a gong", "a dog"]


def test_rows_of_other_weights_are_converted_again(tmp_path, caplog, monkeypatch):
    source = put_folder(tmp_path / "clips")
    convert(source, tmp_path / "data")
    monkeypatch.setattr(convert_module, "weights_identity", lambda variant, folder, parts: f"other {parts}")
    assert convert(source, tmp_path / "data") == 0 and "3 converted, 0 already current" in caplog.text.splitlines()[-1]


@pytest.mark.parametrize(("name", "said"), [
    ("id_0.flac", "id_0.flac: is in the way, it is not, or no longer, what"),
    ("id_0.wav", "id_0.wav: is in the way, convert_dataset.py did not write it"),
])
@pytest.mark.parametrize("first", [None, [], ["--decode_audio"]])
def test_a_sound_of_the_users_own_is_never_replaced(tmp_path, caplog, name, said, first):
    put_memmap(tmp_path / "data", rows=1)
    (tmp_path / "clips").mkdir()
    if first is not None:
        convert(tmp_path / "data", tmp_path / "clips", *first)
        (tmp_path / "clips" / "id_0.flac").unlink(missing_ok=True)
    own = tmp_path / "clips" / name
    soundfile.write(own, np.full(1000, 0.1), 16_000)
    before = snapshot(tmp_path / "clips")
    assert convert(tmp_path / "data", tmp_path / "clips", "--decode_audio") == 1
    assert said in caplog.text and snapshot(tmp_path / "clips") == before
    assert convert(tmp_path / "data", tmp_path / "clips") == 0 and own.read_bytes() == before[name][0]


def test_what_a_killed_run_has_decoded_is_its_own(tmp_path):
    put_memmap(tmp_path / "data", rows=1)
    convert(tmp_path / "data", tmp_path / "clips", "--decode_audio")
    before = snapshot(tmp_path / "clips")
    (tmp_path / "clips" / "id_0.npz").unlink()  # killed before they were written
    assert convert(tmp_path / "data", tmp_path / "clips", "--decode_audio") == 0
    after = snapshot(tmp_path / "clips")
    assert after["id_0.flac"] == before["id_0.flac"] and after["id_0.npz"][0] == before["id_0.npz"][0]


@pytest.mark.parametrize("flags", [[], ["--decode_audio"]])
def test_no_sound_of_older_latents_stays(tmp_path, caplog, flags):
    put_memmap(tmp_path / "data", rows=1)
    convert(tmp_path / "data", tmp_path / "clips", "--decode_audio")
    sound = tmp_path / "clips" / "id_0.flac"
    old = sound.read_bytes()
    with open(tmp_path / "data" / "mean.memmap", "r+b") as file:
        file.write(np.zeros(250 * 20, np.float32).tobytes())
    assert convert(tmp_path / "data", tmp_path / "clips", *flags) == 0
    if flags:
        assert sound.read_bytes() != old
    else:
        assert not sound.exists() and "id_0.flac: removed: it was decoded from earlier latents" in caplog.text


def test_files_of_rows_that_are_gone_are_named(tmp_path, caplog):
    put_memmap(tmp_path / "data", rows=2)
    convert(tmp_path / "data", tmp_path / "clips")
    (tmp_path / "data.tsv").write_text('id\tlabel\nid_0\tsays "0"\nnew\tx\n')
    convert(tmp_path / "data", tmp_path / "clips")
    assert "id_1.npz: no longer in data" in caplog.text


def test_rows_that_cannot_be_converted_are_named(tmp_path, caplog):
    put_memmap(tmp_path / "data", rows=5)
    (tmp_path / "data.tsv").write_text("id\tlabel\na\tx\na\ty\n../b\tz\nc\tx\nd\tx\n")
    with open(tmp_path / "data" / "mean.memmap", "r+b") as file:
        file.seek(3 * 250 * 20 * 4)
        file.write(b"\x00\x00\xc0\x7f")
    put_clip(tmp_path / "clips", "d", 8.0)
    mine = (tmp_path / "clips" / "d.npz").read_bytes()
    assert convert(tmp_path / "data", tmp_path / "clips") == 1
    assert sorted(path.name for path in (tmp_path / "clips").glob("*.npz")) == ["a.npz", "d.npz"]
    assert (tmp_path / "clips" / "d.npz").read_bytes() == mine and not (tmp_path / "b.npz").exists()
    for text in ("row 1 ('a'): the id comes more than once", "row 2 ('../b'): an id is a file name",
                 "row 3 ('c'): latent_mean has 1 value", "d.npz is in the way"):
        assert text in caplog.text


# -- wrong usage -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_asked_for(tmp_path, capsys):
    put_memmap(tmp_path / "sound", rows=2, video=False)
    put_folder(tmp_path / "clips")
    (tmp_path / "empty").mkdir()
    for arguments, code, message in (
        ((tmp_path / "sound", tmp_path / "x"), 1, "is a set of sound without pictures"),
        ((tmp_path / "clips", tmp_path / "x", "--decode_audio"), 2, "is a folder of features"),
        ((tmp_path / "clips", tmp_path / "clips"), 2, "source and target at once"),
        ((tmp_path / "nothing", tmp_path / "x"), 1, "no such folder"),
        ((tmp_path / "empty", tmp_path / "x"), 1, "no clips in it"),
    ):
        assert convert(*arguments) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
