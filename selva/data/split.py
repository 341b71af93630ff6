"""Held-out clips: which clips of a set, or of several sets, are validated on instead of trained on.

Clips of one origin (windows of one video, the same sound) stay on one side: what is held out would otherwise have been
trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from selva.data.dataset import ClipDataset, ConcatDataset, Subset

FEWEST = 5  # clips of which some are held out


def split_validation(
    clips: ClipDataset, fraction: float, seed: int, *, by_origin: bool = True, set_of: Sequence[int] = ()
) -> tuple[ClipDataset, ClipDataset]:
    """Return (training, held-out) clips; a seeded choice of at least one clip, or none if fewer than five are there.

    Clips of one origin (:meth:`ClipDataset.origins`: windows of one video, the same sound) stay together: what is held
    out would otherwise have been trained on. Where no origin is as small as the share to hold out, the smallest one is
    held out, unless that were more than half of the clips: then none is.

    Args:
        by_origin: False splits as version 0.1.0 did, clip by clip.
        set_of: number of the set of every clip, of several of which each keeps a clip to train on.
    """
    count = len(clips)
    if fraction <= 0 or count < FEWEST:
        return clips, clips.subset([])
    wanted = min(count - 1, max(1, round(fraction * count)))
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    if not by_origin:
        return clips.subset(sorted(order[wanted:])), clips.subset(sorted(order[:wanted]))
    groups: dict[int, list[int]] = {}  # in the order in which chance comes to them
    group_of = origin_groups(clips)
    for index in order:
        groups.setdefault(group_of[index], []).append(index)
    held_out: set[int] = set()
    sets = set_of or [0] * count
    left = Counter(sets)  # clips of each set to train on

    def is_spare(group: Sequence[int]) -> bool:
        return all(left[number] > taken for number, taken in Counter(sets[index] for index in group).items())

    for group in groups.values():
        if len(held_out) + len(group) <= wanted and is_spare(group):
            held_out.update(group)
            left.subtract(sets[index] for index in group)
    smallest = min(filter(is_spare, groups.values()), key=len, default=[])
    if not held_out and 2 * len(smallest) <= count:
        held_out.update(smallest)
    return clips.subset(i for i in range(count) if i not in held_out), clips.subset(sorted(held_out))


def origin_groups(clips: ClipDataset) -> list[int]:
    """Return a number for every clip, which those have in common that share an origin, directly or through others."""
    parent = list(range(len(clips)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]  # halves the way for the next time
            index = parent[index]
        return index

    first_with: dict[str, int] = {}
    for index in range(len(clips)):
        for origin in clips.origins(index):
            parent[root(index)] = root(first_with.setdefault(origin, index))
    return [root(index) for index in range(len(clips))]


def split_sets(
    sets: Sequence[ClipDataset], fraction: float, seed: int, *, spare_last: bool = True
) -> tuple[list[int], list[int]]:
    """Return the numbers of the (training, held-out) clips of several sets that are counted through, from 0.

    Every set is divided as :func:`split_validation` divides it, so that each has its own held-out clips. A clip whose
    video or sound is in several sets is trained on. Where no set is large enough to hold any out, all clips are divided
    as if they were one set, but every set keeps a clip to train on.

    Args:
        spare_last: False may then hold out all clips of a set, as it once was.
    """
    together = join_sets(sets)
    group_of = origin_groups(together)
    firsts = [sum(map(len, sets[:number])) for number in range(len(sets))]
    sets_of_group: dict[int, set[int]] = {}
    for number, (first, one) in enumerate(zip(firsts, sets, strict=True)):
        for index in range(first, first + len(one)):
            sets_of_group.setdefault(group_of[index], set()).add(number)
    held_out: set[int] = set()
    for first, one in zip(firsts, sets, strict=True):
        own = [index for index in range(len(one)) if len(sets_of_group[group_of[first + index]]) == 1]
        _, found = split_validation(one.subset(own), fraction, seed)
        assert isinstance(found, Subset) and isinstance(found.base, Subset)
        held_out.update(first + own[index] for index in found.indices)
    if not held_out:
        set_of = [number for number, one in enumerate(sets) for _ in range(len(one))] if spare_last else ()
        _, found = split_validation(together, fraction, seed, set_of=set_of)
        assert isinstance(found, Subset)
        held_out.update(found.indices)
    return [index for index in range(len(together)) if index not in held_out], sorted(held_out)


def join_sets(sets: Sequence[ClipDataset]) -> ClipDataset:
    """Return the clips of all sets, one set after the other."""
    joined = sets[0]
    for one in sets[1:]:
        joined = ConcatDataset(joined, one)
    return joined


def share_of(sizes: Sequence[int], most: int) -> list[int]:
    """Return the numbers to take of each size, at most ``most`` in all: equal ones, where there are enough."""
    taken, left = [0] * len(sizes), most
    for rank, number in enumerate(sorted(range(len(sizes)), key=lambda number: sizes[number])):
        taken[number] = min(sizes[number], left // (len(sizes) - rank))
        left -= taken[number]
    return taken
