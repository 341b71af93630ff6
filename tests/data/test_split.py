"""Held-out clips: how many, which stay together, and those of several sets."""

from __future__ import annotations

import pytest
import torch
from small_run import make_clips
from windowed_set import WindowedSet

from selva.data.dataset import ListDataset
from selva.data.split import join_sets, origin_groups, share_of, split_sets, split_validation


@pytest.mark.parametrize(
    "count, fraction, expected", [(4, 0.1, 0), (5, 0.1, 1), (30, 0.1, 3), (10, 0.0, 0), (6, 0.99, 5)]
)
def test_how_many_clips_are_held_out(count, fraction, expected):
    clips = ListDataset(make_clips(count))
    train, val = split_validation(clips, fraction, seed=1)
    assert len(val) == expected and sorted(train.ids + val.ids) == sorted(clips.ids)
    assert split_validation(clips, fraction, seed=1)[1].ids == val.ids


class OriginSet(WindowedSet):
    """Clips of one window whose origins are given."""

    def __init__(self, origins):
        super().__init__([1] * len(origins))
        self.of = origins

    def origins(self, index):
        return self.of[index]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_videos, windows", [(10, 3), (40, 1), (6, 5), (3, 2)])
def test_what_is_of_one_origin_stays_on_one_side(num_videos, windows, seed):
    pairs = [(video, window) for video in range(num_videos) for window in range(windows)]
    clips = OriginSet([(f"source {video}", f"sound {video} {window}") for video, window in pairs])
    train, val = split_validation(clips, 0.1, seed)
    sides = [{part.origins(i)[0] for i in range(len(part))} for part in (train, val)]
    assert sides[0] and sides[1] and not sides[0] & sides[1] and sorted(train.ids + val.ids) == sorted(clips.ids)
    assert len(val) <= max(windows, round(0.1 * len(clips)))
    assert split_validation(clips, 0.1, seed)[1].ids == val.ids


def test_origins_are_linked_through_other_clips():
    """A sound that two videos share holds their windows together."""
    clips = OriginSet([("a", "1"), ("a", "2"), ("b", "2"), ("b", "3"), ("c", "4"), ("d", "5"), (), ()])
    groups = origin_groups(clips)
    assert len(set(groups[:4])) == 1 and len(set(groups)) == 5
    for seed in range(20):
        val = split_validation(clips, 0.3, seed)[1]
        assert not {f"clip{i}" for i in range(4)} & set(val.ids)


def test_a_single_video_is_not_split():
    clips = OriginSet([("a",)] * 8)
    train, val = split_validation(clips, 0.1, 0)
    assert len(train) == 8 and len(val) == 0
    mostly = OriginSet([("a",)] * 8 + [("b",)] * 2)
    assert split_validation(mostly, 0.1, 0)[1].ids == ["clip8", "clip9"]


@pytest.mark.parametrize("by_origin", [False, True])
def test_clips_of_their_own_are_split_as_version_0_1_0_did(by_origin):
    clips = WindowedSet([1] * 23)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(4)).tolist()
    train, val = split_validation(clips, 0.2, 4, by_origin=by_origin)
    assert [val.indices, train.indices] == [sorted(order[:5]), sorted(order[5:])]
    windows = OriginSet([("a",)] * 23)
    assert split_validation(windows, 0.2, 4, by_origin=False)[1].indices == sorted(order[:5])


# -- several sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_every_set_has_held_out_clips_of_its_own(seed):
    sets = [WindowedSet([1] * 6), WindowedSet([1] * 60)]
    train, held_out = split_sets(sets, 0.1, seed)
    assert sorted(train + held_out) == list(range(66))
    assert sum(index < 6 for index in held_out) == 1 and len(held_out) == 7


def test_a_single_set_is_divided_as_it_always_was():
    clips = OriginSet([(f"source {index // 3}",) for index in range(30)])
    for seed in range(5):
        train, val = split_validation(clips, 0.2, seed)
        assert split_sets([clips], 0.2, seed) == (train.indices, val.indices)


def test_what_several_sets_have_in_common_is_trained_on():
    """Held out of one set, it would be trained on in the other."""
    first = OriginSet([("a",), ("b",), *((name,) for name in "cdefgh")])
    second = OriginSet([("a",), ("b", "x"), ("x",), *((name,) for name in "ijklmn")])
    for seed in range(20):
        _, held_out = split_sets([first, second], 0.4, seed)
        assert len(held_out) == 4 and not {0, 1, 8, 9, 10} & set(held_out)


def test_small_sets_are_divided_together():
    sets = [WindowedSet([1] * 4) for _ in range(4)]
    _, held_out = split_sets(sets, 0.2, 1)
    assert len(held_out) == 3 and held_out == split_validation(join_sets(sets), 0.2, 1)[1].indices
    assert all(index >= 4 for index in split_sets([WindowedSet([1] * 4), WindowedSet([1] * 8)], 0.2, 1)[1])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sizes, fraction, num_held_out", [
    ([1] * 5, 0.1, 0), ([4, 1], 0.1, 1), ([1, 4, 1], 0.9, 3), ([2, 2, 2], 0.5, 3), ([3] * 8, 0.1, 2)])
def test_no_set_is_held_out_whole(sizes, fraction, num_held_out, seed):
    """A sound of which there is one clip would never be trained on."""
    train, held_out = split_sets([WindowedSet([1] * size) for size in sizes], fraction, seed)
    set_of = [number for number, size in enumerate(sizes) for _ in range(size)]
    assert {set_of[index] for index in train} == set(range(len(sizes))) and len(held_out) == num_held_out


def test_a_video_that_is_a_whole_set_is_not_held_out():
    sets = [OriginSet([("a",), ("a",)]), OriginSet([("b",), ("b",)]), OriginSet([("c",), ("c",), ("d",)])]
    for seed in range(20):
        assert split_sets(sets, 0.1, seed)[1] == [6]
    assert split_sets(sets[:2] + sets[:1], 0.1, 0)[1] == []


@pytest.mark.parametrize("sizes, most, expected", [
    ([3, 50], 100, [3, 50]), ([3, 50], 10, [3, 7]), ([20, 20], 10, [5, 5]), ([9, 1, 9], 11, [5, 1, 5]), ([5], 2, [2]),
])
def test_shares_of_a_limited_number(sizes, most, expected):
    assert share_of(sizes, most) == expected
