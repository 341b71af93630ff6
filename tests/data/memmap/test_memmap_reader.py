"""Memmaps of MMAudio: read row by row, and refused with the reason where they do not fit."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from golden_case import GOLDEN
from make_data import TINY, put_memmap

from selva.data.folder_dataset import load_clip_dataset
from selva.data.memmap.reader import MemmapDataset, is_memmap
from selva.data.order import BucketBatchSampler
from selva.data.split import origin_groups
from selva.models.variants import get_variant


def live_tensors():
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def load(folder, variant=TINY, **options):
    return load_clip_dataset(folder, variant, None, torch.device("cpu"), **options)


def edit_meta(folder, change):
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def test_rows_are_what_tensordict_wrote(tmp_path):
    tensors = put_memmap(tmp_path / "vgg-train")
    rows, problems = load(tmp_path / "vgg-train")
    assert problems == [] and len(rows) == 5 and rows.ids == [f"id_{i}" for i in range(5)]
    assert rows.lengths(0) == (250, 64, 192) and rows.num_windows(0) == 1
    names = {"mean": "mean", "std": "std", "text_features": "text_f"}
    names |= {"clip_features": "clip_f", "sync_features": "sync_f"}
    for index in (4, 0):
        clip = rows.clip(index)
        assert clip.id == f"id_{index}" and clip.prompt == f'says "{index}"' and clip.lengths == rows.lengths(index)
        assert clip.has_video and clip.audio_path is None
        assert all(torch.equal(getattr(clip, name), tensors[key][index]) for key, name in names.items())


def test_sound_without_pictures_never_passes_for_black_pictures(tmp_path):
    """Pitfall B1: missing features are marked, not zero."""
    tensors = put_memmap(tmp_path / "sounds", video=False)
    rows, _ = load(tmp_path / "sounds")
    batch = next(BucketBatchSampler(rows, 3, seed=0))
    assert batch.lengths == (250, 64, 192) and batch.clip_f.shape[2] == 64 and not batch.has_video.any()
    assert batch.clip_f.isnan().all() and batch.sync_f.isnan().all()
    for name, row in zip(batch.ids, batch.mean, strict=True):
        assert torch.equal(row, tensors["mean"][int(name.removeprefix("id_"))])


@pytest.mark.parametrize("column", ["label", "caption"])
def test_label_and_caption_are_both_understood(tmp_path, column):
    put_memmap(tmp_path / "data", column=column)
    assert load(tmp_path / "data")[0].clip(2).prompt == 'says "2"'


def test_rows_are_read_when_visited_and_let_go_of(tmp_path):
    put_memmap(tmp_path / "data", rows=30)
    before = live_tensors()
    rows, _ = load(tmp_path / "data")
    visited = []
    for index in range(30):
        clip = rows.clip(index)
        visited.append(weakref.ref(clip))
    del clip
    assert live_tensors() <= before
    assert not any(ref() for ref in visited)


def test_the_files_are_mapped_not_read(tmp_path):
    """300 GB of rows cost nothing until they are visited."""
    put_memmap(tmp_path / "data", rows=2)
    rows = 10**6

    def grow(meta):
        for key in ("mean", "std", "text_features", "clip_features", "sync_features"):
            size = (tmp_path / "data" / f"{key}.memmap").stat().st_size
            os.truncate(tmp_path / "data" / f"{key}.memmap", size // 2 * rows)
            meta[key]["shape"][0] = rows

    edit_meta(tmp_path / "data", grow)
    (tmp_path / "data.tsv").write_text("id\tlabel\n" + "x\ty\n" * rows)
    clips, _ = load(tmp_path / "data")
    assert len(clips) == rows and clips.clip(rows - 1).mean.abs().sum() == 0


def remove(name):
    return lambda folder: (folder / name).unlink()


def meta_change(change):
    return lambda folder: edit_meta(folder, change)


BROKEN = {
    "no table": (lambda f: f.with_name("data.tsv").unlink(), "data.tsv: no such file"),
    "short table": (lambda f: f.with_name("data.tsv").write_text("id\tlabel\na\tb\n"), "has 1 row, but the tensors"),
    "wrong columns": (lambda f: f.with_name("data.tsv").write_text("name\tlabel\na\tb\n"),
                      "column id missing (found: name, label); expected id and"),
    "empty table": (lambda f: f.with_name("data.tsv").write_text(""), "column id missing (found: nothing)"),
    "half a row": (lambda f: f.with_name("data.tsv").write_text("id\tlabel\na\n"), "line 2: has fewer columns"),
    "no label": (lambda f: f.with_name("data.tsv").write_text("id\ttext\na\tb\n"),
                 "the columns id, text, expected id"),
    "long row": (lambda f: f.with_name("data.tsv").write_text("id\tlabel\na\tb\tc\n"),
                 "line 2: more cells than columns"),
    "swallowed rows": (lambda f: f.with_name("data.tsv").write_text(
        'id\tlabel\na\t"b\nb\tc\nc\td"\nd\te\ne\tf\n'), "lines 2 to 4 would be one row"),
    "deep meta": (lambda f: (f / "meta.json").write_text("[" * 200_000), "meta.json: is not JSON"),
    "not text": (lambda f: f.with_name("data.tsv").write_bytes(b"id\tlabel\ncaf\xe9\tb\n"), "data.tsv"),
    "no file": (remove("std.memmap"), "std.memmap: no such file, although meta.json names it"),
    "cut file": (lambda f: os.truncate(f / "std.memmap", 100), "std.memmap: has 100 bytes, expected 100000"),
    "no meta": (lambda f: (f / "meta.json").write_text("{"), "meta.json: is not JSON"),
    "other meta": (lambda f: (f / "meta.json").write_text('{"rank": 16}'), "is not a TensorDict memmap"),
    "missing key": (meta_change(lambda m: (m.pop("mean"), m.pop("sync_features"))), "mean and sync_features missing"),
    "other type": (meta_change(lambda m: m["mean"].update(dtype="torch.float16")), "mean is torch.float16"),
    "uneven": (meta_change(lambda m: m["mean"].update(shape=[4, 250, 20])), "tensors of 4, 5 rows"),
    "odd shape": (meta_change(lambda m: m["mean"].update(shape=[])), "mean is (), expected (n, 250, 20)"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_memmap_says_what_is_wrong(tmp_path, kind):
    put_memmap(tmp_path / "data")
    spoil, message = BROKEN[kind]
    spoil(tmp_path / "data")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(tmp_path / "data")
    assert message in str(caught.value) and str(tmp_path / "data") in str(caught.value)


def test_data_of_another_variant_are_refused_with_every_difference(tmp_path):
    put_memmap(tmp_path / "data")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "data", get_variant("small_44k"))
    for text in ("mean is (5, 250, 20), expected (n, 345, 40) for small_44k", "text_features is (5, 77, 64)", "1024"):
        assert text in str(caught.value)


def test_latents_cannot_be_cut(tmp_path):
    put_memmap(tmp_path / "data")
    with pytest.raises(ValueError, match="cannot be cut to 5 s; leave out --duration"):
        load(tmp_path / "data", max_duration_sec=5)


def test_values_that_are_not_finite_are_named(tmp_path, caplog):
    put_memmap(tmp_path / "data")
    with open(tmp_path / "data" / "mean.memmap", "r+b") as file:
        file.seek(2 * 250 * 20 * 4)
        file.write(b"\x00\x00\xc0\x7f")
    rows, _ = load(tmp_path / "data")
    rows.clip(1)
    assert caplog.text == ""
    rows.clip(2)
    assert "row 2 (id_2)" in caplog.text and "mean" in caplog.text


def test_nothing_in_a_memmap_is_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    put_memmap(tmp_path / "data")
    for name in ("other.pickle", "mean.memmap"):
        (tmp_path / "data" / name).write_bytes(pickle.dumps(Bomb()))
    edit_meta(tmp_path / "data", lambda m: m.update(_type="<class 'os.system'>", _class="os:system"))
    with pytest.raises(ValueError, match="bytes, expected"):
        load(tmp_path / "data")
    assert not (tmp_path / "executed").exists()


def test_a_folder_of_bundles_is_no_memmap_even_with_a_meta_file(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    assert is_memmap(tmp_path)
    (tmp_path / "a.npz").touch()
    assert not is_memmap(tmp_path)


def test_reading_needs_no_tensordict(tmp_path):
    put_memmap(tmp_path / "data")
    code = (
        "import sys; from pathlib import Path; from selva.data.memmap.reader import MemmapDataset\n"
        "from selva.models.zoo import get_variant\n"
        f"MemmapDataset(Path({str(tmp_path / 'data')!r}), get_variant('tiny_16k')).clip(0)\n"
        "print('tensordict' in sys.modules)"
    )
    root = GOLDEN.parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "False"
    assert isinstance(load(tmp_path / "data")[0], MemmapDataset)


@pytest.mark.parametrize("text", ["[1]", "3", "null", "[" * 100_000])
def test_a_meta_of_another_kind_is_named(tmp_path, text):
    put_memmap(tmp_path / "set")
    (tmp_path / "set" / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=r"meta\.json: (describes no tensors|is not JSON)"):
        MemmapDataset(tmp_path / "set", TINY)


def test_rows_of_one_recording_or_one_sound_share_an_origin(tmp_path):
    tensors = put_memmap(tmp_path / "set", 6)
    rows = np.memmap(tmp_path / "set" / "mean.memmap", "<f4", "r+", shape=tuple(tensors["mean"].shape))
    rows[3] = rows[1]
    middle = rows.shape[1] // 2
    rows[4, middle - 8 : middle + 8] = rows[5, middle - 8 : middle + 8]  # quiet in the middle, and not the same sound
    rows.flush()
    groups = origin_groups(MemmapDataset(tmp_path / "set", TINY))
    assert groups[1] == groups[3] and len(set(groups)) == 5
    manifest = [{"id": f"id_{i}", "source": "a.mkv" if i in (0, 2) else f"{i}.mkv", "start_sec": 0.0} for i in range(6)]
    (tmp_path / "set.manifest.jsonl").write_text("\n".join(map(json.dumps, manifest)))
    groups = origin_groups(MemmapDataset(tmp_path / "set", TINY))
    assert groups[0] == groups[2] and len(set(groups)) == 4
    (tmp_path / "set.manifest.jsonl").write_text("no JSON")
    assert len(set(origin_groups(MemmapDataset(tmp_path / "set", TINY)))) == 5


def test_the_content_of_a_row(tmp_path):
    tensors = put_memmap(tmp_path / "set", 3)
    before = MemmapDataset(tmp_path / "set", TINY)
    assert before.content(0) != before.content(1) and set(before.content(0)) == {"sound", "features", "prompt"}
    for key, aspect in (("mean", "sound"), ("sync_features", "features")):
        rows = np.memmap(tmp_path / "set" / f"{key}.memmap", "<f4", "r+", shape=tuple(tensors[key].shape))
        old = before.content(1)
        rows[1] += 1
        rows.flush()
        now = MemmapDataset(tmp_path / "set", TINY).content(1)
        assert {name for name in now if now[name] != old[name]} == {aspect}
