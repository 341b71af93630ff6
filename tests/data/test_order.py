"""Order of the clips: equal lengths, epochs without repetition, prompts in turn; it can be shared and resumed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from small_run import make_clips
from windowed_set import WindowedSet, WordySet, make_clip

from selva.data.dataset import ConcatDataset, ListDataset
from selva.data.order import BucketBatchSampler, ShuffledIndices, read_window


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
    drawn: Counter[tuple[int, int]] = Counter(window[:2] for _ in range(500) for window in batches.draw())
    assert drawn[(1, 0)] == 500
    assert all(60 < drawn[(0, window)] < 140 for window in range(5))  # 100 +- 9
    assert len(drawn) == 6


def test_drawing_reads_nothing_and_loading_reads_what_was_drawn():
    clips = WindowedSet([3, 3, 3])
    batches = BucketBatchSampler(clips, 2, seed=0)
    windows = batches.draw()
    assert clips.loaded == []
    batch = batches.load(windows)
    assert clips.loaded == [tuple(v)[:2] for v in windows]
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


def draws(batches, count):
    return [batches.draw() for _ in range(count)]


def test_every_prompt_of_a_clip_gets_its_turn():
    batches = BucketBatchSampler(WordySet([4, 1]), 2, seed=0)
    drawn = Counter(use for windows in draws(batches, 400) for use in windows)
    assert drawn[1, 0, 0] == 400 and len(drawn) == 5
    assert all(65 < drawn[0, 0, number] < 135 for number in range(4))  # 100 +- 8.7
    use = next(use for use in drawn if use.prompt == 2)
    clip = batches.load([use])
    assert (clip.text_f == 2).all() and (clip.mean == 0).all()
    assert read_window(batches.clips, use).prompt == "prompt 2"


def test_prompts_follow_from_seed_draw_and_clip_and_change_nothing_else():
    plain = draws(BucketBatchSampler(WindowedSet([1] * 6), 4, seed=2), 30)
    wordy = draws(BucketBatchSampler(WordySet([5] * 6), 4, seed=2), 30)
    assert [[use[:2] for use in windows] for windows in plain] == [[use[:2] for use in windows] for windows in wordy]
    assert draws(BucketBatchSampler(WordySet([5] * 6), 4, seed=2), 30) == wordy
    of_seeds = [draws(BucketBatchSampler(WordySet([5]), 1, seed), 30) for seed in (2, 3)]  # the same clip every time
    assert of_seeds[0] != of_seeds[1]


@pytest.mark.parametrize("steps", [1, 4, 11])
def test_resuming_continues_the_prompts_exactly(steps, tmp_path):
    clips = WordySet([1, 3, 5, 1, 2, 8, 1], [1.0] * 4 + [1.5] * 3)
    batches = BucketBatchSampler(clips, 3, seed=3)
    draws(batches, steps)
    batches.peek()
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    resumed = BucketBatchSampler(clips, 3, seed=3)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws(resumed, 30) == draws(batches, 30)


def test_a_state_of_an_earlier_version_is_continued():
    """It holds no prompts: a clip and a window are two numbers."""
    batches = BucketBatchSampler(WindowedSet([3, 1, 1, 1], [1.0, 1.0, 1.5, 1.5]), 3, seed=1)
    draws(batches, 5)
    state = batches.state_dict()
    del state["drawn"]
    state["waiting"] = [[use[:2] for use in bucket] for bucket in state["waiting"]]
    resumed = BucketBatchSampler(batches.clips, 3, seed=1)
    resumed.load_state_dict(state)
    assert draws(resumed, 20) == draws(batches, 20)


def test_a_state_with_prompts_that_are_gone_is_refused():
    batches = BucketBatchSampler(WordySet([4] * 3), 2, seed=0)
    for _ in range(100):
        batches.draw()
        if any(use.prompt for bucket in batches.waiting.values() for use in bucket):
            break
    with pytest.raises(ValueError, match="over other clips"):
        BucketBatchSampler(WordySet([1] * 3), 2, 0).load_state_dict(batches.state_dict())


def test_the_order_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    batches = BucketBatchSampler(WindowedSet([4] * 4), 2, seed=0)
    for _ in range(10):
        batches.draw()
    assert torch.equal(before, torch.get_rng_state())


def test_a_state_of_other_clips_is_refused():
    state = BucketBatchSampler([make_clip("a"), make_clip("b"), make_clip("c")], 2, 0).state_dict()
    with pytest.raises(ValueError, match="over 3 items, now 2"):
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
    with pytest.raises(ValueError, match="over 10 items, now 9"):
        ShuffledIndices(9, 0).load_state_dict(ShuffledIndices(10, 0).state_dict())
    with pytest.raises(ValueError, match="draw from 0 items"):
        ShuffledIndices(0, 0)
