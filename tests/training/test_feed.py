"""selva.training.feed: resident and read-ahead batches are those that are read when asked for, across a resume too."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from small_run import CONFIG, SMALL, make_clips, make_generator
from windowed_set import WordySet

from selva.data.dataset import ListDataset
from selva.data.order import BucketBatchSampler
from selva.data.padding import Padding
from selva.lora.config import LoRAConfig
from selva.lora.state import lora_state_dict
from selva.training.feed import ReadAhead, ReadNow, Resident, features_bytes, make_feed
from selva.training.run import TrainingRun
from selva.utils.errors import UserError
from selva.utils.graph import leaves

CPU = torch.device("cpu")
OWN = slice(0, 2)


class CountingDataset(ListDataset):
    """A set that knows how often and in which threads it was read; reading the clip ``lost`` fails."""

    def __init__(self, clips, lost: str = "") -> None:
        super().__init__(clips)
        self.reads: list[str] = []
        self.threads: set[str] = set()
        self.lost = lost

    def clip(self, index, window=0):
        clip = super().clip(index, window)
        self.reads.append(clip.id)
        self.threads.add(threading.current_thread().name)
        if clip.id == self.lost:
            raise UserError(f"{clip.id} has gone")
        return clip


def make_batches(lost: str = "") -> BucketBatchSampler:
    clips = [*make_clips(4), *make_clips(3, 1.5)]
    mask = torch.arange(len(clips[0].mean)) > 20
    clips[1] = dataclasses.replace(clips[1], padding=Padding(mask, torch.full((4,), 0.5)))
    return BucketBatchSampler(CountingDataset(clips, lost), 2, seed=3)


def feeds(batches: BucketBatchSampler):
    yield ReadNow(batches, CPU)
    yield Resident(batches, CPU)
    yield ReadAhead(batches, CPU, OWN, pin=False)


@pytest.mark.parametrize("which", [1, 2], ids=["resident", "read ahead"])
def test_every_way_gives_the_same_batches(which):
    plain, other = make_batches(), make_batches()
    expected, found = next(feeds(plain)), list(feeds(other))[which]
    padded = 0
    for _ in range(12):
        wanted = expected.load(plain.draw()[OWN])
        batch = found.load(other.draw()[OWN])
        assert batch.ids == wanted.ids and batch.lengths == wanted.lengths
        assert all(torch.equal(x, y) for x, y in zip(leaves(batch), leaves(wanted), strict=True))
        padded += wanted.padding is not None
    assert 0 < padded < 12


def test_a_resident_set_is_read_once():
    batches = make_batches()
    feed = Resident(batches, CPU)
    for _ in range(20):
        feed.load(batches.draw())
    assert sorted(batches.clips.reads) == sorted(batches.clips.ids)


def test_a_clip_that_is_used_several_times_stays_once():
    base = make_batches().clips
    batches = BucketBatchSampler(base.subset([0, 1, 2, 0, 0]), 2, seed=3)
    feed = Resident(batches, CPU)
    for _ in range(10):
        feed.load(batches.draw())
    assert sorted(base.reads) == sorted(base.ids[:3])
    assert features_bytes(batches.clips, SMALL) == features_bytes(base.subset([0, 1, 2]), SMALL)


def test_prompts_are_counted_and_kept_apart():
    clips = WordySet([3, 1])
    batches = BucketBatchSampler(clips, 2, seed=3)
    feed, found = Resident(batches, CPU), set()
    for _ in range(20):
        found |= set(feed.load(batches.draw()).text_f[:, 0, 0].tolist())
    assert found == {0, 1, 2, 100}  # three of the first clip, one of the second
    assert features_bytes(clips, SMALL) == 2 * features_bytes(WordySet([1, 1]), SMALL)


def test_the_next_batch_is_read_beside_the_training():
    batches = make_batches()
    feed = ReadAhead(batches, CPU, OWN, pin=False)
    feed.load(batches.draw())
    feed.wait()
    assert len(batches.clips.reads) == 4  # two batches, of which one was asked for
    assert any("read ahead" in name for name in batches.clips.threads)
    feed.load(batches.draw())
    feed.wait()
    assert len(batches.clips.reads) == 6  # none is read twice


def test_a_clip_that_cannot_be_read_stops_the_step_that_needs_it():
    ids = make_batches().clips.ids
    for lost in ids[:2]:
        batches = make_batches(lost)
        feed = ReadAhead(batches, CPU, OWN, pin=False)
        names = [[batches.clips.ids[w.index] for w in windows] for windows in _draws(make_batches(), 8)]
        bad = next(i for i, batch in enumerate(names) if lost in batch)
        for _ in range(bad):
            feed.load(batches.draw())
            feed.wait()
        with pytest.raises(UserError, match="has gone"):
            feed.load(batches.draw())


def _draws(batches: BucketBatchSampler, count: int) -> list:
    return [batches.draw() for _ in range(count)]


def test_looking_ahead_changes_no_draw_and_survives_a_resume():
    expected = _draws(make_batches(), 12)
    batches = make_batches()
    found = []
    for i in range(6):
        found.append(batches.draw())
        assert batches.peek() == batches.peek() == expected[i + 1]
    resumed = make_batches()
    resumed.load_state_dict(batches.state_dict())
    assert found + _draws(resumed, 6) == expected
    fresh = make_batches()
    assert "next" not in fresh.state_dict()  # as before where nothing is read ahead
    resumed.load_state_dict(fresh.state_dict())
    assert _draws(resumed, 12) == expected


def test_a_run_that_reads_ahead_learns_the_same_and_resumes(monkeypatch):
    adapted = LoRAConfig(rank=2, targets=("attn.qkv", "clip_cond_proj"))  # whose conditions cannot be cached

    def make(ahead: bool) -> TrainingRun:
        clips = ListDataset([*make_clips(4), *make_clips(3, 1.5)])
        config = dataclasses.replace(CONFIG, steps=8)
        run = TrainingRun(make_generator(adapted), clips, clips.subset([]), config, torch.float32)
        assert run.condition_cache is None and isinstance(run.feed, ReadNow)
        if ahead:
            run.feed = ReadAhead(run.batches, CPU, OWN, pin=False)
        return run

    plain, ahead = make(False), make(True)
    losses = [run_losses(run, 5) for run in (plain, ahead)]
    assert losses[0] == losses[1]
    state = ahead.batches.state_dict()
    resumed = make(True)
    resumed.batches.load_state_dict(state)
    assert resumed.batches.draw() == plain.batches.draw()
    wanted = lora_state_dict(plain.generator)
    assert all(torch.equal(value, wanted[key]) for key, value in lora_state_dict(ahead.generator).items())


def run_losses(run: TrainingRun, steps: int) -> list[float]:
    return [run.train_step()[0].item() for _ in range(steps)]


def test_the_size_of_a_set_decides_whether_it_stays_on_the_gpu(monkeypatch, caplog):
    batches, gpu = make_batches(), torch.device("cuda", 0)
    size = features_bytes(batches.clips, SMALL)
    clips = [batches.clips.clip(i) for i in range(len(batches.clips))]
    assert size == sum(4 * getattr(clip, name).numel() for clip in clips
                       for name in ("mean", "std", "clip_f", "sync_f", "text_f"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * size, 9 * size))
    assert isinstance(make_feed(batches, SMALL, gpu, OWN), Resident)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * size - 1, 9 * size))
    assert isinstance(make_feed(batches, SMALL, gpu, OWN), ReadAhead)
    assert isinstance(make_feed(batches, SMALL, CPU, OWN), ReadNow)
