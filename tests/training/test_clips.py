"""selva.training.clips: which clips are held out, how often each set is used, and what is said about it."""

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
from selva.training.clips import load_clips, load_split, num_distinct
from selva.training.config import RunConfig, TrainConfig
from selva.training.ways import WAYS, WAYS_BEFORE
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
    assert "1 held-out clip is of a video or a sound that is trained on too" in caplog.text
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
    assert "1 held-out clip is of a video or a sound that is trained on too" in caplog.text
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
    assert "5 of 5 clips to train on: their video is not known" in caplog.text


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
    assert len(val) == 4 and not set(val.ids) & set(train.ids)
    assert "weight 3: each 3 times in an epoch, 75 % of it" in caplog.text


@pytest.fixture
def uneven(tmp_path):
    """Six gongs and twenty lasers."""
    for folder, count in (("gong", 6), ("laser", 20)):
        for number in range(count):
            put_clip(tmp_path / folder, f"clip_{number}", seed=number + 100 * (folder == "laser"), text=True)
    return [str(tmp_path / "gong"), str(tmp_path / "laser")]


def used(clips) -> Counter:
    return Counter(name.split("/")[0] for name in clips.ids)


def test_two_sounds_can_be_used_equally_often(uneven, caplog):
    caplog.set_level("INFO")
    told: list[str] = []
    config = RunConfig(data_dir=uneven, balance="sets", model=GeneratorModelConfig(variant="tiny_16k"))
    train, _ = load_split(config, CPU, World(), told=told)
    assert used(train)["gong"] == used(train)["laser"] and set(Counter(train.ids).values()) == {5, 18}
    assert num_distinct(train) == 23 and len(set(train.ids[:23])) == 23
    line = f"{uneven[0]}: 5 clips to train on, 1 held out; weight 1: each 18 times in an epoch, 50 % of it"
    assert line in told and line in caplog.text and "--balance sets" not in caplog.text
    train, _ = split([uneven[0] + ":3", uneven[1]], balance="sets")
    assert used(train)["gong"] == pytest.approx(3 * used(train)["laser"], rel=0.02)
    train, _ = split(uneven)
    assert used(train) == {"gong": 5, "laser": 18} and "to use the sets equally often" in caplog.text


def test_every_set_is_validated_on(uneven, caplog):
    caplog.set_level("INFO")
    _, val = split(uneven, val_fraction=0.2)
    assert used(val) == {"gong": 1, "laser": 4}
    assert [val.source(index) for index in range(5)] == ["gong", *["laser"] * 4]
    _, val = split(uneven, val_fraction=0.5, val_clips=6)
    assert used(val) == {"gong": 3, "laser": 3} and "validation is on 6 of the 13" in caplog.text


def test_a_set_that_is_too_small_to_be_held_out_from_is_named(tmp_path, uneven, caplog):
    put_clip(tmp_path / "bell", "a", text=True)
    caplog.set_level("INFO")
    _, val = split([*uneven, str(tmp_path / "bell")])
    assert used(val) == {"gong": 1, "laser": 2} and f"nothing is held out of {tmp_path / 'bell'} (" in caplog.text


def test_folders_to_hold_out_are_sets_of_their_own(uneven):
    train, val = split(uneven, val_dir=(uneven[1], uneven[0]))
    assert len(train) == len(val) == 26 and [val.source(0), val.source(25)] == ["laser", "gong"]
    _, val = split(uneven, val_dir=uneven[0])
    assert val.ids[0] == "clip_0" and val.source(0) == ""


def test_a_run_that_was_begun_with_one_split_for_all_sets_keeps_it(uneven, tmp_path):
    ways = {"split": "by origin", "dropout": "by step"}
    _, val = split(uneven, state(tmp_path, ways=ways), val_fraction=0.2)
    order = torch.randperm(26, generator=torch.Generator().manual_seed(42)).tolist()
    everything = [f"gong/clip_{i}" for i in range(6)] + sorted(f"laser/clip_{i}" for i in range(20))
    assert val.ids == [everything[index] for index in sorted(order[:5])]
    assert split(uneven, state(tmp_path, ways=WAYS), val_fraction=0.2)[1].ids == split(uneven, val_fraction=0.2)[1].ids


def test_a_run_that_was_begun_when_a_whole_set_could_be_held_out_goes_on_so(tmp_path):
    for number in range(5):
        put_clip(tmp_path / f"sound{number}", "a", seed=number, text=True)
    folders = [str(tmp_path / f"sound{number}") for number in range(5)]
    train, val = split(folders, balance="sets")
    assert (len(train), len(val)) == (5, 0)
    for saved in (state(tmp_path, ways={**WAYS, "split": "by set"}), state(tmp_path, ways={"split": "by origin"})):
        assert split(folders, saved)[1].ids == ["sound2/a"]


def test_one_folder_name_in_two_places_makes_two_sets(tmp_path):
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        for number in range(6):
            put_clip(tmp_path / place / "clips", f"clip_{number}", seed=number + 10 * (place == "y"), text=True)
    train, val = split([str(tmp_path / "x" / "clips"), str(tmp_path / "y" / "clips")])
    assert len({*train.ids, *val.ids}) == 12 and {val.source(0), val.source(1)} == {"x/clips", "y/clips"}


def test_each_set_has_its_prefix_and_its_prompts(uneven, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "gong" / "prompts.txt").write_text("clip_0: struck\nclip_0: a gong\nclip_1: a\nclip_1: b\nclip_1: c\n")
    train, val = split(uneven, prompt_prefix=("gong:", ""), val_fraction=0.2)
    prompts = {name: train.clip(index).prompt for index, name in enumerate(train.ids)}
    prompts |= {name: val.clip(index).prompt for index, name in enumerate(val.ids)}
    assert prompts["gong/clip_0"] == "gong: a gong" and prompts["laser/clip_3"] == "a knock"
    said = "prompts begin with 'gong:'; 2 clips have several prompts (up to 3), of which each use draws one"
    assert said in caplog.text
    train, val = split(uneven, prompt_prefix=("sks",), val_dir=uneven[1])
    assert train.clip(0).prompt == "sks a gong" and val.clip(0).prompt == "sks a knock"


def test_a_run_that_was_begun_with_one_prompt_per_clip_keeps_it(uneven, tmp_path):
    (tmp_path / "gong" / "prompts.txt").write_text("clip_0: struck\nclip_0: a gong\n")
    before = state(tmp_path, ways={"split": "by origin", "dropout": "by step"})
    assert [split(uneven[0], saved, val_fraction=0.0)[0].num_prompts(0) for saved in (None, before)] == [2, 1]


def test_one_set_is_as_it_always_was(two_sets):
    train, _ = split(two_sets[:1], val_fraction=0.0)
    assert train.ids == [f"clip_{number}" for number in range(6)]
    assert split(f"{two_sets[0]}:5", val_fraction=0.0)[0].ids == train.ids  # a weight among none


def test_a_set_that_is_not_there_is_named(two_sets):
    with pytest.raises(UserError, match="--data_dir nowhere: no such folder"):
        split([two_sets[0], "nowhere:2"])
