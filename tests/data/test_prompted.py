"""Prompts of a run: prefixes, several per clip, and where their features come from."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from make_data import TINY, put_clip, put_memmap

from selva.data import texts
from selva.data.cache import CACHE_FOLDER
from selva.data.folder_dataset import FolderDataset, load_clip_dataset
from selva.data.memmap.reader import MemmapDataset
from selva.data.order import ClipWindow, read_window
from selva.data.prompted import with_prefix, with_prompts
from selva.features import load_features, save_features
from selva.weights.load import load_clip_text

CPU = torch.device("cpu")


def load(folder) -> FolderDataset | MemmapDataset:
    clips, problems = load_clip_dataset(folder, TINY, None, CPU)
    assert not problems and isinstance(clips, FolderDataset | MemmapDataset)
    return clips


def prompted(clips, prefix="", **options):
    return with_prompts(clips, TINY, None, CPU, prefix, **options)


def prompts_of(clips, index=0) -> list[str]:
    return [clips.prompt(index, number)[0] for number in range(clips.num_prompts(index))]


@pytest.fixture
def folder(tmp_path):
    """Two clips, the first with three prompts in prompts.txt, its features made for the last of them."""
    put_clip(tmp_path / "set", "a", text=True, prompt="a bell rings")
    put_clip(tmp_path / "set", "b", text=True, seed=1)
    (tmp_path / "set" / "prompts.txt").write_text("a: ringing\na: ding\na: a bell rings\n")
    return tmp_path / "set"


@pytest.mark.parametrize("prefix, prompt, expected", [
    ("dog:", "a bark", "dog: a bark"), (" dog: ", "a bark", "dog: a bark"), ("sks", "sks a bark", "sks a bark"),
    ("sks", "skss", "sks skss"), ("", "a bark", "a bark"), ("sks", "", "sks"), ("sks", "sks", "sks"),
])
def test_a_prefix_comes_before_every_prompt_once(prefix, prompt, expected):
    assert with_prefix(prefix, prompt) == expected


def test_a_set_without_either_is_itself(tmp_path):
    put_clip(tmp_path / "set", "a", text=True)
    clips = load(tmp_path / "set")
    assert prompted(clips) is clips and clips.num_prompts(0) == 1
    rows = MemmapDataset(_memmap(tmp_path), TINY)
    assert prompted(rows) is rows


def test_all_prompts_of_a_clip_are_there_its_own_first(folder):
    clips = prompted(load(folder))
    assert prompts_of(clips) == ["a bell rings", "ringing", "ding"] and prompts_of(clips, 1) == ["a knock"]
    assert (clips.clip(0).text_f == 0.5).all() and clips.clip(0).prompt == "a bell rings"  # of the feature file
    expected = load_clip_text("tiny_16k").encode(["ding"])[0]
    assert torch.equal(clips.prompt(0, 2)[1], expected)
    drawn = read_window(clips, ClipWindow(0, 0, 2))
    assert drawn.prompt == "ding" and torch.equal(drawn.text_f, expected)
    assert torch.equal(drawn.clip_f, clips.clip(0).clip_f)
    assert prompts_of(prompted(load(folder), "sks", several=False)) == ["sks a bell rings"]


def test_a_prefix_is_in_the_text_features(folder):
    clips = prompted(load(folder), "sks")
    assert prompts_of(clips) == ["sks a bell rings", "sks ringing", "sks ding"]
    assert torch.equal(clips.clip(1).text_f, load_clip_text("tiny_16k").encode(["sks a knock"])[0])


def test_prompts_from_the_feature_file_are_taken_unless_a_list_has_others(folder):
    (folder / "prompts.txt").unlink()
    path = folder / "b.npz"
    save_features(path, dataclasses.replace(load_features(path), settings={"other_prompts": ["knocks", "a thud"]}))
    clips = prompted(load(folder))
    assert prompts_of(clips, 1) == ["a knock", "knocks", "a thud"] and prompts_of(clips) == ["a bell rings"]
    (folder / "prompts.txt").write_text("b: tap\nb: tapping\n")
    assert prompts_of(prompted(load(folder)), 1) == ["tapping", "tap"]


@pytest.mark.parametrize("settings", [None, {}, {"other_prompts": "x"}, {"other_prompts": [1, None]}])
def test_files_without_other_prompts_have_none(folder, settings):
    path = folder / "b.npz"
    save_features(path, dataclasses.replace(load_features(path), settings=settings))
    assert load_features(path).other_prompts == ()


def test_each_text_is_encoded_once_and_kept(folder, monkeypatch):
    first = prompted(load(folder), "sks")
    monkeypatch.setattr(texts, "load_clip_text", lambda *_: pytest.fail("an encoder was loaded"))
    again = prompted(load(folder), "sks")
    assert torch.equal(first.prompt(0, 1)[1], again.prompt(0, 1)[1])


def test_the_content_tells_what_is_trained_with(folder):
    load(folder)
    (folder / "prompts.txt").unlink()
    plain = load(folder)
    assert prompted(plain).content(1) == plain.content(1)
    found = {prefix: prompted(plain, prefix).content(1)["prompt"] for prefix in ("sks", "other")}
    assert len({plain.content(1)["prompt"], *found.values()}) == 3


def test_prompts_that_are_not_those_of_the_video_features_are_said(folder, caplog):
    with caplog.at_level("INFO"):
        prompted(load(folder))
    assert "1 clip has other prompts than at the extraction" in caplog.text
    caplog.clear()
    prompted(load(folder), "x" * 400)
    assert "the prompt is longer than the 77 tokens" in caplog.text


# -- memmaps -----------------------------------------------------------------------------------------------------------


def _memmap(tmp_path, rows=3):
    put_memmap(tmp_path / "rows", rows)
    return tmp_path / "rows"


def test_rows_of_a_memmap_have_a_prefix_and_several_prompts_too(tmp_path, caplog):
    folder = _memmap(tmp_path)
    (tmp_path / "rows.prompts.txt").write_text('id_1: first\nid_1: says "1"\nid_2: new\nid_7: nobody\n')
    rows = MemmapDataset(folder, TINY)
    clips = prompted(rows)
    assert [prompts_of(clips, index) for index in range(3)] == [['says "0"'], ['says "1"', "first"], ["new"]]
    assert torch.equal(clips.clip(1).text_f, rows.clip(1).text_f)  # its own words: the features of the row
    encoder = load_clip_text("tiny_16k")
    assert torch.equal(clips.clip(2).text_f, encoder.encode(["new"])[0])
    assert torch.equal(clips.prompt(1, 1)[1], encoder.encode(["first"])[0])
    assert "rows.prompts.txt: of no row of" in caplog.text and "id_7" in caplog.text
    assert prompts_of(prompted(rows, "sks"), 1) == ['sks says "1"', "sks first"]


def _record(tmp_path, rows, digests):
    record = {"plan": {"rows": rows}, "digests": digests}
    (tmp_path / "rows.rows.json").write_text(json.dumps(record))


def test_a_label_that_was_edited_has_its_own_text_features(tmp_path, caplog):
    folder = _memmap(tmp_path)
    made = [["id_0", "a gong"], ["left out", "a dog"], ["id_1", 'says "1"'], ["another", "a cat"]]
    _record(tmp_path, made, ["x", None, "x", "x"])
    rows = MemmapDataset(folder, TINY)
    assert rows.edited == ["id_0"] and rows.clip(0).prompt == "a gong"  # nothing is known of what is not in the record
    with caplog.at_level("INFO"):
        clips = prompted(rows)
    assert "1 clip has other prompts than at the extraction (a prefix, several prompts, or edited" in caplog.text
    assert [prompts_of(clips, index) for index in range(3)] == [['says "0"'], ['says "1"'], ['says "2"']]
    assert torch.equal(clips.clip(0).text_f, load_clip_text("tiny_16k").encode(['says "0"'])[0])
    assert clips.clip(0).prompt == 'says "0"' and torch.equal(clips.clip(0).sync_f, rows.clip(0).sync_f)
    for index in (1, 2):
        assert torch.equal(clips.clip(index).text_f, rows.clip(index).text_f)
    (tmp_path / "rows.prompts.txt").write_text("id_0: a gong\n")  # the words of the extraction again
    assert torch.equal(prompted(rows).clip(0).text_f, rows.clip(0).text_f)


@pytest.mark.parametrize("record", ["[" * 200_000, "{}", '{"plan": {"rows": [1]}, "digests": ["x"]}',
                                    '{"plan": {"rows": []}, "digests": []}'])
def test_a_record_that_says_nothing_about_the_rows(tmp_path, record, caplog):
    folder = _memmap(tmp_path)
    (tmp_path / "rows.rows.json").write_text(record)
    rows = MemmapDataset(folder, TINY)
    assert rows.encoded_prompts == rows.prompts and prompted(rows) is rows
    assert ("rows.rows.json: cannot be read" in caplog.text) is ("[]" not in record)


def test_nothing_is_written_into_a_memmap(tmp_path):
    """Its readers look into every folder that lies in it."""
    from tensordict import TensorDict

    folder = _memmap(tmp_path)
    before = sorted(path.name for path in folder.iterdir())
    prompted(MemmapDataset(folder, TINY), "sks")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (tmp_path / f"rows{CACHE_FOLDER}").is_dir()
    assert len(TensorDict.load_memmap(folder)["mean"]) == 3
    prompted(MemmapDataset(folder, TINY), "other", use_cache=False)
    assert len(list((tmp_path / f"rows{CACHE_FOLDER}" / "texts").iterdir())) == 3


@pytest.mark.parametrize("video", [True, False])
def test_of_a_set_without_video_nothing_is_said_about_video_features(tmp_path, caplog, video):
    put_memmap(tmp_path / "rows", rows=2, video=video)
    with caplog.at_level("INFO"):
        prompted(load(tmp_path / "rows"), "sks")
    assert ("2 clips have other prompts than at the extraction" in caplog.text) is video
