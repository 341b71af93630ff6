"""Sets of clips: parts of them, several as one, and batches of their clips."""

from __future__ import annotations

import pytest
from windowed_set import WindowedSet, make_clip

from selva.data.dataset import ConcatDataset, ListDataset, NamedDataset, collate


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


def test_a_plain_list_of_clips_is_a_set():
    clips = [make_clip("a"), make_clip("b")]
    assert ListDataset(clips).ids == ["a", "b"]
    with pytest.raises(AssertionError):
        ListDataset(clips).clip(0, 1)


def test_clips_know_their_set_whatever_is_made_of_it():
    joined = ConcatDataset(NamedDataset(WindowedSet([1, 1]), "dog"), NamedDataset(WindowedSet([1]), "x/door"))
    assert joined.ids == ["dog/clip0", "dog/clip1", "x/door/clip0"] and joined.clip(2).id == "x/door/clip0"
    part = joined.subset([2, 0])
    assert [part.source(index) for index in range(2)] == ["x/door", "dog"]
    assert WindowedSet([1]).source(0) == ""
