"""selva.training.setup: which clips are held out, and what is said about it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter

import pytest
import torch
from make_data import put_clip, put_memmap

from selva.checkpoint import TrainingState
from selva.data.folder_dataset import FolderDataset
from selva.features import load_features, save_features
from selva.training.config import RunConfig, TrainConfig
from selva.training.run import WAYS, WAYS_BEFORE
from selva.training.setup import adapter_meta, check_resumable, load_clips, load_split
from selva.utils.distributed import World
from selva.utils.errors import UserError
from selva.weights.config import GeneratorModelConfig

CPU = torch.device("cpu")


@pytest.fixture
def windows(tmp_path):
    """Twelve clips, three windows of each of four videos."""
    folder = tmp_path / "windows"
    for number in range(12):
        put_clip(folder, f"v{number // 3}_{number % 3}", seed=number, text=True)
        path = folder / f"v{number // 3}_{number % 3}.npz"
        save_features(path, dataclasses.replace(load_features(path), source_sha256=f"video {number // 3}"))
    return folder


def split(folder, saved=None, **options):
    model = GeneratorModelConfig(variant="tiny_16k")
    config = RunConfig(data_dir=folder, model=model, training=TrainConfig(), **options)
    return load_split(config, CPU, World(), saved)


def state(tmp_path, **extra) -> TrainingState:
    return TrainingState(tmp_path, 1, {}, {}, None, {}, {"batches": {}, **extra})


def test_windows_of_one_video_are_on_one_side(windows, caplog):
    caplog.set_level("INFO")
    train, val = split(windows)
    assert len(val) == 3 and len({name[:2] for name in val.ids}) == 1
    assert not {name[:2] for name in val.ids} & {name[:2] for name in train.ids}
    assert "12 clips are of 4 videos or sounds" in caplog.text and "are of a video or a sound that" not in caplog.text


def test_a_run_of_version_0_1_0_keeps_its_clips_and_says_what_is_wrong_with_them(windows, tmp_path, caplog):
    train, val = split(windows, state(tmp_path), val_clips=1, val_fraction=0.3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(42)).tolist()
    assert val.ids == [f"v{i // 3}_{i % 3}" for i in sorted(order[:4])] and len(train) == 8
    assert "held-out clips are of a video or a sound that is trained on too" in caplog.text
    assert split(windows, state(tmp_path, ways=WAYS_BEFORE), val_fraction=0.3)[1].ids == val.ids
    assert split(windows, state(tmp_path, ways=WAYS), val_fraction=0.3)[1].ids != val.ids


def test_a_single_video_is_not_held_out_from(windows, caplog):
    for path in windows.glob("*.npz"):
        save_features(path, dataclasses.replace(load_features(path), source_sha256="one"))
    train, val = split(windows)
    assert (len(train), len(val)) == (12, 0) and "nothing is held out" in caplog.text and "--val_dir" in caplog.text


def test_clips_of_a_video_in_another_folder_are_named(windows, tmp_path, caplog):
    put_clip(tmp_path / "other", "new", seed=50, text=True)
    put_clip(tmp_path / "other", "copied", seed=4, text=True)  # the sound of v1_1
    train, val = split(windows, val_dir=tmp_path / "other")
    assert (len(train), len(val)) == (12, 2)
    assert "1 held-out clips are of a video or a sound that is trained on too" in caplog.text
    assert "better than it is: copied" in caplog.text


def test_a_validation_is_on_a_limited_number_of_clips_always_the_same(windows, caplog):
    caplog.set_level("INFO")
    full_train, full = split(windows, val_fraction=0.5, val_clips=0)
    train, val = split(windows, val_fraction=0.5, val_clips=2)
    assert len(full) == 6 and len(val) == 2 and set(val.ids) < set(full.ids) and train.ids == full_train.ids
    assert "validation is on 2 of the 6 held-out clips, always the same" in caplog.text
    assert split(windows, val_fraction=0.5, val_clips=2)[1].ids == val.ids


def test_processes_encode_a_new_folder_together(tmp_path, monkeypatch):
    """Rank 0 reads it first, all encode a share at the same time, then rank 0 does what is left before the others."""
    steps = []

    class Recorder(World):
        @contextlib.contextmanager
        def main_first(self, what):
            steps.append(f"main first: {what}")
            yield

        @contextlib.contextmanager
        def at_once(self, what):
            steps.append(f"at once: {what}")
            yield

    def prepare(_clips, _device):
        steps.append("the rest")
        return []

    put_clip(folder := tmp_path / "data", "a", text=True)
    monkeypatch.setattr(FolderDataset, "encode_share", lambda _clips, rank, size, _device: steps.append((rank, size)))
    monkeypatch.setattr(FolderDataset, "prepare", prepare)
    config = RunConfig(data_dir=folder, model=GeneratorModelConfig(variant="tiny_16k"))
    load_clips(config, folder, CPU, Recorder(1, 2))
    assert steps == [f"main first: reading {folder}", f"at once: encoding {folder}", (1, 2),
                     f"main first: encoding {folder}", "the rest"]
    steps.clear()
    load_clips(config, folder, CPU, Recorder())
    assert steps == [f"main first: reading {folder}", f"main first: encoding {folder}", "the rest"]


def test_clips_that_name_no_video_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    for number in range(6):
        put_clip(tmp_path / "data", f"c{number}", seed=number, text=True)
    split(tmp_path / "data")
    assert "5 of 5 clips to train on do not say which video they are of" in caplog.text


@pytest.mark.parametrize("before, now, told", [
    ((4, 1, 2), (4, 1, 1), "an update was of 8 clips so far and is of 4 from here on (number of processes was 2 and"),
    ((4, 1, 2), (8, 1, 1), ""),
    ((4, 2, 1), (4, 1, 1), "--grad_accum was 2 and is 1"),
    ((4, 1, 1), (4, 1, 1), ""),
])
def test_a_run_that_goes_on_with_other_updates_says_so(tmp_path, caplog, before, now, told):
    def config(sizes):
        return RunConfig(data_dir=[str(tmp_path)], output_dir=tmp_path / "out",
                         model=GeneratorModelConfig(variant="tiny_16k"),
                         training=TrainConfig(batch_size=sizes[0], grad_accum=sizes[1]))

    was = config(before)
    meta = {**adapter_meta(was, 10, before[2]), "rank": 16, "alpha": 16.0, "target": ["attn.qkv"]}
    saved = TrainingState(tmp_path / "adapter_step00001.pt", 1, {}, {}, None, meta)
    check_resumable(saved, config(now), now[2])
    assert told in caplog.text and bool(told) == ("an update was of" in caplog.text)


def test_a_memmap_is_summed_up_as_folders_are(tmp_path, caplog):
    put_memmap(tmp_path / "set", rows=5)
    with caplog.at_level("INFO"):
        split([str(tmp_path / "set")], val_fraction=0.0)
    assert "5 rows of 8 s, 40 s in all, with video" in caplog.text
    assert "latents, RMS" in caplog.text and "prompts: " in caplog.text


# -- several data sets -------------------------------------------------------------------------------------------------


@pytest.fixture
def two_sets(tmp_path):
    for folder in ("a", "b"):
        for number in range(6):
            put_clip(tmp_path / folder, f"clip_{number}", seed=number + 10 * (folder == "b"), text=True)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_several_sets_are_one_with_names_that_tell_them_apart(two_sets):
    train, val = split(two_sets)
    assert len(train) + len(val) == 12 and len(set(train.ids + val.ids)) == 12
    assert {name.split("/")[0] for name in train.ids} == {"a", "b"}
    assert train.clip(0).id == train.ids[0]


def test_weights_repeat_the_clips_of_a_set_but_not_those_held_out(two_sets, caplog):
    caplog.set_level("INFO")
    train, val = split([two_sets[0], two_sets[1] + ":3"], val_fraction=0.25)
    counts = Counter(train.ids)
    assert {count for name, count in counts.items() if name.startswith("a/")} == {1}
    assert {count for name, count in counts.items() if name.startswith("b/")} == {3}
    assert len(val) == 3 and not set(val.ids) & set(train.ids)
    assert "3 times each" in caplog.text


def test_one_set_is_as_it_always_was(two_sets):
    train, _ = split(two_sets[:1], val_fraction=0.0)
    assert train.ids == [f"clip_{number}" for number in range(6)]
    assert split(f"{two_sets[0]}:5", val_fraction=0.0)[0].ids == train.ids  # a weight among none


def test_a_set_that_is_not_there_is_named(two_sets):
    with pytest.raises(UserError, match="--data_dir nowhere: no such folder"):
        split([two_sets[0], "nowhere:2"])
