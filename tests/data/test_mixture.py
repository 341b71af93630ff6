"""Mixtures of data sets: every clip as often as its weight says, in one order that any place can be looked up in."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from selva.data.memmap.reader import row_shapes
from selva.data.mixture import Mixture, repeats_of, seed_of, visits_of_sets
from selva.data.source import DataSource, parse_sources, short_names
from selva.models.variants import get_variant
from selva.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def epoch(mixture: Mixture, number: int = 0) -> list[tuple[int, int]]:
    first = number * mixture.size
    return [mixture.visit(place)[2:] for place in range(first, first + mixture.size)]


def test_an_epoch_visits_every_clip_as_often_as_its_weight_says():
    mixture = Mixture([5, 3], [3, 1], seed=0)
    assert mixture.size == 18
    for number in range(3):
        assert Counter(epoch(mixture, number)) == {**{(0, i): 3 for i in range(5)}, **{(1, i): 1 for i in range(3)}}
    assert epoch(mixture, 0) != epoch(mixture, 1)


@pytest.mark.parametrize("weight", [0.5, 0.3, 1.5, 2.7])
def test_a_weight_that_is_no_whole_number_treats_all_clips_alike_in_the_long_run(weight):
    mixture = Mixture([10], [weight], seed=0)
    visits = [clip for number in range(10) for _, clip in epoch(mixture, number)]
    assert Counter(visits) == {clip: round(10 * weight) for clip in range(10)}
    most = Counter(epoch(mixture)).most_common()[0][1]
    assert most <= -(-weight // 1)  # none twice as often as needed


def test_the_order_depends_on_the_seed_and_the_place_alone():
    one, other = Mixture([7, 4], [1, 2], seed=3), Mixture([7, 4], [1, 2], seed=3)
    places = [40, 3, 17, 3]
    assert [one.visit(p) for p in places] == [other.visit(p) for p in reversed(places)][::-1]
    assert epoch(one) != epoch(Mixture([7, 4], [1, 2], seed=4))


def test_orders_are_not_made_again_where_two_epochs_are_read_in_turns(monkeypatch):
    made, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **more: made.append(1) or randperm(*args, **more))
    mixture = Mixture([7], [1], seed=0)
    places = [5, 8, 6, 9, 5, 8]
    assert [mixture.visit(place).epoch for place in places] == [0, 1, 0, 1, 0, 1]
    assert len(made) == 2
    mixture.visit(15)
    assert len(mixture._orders) == 2  # not those of all epochs so far


def test_items_name_the_visits_of_an_epoch():
    mixture = Mixture([4], [2], seed=0)
    visits = [mixture.visit(place) for place in range(16)]
    assert len({(visit.epoch, visit.item) for visit in visits}) == 16


def test_a_set_without_clips_is_refused():
    with pytest.raises(UserError, match="quiet: has 3 clips"):
        Mixture([5, 3], [1, 0.1], 0, ["loud", "quiet"])


def test_seeds_differ():
    assert len({seed_of("noise", 1, epoch, item) for epoch in range(10) for item in range(100)}) == 1000
    assert seed_of("a", 1) == seed_of("a", 1)


@pytest.mark.parametrize("weights, repeats", [
    ([1], [1]), ([5], [1]), ([1, 3], [1, 3]), ([1, 1.5], [2, 3]), ([2, 4], [1, 2]), ([0.1, 1, 2], [1, 10, 20]),
])
def test_repeats(weights, repeats):
    assert repeats_of(weights) == repeats


def test_weights_without_a_common_measure_are_refused():
    with pytest.raises(UserError, match="expected at least 1/20 each"):
        repeats_of([0.001, 1])


@pytest.mark.parametrize("sizes, weights, expected", [
    ([6, 20], [1, 1], [10, 3]), ([20, 20], [1, 1], [1, 1]), ([5, 5], [1, 3], [1, 3]), ([10, 5], [2, 1], [1, 1]),
    ([7], [3], [1]), ([4, 1000], [1, 1], [250, 1]),
])
def test_sets_are_used_equally_often_however_many_clips_they_have(sizes, weights, expected):
    assert visits_of_sets(sizes, weights) == expected


@pytest.mark.parametrize("sizes, weights", [([97, 89, 83, 79], [1, 1, 1, 1]), ([7, 900, 23], [0.3, 1, 5])])
def test_shares_of_sets_are_right_within_a_hundredth(sizes, weights):
    draws = [size * count for size, count in zip(sizes, visits_of_sets(sizes, weights), strict=True)]
    shares = [draw / sum(draws) for draw in draws]
    assert shares == pytest.approx([weight / sum(weights) for weight in weights], rel=0.02)
    assert sum(draws) < 100_000


def test_sets_that_cannot_be_used_equally_often_are_refused():
    with pytest.raises(UserError, match="sets of 3, 0 clips"):
        visits_of_sets([3, 0], [1, 1])
    with pytest.raises(UserError, match=r"an epoch of 60,000,000 uses, expected at most 10,000,000"):
        visits_of_sets([1, 5_000_000, 1], [1, 1, 10])


@pytest.mark.parametrize("paths, expected", [
    (["x/dog", "x/door"], ["dog", "door"]), (["x/clips", "y/clips"], ["x/clips", "y/clips"]), (["a"], ["a"]),
])
def test_names_of_sets_tell_them_apart(paths, expected):
    assert short_names([Path(path) for path in paths]) == expected


@pytest.mark.parametrize("text, path, weight", [
    ("sets/vgg", "sets/vgg", 1), ("sets/vgg:5", "sets/vgg", 5), ("sets/vgg:0.5", "sets/vgg", 0.5),
    ("C:\\sets", "C:\\sets", 1), ("a:b:2", "a:b", 2), ("a:0_8", "a:0_8", 1),
])
def test_sources(text, path, weight):
    assert DataSource.parse(text) == DataSource(Path(path), weight)


def test_a_folder_whose_name_ends_like_a_weight_is_itself(tmp_path):
    (tmp_path / "take:2").mkdir()
    assert DataSource.parse(f"{tmp_path}/take:2") == DataSource(tmp_path / "take:2")


@pytest.mark.parametrize("text", ["a:0", "a:-1", "a:inf", "a:nan"])
def test_impossible_weights_are_refused(text):
    with pytest.raises(UserError, match="expected a number above 0"):
        DataSource.parse(text)


def test_a_folder_that_comes_twice_is_refused():
    with pytest.raises(UserError, match="is given twice"):
        parse_sources(["a", "b", "a:2"])


MEASURE = """
import sys, torch
from pathlib import Path
from selva.data.memmap.reader import MemmapDataset
from selva.data.memmap.reader import row_shapes
from selva.data.mixture import MixedClips
from selva.data.source import DataSource, short_names
from selva.models.variants import get_variant
from selva.training.base.stream import BatchStream
from selva.training.config import TrainConfig
from selva.utils.distributed import World

folder = Path(sys.argv[1])

def own_kib():  # of the process itself, without the pages of files
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

before = own_kib()
rows = MemmapDataset(folder, get_variant("tiny_16k"))
clips = MixedClips([rows], [DataSource(folder, 3)], 0)
stream = BatchStream(clips, TrainConfig(), batch_size=8, steps=100, world=World())
for _ in range(20):
    stream.draw()
stream.close()
print(len(rows), own_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the accounts of Linux")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Ten times the rows are 11 GB more on the disk (made up: the files have holes), and names in memory."""
    used = {}
    for count in (10_000, 100_000):
        folder = put_holes(tmp_path / f"rows_{count}", count)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True,
                                timeout=300, env=environment)
        assert result.returncode == 0, result.stderr
        rows, used[count] = map(int, result.stdout.split())
        assert rows == count
    grown = (used[100_000] - used[10_000]) * 1024
    assert grown < 90_000 * 600, used  # ids, prompts and the order of an epoch; a row has 125,248 bytes on the disk


def put_holes(folder: Path, count: int) -> Path:
    """Write a memmap of tiny_16k of so many rows, whose files have a size but no content."""
    entries = {}
    folder.mkdir()
    for key, shape in row_shapes(get_variant("tiny_16k"), True).items():
        entries[key] = {"device": "cpu", "shape": [count, *shape], "dtype": "torch.float32", "is_nested": False}
        with open(folder / f"{key}.memmap", "wb") as file:
            file.truncate(count * math.prod(shape) * 4)
    (folder / "meta.json").write_text(json.dumps({**entries, "shape": [], "device": "cpu", "_type": "x"}))
    names = "".join(f"clip_{i:07d}\ta thing that makes a sound number {i}\n" for i in range(count))
    folder.with_name(f"{folder.name}.tsv").write_text(f"id\tlabel\n{names}")
    return folder
