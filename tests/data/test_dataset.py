"""Batches of clips: equal lengths, epochs without repetition, an order that can be shared and resumed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from small_run import make_clips

from selva.data.dataset import (
    BucketBatchSampler,
    ClipDataset,
    ConcatDataset,
    ListDataset,
    ShuffledIndices,
    TrainingClip,
    collate,
    origin_groups,
    split_validation,
)
from selva.sequence import sequence_config


def make_clip(name: str, seconds: float = 1.0, value: float = 1.0, has_video: bool = True) -> TrainingClip:
    sequence = sequence_config("16k", seconds)

    def full(*shape):
        return torch.full(shape, value)

    return TrainingClip(
        id=name, prompt="", audio_path=Path("none"), sequence=sequence, mean=full(sequence.latent_seq_len, 4),
        std=full(sequence.latent_seq_len, 4), clip_f=full(sequence.clip_seq_len, 3),
        sync_f=full(sequence.sync_seq_len, 3), text_f=full(7, 3), has_video=has_video,
    )


class WindowedSet(ClipDataset):
    """Clips that exist only as numbers; the mean of clip i, window w, is 100 i + w."""

    def __init__(self, windows, seconds=None):
        self.windows, self.seconds, self.loaded = windows, seconds or [1.0] * len(windows), []

    @property
    def ids(self):
        return [f"clip{i}" for i in range(len(self.windows))]

    def lengths(self, index):
        sequence = sequence_config("16k", self.seconds[index])
        return sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len

    def num_windows(self, index):
        return self.windows[index]

    def clip(self, index, window=0):
        self.loaded.append((index, window))
        return make_clip(self.ids[index], self.seconds[index], 100 * index + window)


def test_a_batch_stacks_its_clips():
    batch = collate([make_clip("a", value=1), make_clip("b", value=2, has_video=False)])
    assert batch.ids == ("a", "b") and batch.has_video.tolist() == [True, False]
    assert batch.mean[:, 0, 0].tolist() == batch.text_f[:, 0, 0].tolist() == [1, 2]
    assert batch.lengths == make_clip("a").lengths == (32, 8, 16)


def test_a_subset_keeps_names_lengths_and_clips_together():
    base = WindowedSet([1, 2, 3, 4], [1.0, 1.5, 2.0, 2.5])
    part = base.subset([3, 1, 2]).subset([2, 0])
    assert part.ids == ["clip2", "clip3"] and len(part) == 2
    assert [part.lengths(i) for i in range(2)] == [base.lengths(2), base.lengths(3)]
    assert [part.num_windows(i) for i in range(2)] == [3, 4]
    assert part.clip(1, 2).mean[0, 0] == 302 and base.loaded == [(3, 2)]
    assert len(base.subset([])) == 0


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_no_clip_is_twice_in_a_batch_and_epochs_are_complete(batch_size):
    """Pitfall F9: also across the border of two epochs."""
    batches = BucketBatchSampler(WindowedSet([1] * 7, [1.0] * 4 + [1.5] * 3), batch_size, seed=5)
    counts = Counter()
    for _ in range(140):
        windows = batches.draw()
        assert len(windows) == batch_size and len({v.index < 4 for v in windows}) == 1
        if batch_size <= (4 if windows[0].index < 4 else 3):
            assert len({v.index for v in windows}) == batch_size
        counts.update(v.index for v in windows)
    assert max(counts.values()) - min(counts.values()) <= batch_size


def test_too_few_clips_of_a_length_fill_a_batch_over_several_epochs():
    batches = BucketBatchSampler(WindowedSet([1, 1]), 4, seed=5)
    assert Counter(v.index for v in batches.draw()) == {0: 2, 1: 2}


def test_every_window_of_a_long_clip_gets_its_turn():
    batches = BucketBatchSampler(WindowedSet([5, 1]), 2, seed=0)
    drawn: Counter[tuple[int, int]] = Counter(window for _ in range(500) for window in batches.draw())
    assert drawn[(1, 0)] == 500
    assert all(60 < drawn[(0, window)] < 140 for window in range(5))  # 100 +- 9
    assert len(drawn) == 6


def test_drawing_reads_nothing_and_loading_reads_what_was_drawn():
    clips = WindowedSet([3, 3, 3])
    batches = BucketBatchSampler(clips, 2, seed=0)
    windows = batches.draw()
    assert clips.loaded == []
    batch = batches.load(windows)
    assert clips.loaded == [tuple(v) for v in windows]
    assert batch.mean[:, 0, 0].tolist() == [100 * v.index + v.window for v in windows]


def test_processes_draw_the_same_batch_and_load_their_parts_of_it():
    whole, *parts = (BucketBatchSampler(WindowedSet([3] * 6, [1.0, 1.5] * 3), 4, seed=2) for _ in range(3))
    for _ in range(10):
        everything = next(whole)
        drawn = [part.draw() for part in parts]
        halves = [part.load(windows[slice(2 * i, 2 * i + 2)])
                  for i, (part, windows) in enumerate(zip(parts, drawn, strict=True))]
        assert torch.equal(torch.cat([h.mean for h in halves]), everything.mean)


@pytest.mark.parametrize("steps", [0, 1, 4, 11])
def test_resuming_continues_exactly(steps, tmp_path):
    clips = WindowedSet([1, 3, 5, 1, 2, 8, 1], [1.0] * 4 + [1.5] * 3)
    batches = BucketBatchSampler(clips, 3, seed=3)
    for _ in range(steps):
        batches.draw()
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    expected = [batches.draw() for _ in range(30)]
    resumed = BucketBatchSampler(clips, 3, seed=99)
    resumed.draw()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [resumed.draw() for _ in range(30)] == expected


def test_the_order_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    batches = BucketBatchSampler(WindowedSet([4] * 4), 2, seed=0)
    for _ in range(10):
        batches.draw()
    assert torch.equal(before, torch.get_rng_state())


def test_a_state_of_other_clips_is_refused():
    state = BucketBatchSampler([make_clip("a"), make_clip("b"), make_clip("c")], 2, 0).state_dict()
    with pytest.raises(ValueError, match="over 3 items, but there are 2"):
        BucketBatchSampler([make_clip("a"), make_clip("b")], 2, 0).load_state_dict(state)
    with pytest.raises(ValueError, match="over other clips"):
        BucketBatchSampler([make_clip("a"), make_clip("b"), make_clip("d")], 2, 0).load_state_dict(state)
    batches = BucketBatchSampler(WindowedSet([4, 4, 4]), 2, seed=0)
    for _ in range(100):
        batches.draw()
        if any(window.window for windows in batches.waiting.values() for window in windows):
            break
    with pytest.raises(ValueError, match="over other clips"):
        BucketBatchSampler(WindowedSet([1, 1, 1]), 2, 0).load_state_dict(batches.state_dict())


def test_a_plain_list_of_clips_is_a_set():
    clips = [make_clip("a"), make_clip("b")]
    assert BucketBatchSampler(clips, 1, 0).clips.ids == ListDataset(clips).ids == ["a", "b"]
    with pytest.raises(AssertionError):
        ListDataset(clips).clip(0, 1)


def test_epochs_visit_every_clip_once_in_batches_of_one_length():
    """Pitfall F9: shuffled epochs, not draws with replacement."""
    clips = make_clips(4) + make_clips(4, 1.5)
    batches = BucketBatchSampler(clips, 2, seed=3)
    seen = []
    for _ in range(4):
        batch = next(batches)
        assert len({i.rsplit("_", 1)[1] for i in batch.ids}) == 1
        seen += batch.ids
    assert sorted(seen) == sorted(c.id for c in clips)


def test_batch_order_continues_from_its_state():
    clips = make_clips(5) + make_clips(3, 1.5)
    batches, other = BucketBatchSampler(clips, 2, seed=3), BucketBatchSampler(clips, 2, seed=9)
    for _ in range(5):
        next(batches)
    other.load_state_dict(batches.state_dict())
    assert [next(batches).ids for _ in range(9)] == [next(other).ids for _ in range(9)]


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


class Counted(WindowedSet):
    """Clips that count how often their names are listed and their lengths are asked for."""

    def __init__(self, count):
        super().__init__([1] * count)
        self.listed = self.asked = 0
        self.length = super().lengths(0)

    @property
    def ids(self):
        self.listed += 1
        assert self.listed < 5, "the names are listed again and again"
        return [f"clip{i}" for i in range(len(self.windows))]

    def lengths(self, index):
        self.asked += 1
        return self.length


def test_a_large_set_starts_and_draws_without_listing_its_names():
    """Pairs of sets ask for their parts by number: 100,000 clips with as many preserved ones, not 10^10 names."""
    count = 100_000
    base = Counted(count)
    made = ListDataset([make_clip(f"made{i}") for i in range(3)])
    joined = ConcatDataset(base.subset(range(count)), made.subset(i % 3 for i in range(count)))
    batches = BucketBatchSampler(joined, 4, seed=0)
    assert len(joined) == 2 * count and base.listed <= 2 and base.asked <= 2 * count
    base.listed = base.asked = 0
    for _ in range(100):
        batches.draw()
    assert base.listed == 0 and base.asked <= 100 * 4 * 2
    assert joined.ids is joined.ids and len(joined.ids) == 2 * count and base.listed <= 1


# -- the stream of indices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_items", [10, 7, 5, 1, 6])
def test_every_epoch_holds_every_item_once(num_items):
    stream = ShuffledIndices(num_items, seed=1)
    drawn = [next(stream) for _ in range(6 * num_items)]
    for start in range(0, len(drawn), num_items):
        assert sorted(drawn[start : start + num_items]) == list(range(num_items))


def test_epochs_differ_and_every_item_comes_first_equally_often():
    stream = ShuffledIndices(4, seed=0)
    epochs = [tuple(next(stream) for _ in range(4)) for _ in range(400)]
    assert len(set(epochs)) == 24  # all orders occur
    first = Counter(epoch[0] for epoch in epochs)
    assert all(60 < first[index] < 140 for index in range(4))  # 100 +- 8.7


def test_the_seed_alone_decides():
    torch.manual_seed(1)
    a = ShuffledIndices(10, seed=5)
    first = [next(a) for _ in range(30)]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = ShuffledIndices(10, seed=5)
    assert [next(b) for _ in range(30)] == first
    assert torch.equal(torch.get_rng_state(), before)  # and leaves the global state alone
    c = ShuffledIndices(10, seed=6)
    assert [next(c) for _ in range(30)] != first


@pytest.mark.parametrize("steps", [0, 1, 3, 7, 20])
def test_resuming_the_stream_continues_exactly(steps, tmp_path):
    stream = ShuffledIndices(10, seed=3)
    for _ in range(steps):
        next(stream)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    expected = [next(stream) for _ in range(30)]
    resumed = ShuffledIndices(10, seed=99)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [next(resumed) for _ in range(30)] == expected


def test_a_state_of_other_data_is_refused():
    with pytest.raises(ValueError, match="over 10 items, but there are 9"):
        ShuffledIndices(9, 0).load_state_dict(ShuffledIndices(10, 0).state_dict())
    with pytest.raises(ValueError, match="draw from 0 items"):
        ShuffledIndices(0, 0)
