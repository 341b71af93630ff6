"""Several data sets as one, each with a weight: which clip comes at which place, for any number of processes.

    place p, from 0 -> epoch p // size, place in it -> a shuffled item -> (set, clip, copy)

Everything is a function of the seed and the place, so a run can go on at any place, and nothing depends on how many
processes share the work. Only the order of one epoch is held in memory: 8 bytes an item.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from selva.data.dataset import ClipDataset, TrainingClip
from selva.data.source import DataSource
from selva.utils.errors import UserError
from selva.utils.text import counted

MOST_PARTS = 20  # a weight counts in so many parts of one


class Visit(NamedTuple):
    """One use of a clip.

    Attributes:
        epoch: from 0. item: number in the epoch, the same wherever the shuffle puts it; with the epoch, it names the
            visit. source: number of the set. clip: number of the clip in it.
    """

    epoch: int
    item: int
    source: int
    clip: int


def seed_of(*parts: object) -> int:
    """Return a seed of 32 bits, all that PyTorch's generator on the CPU takes, that any parts of the text decide."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


class Mixture:
    """The order in which the clips of several sets are visited.

    An epoch visits every clip of a set of weight 3 three times. Of a weight that is no whole number, the rest is made
    of other clips in every epoch, so that all are visited equally often in the long run.

    Args:
        sizes: numbers of clips of the sets. weights: of the sets, above 0. names: for messages.

    Raises:
        UserError: a set is empty, or its weight leaves no clip of it.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, names: Sequence[str] = ()) -> None:
        self.sizes, self.weights, self.seed = list(sizes), list(weights), seed
        self.counts = [round(size * weight) for size, weight in zip(self.sizes, self.weights, strict=True)]
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if not count:
                name = names[number] if names else f"set {number}"
                raise UserError(f"{name}: has {counted(size, 'clip')} and the weight {self.weights[number]:g}, so an "
                                "epoch would visit none of them; give a larger weight")
        self.size = sum(self.counts)  # of an epoch
        self._orders: dict[int, Tensor] = {}  # of two epochs: threads that read ahead may be in the next one already
        self._making = threading.Lock()

    def visit(self, place: int) -> Visit:
        """Return the visit at ``place`` (from 0) of the endless sequence of epochs."""
        epoch, within = divmod(place, self.size)
        item = int(self._order_of(epoch)[within])
        source, first = 0, 0
        while item >= first + self.counts[source]:
            first += self.counts[source]
            source += 1
        return Visit(epoch, item, source, self._clip(epoch, source, item - first))

    def per_source(self, visits: Sequence[Visit]) -> list[int]:
        """Return the number of visits to each set."""
        return [sum(visit.source == source for visit in visits) for source in range(len(self.sizes))]

    def _clip(self, epoch: int, source: int, number: int) -> int:
        """Return the clip that is the ``number``-th visit to a set in an epoch."""
        size, rest = self.sizes[source], self.counts[source] % self.sizes[source]
        whole = self.counts[source] - rest
        if number < whole:
            return number % size
        # Every epoch goes on with the rest where the one before it has ended, in an order without neighbours.
        return (epoch * rest + number - whole) * _stride(size) % size

    def _order_of(self, epoch: int) -> Tensor:
        with self._making:
            if epoch not in self._orders:
                if len(self._orders) > 1:
                    del self._orders[min(self._orders)]
                rng = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
                self._orders[epoch] = torch.randperm(self.size, generator=rng)
            return self._orders[epoch]


def _stride(size: int) -> int:
    """Return a step that visits every one of ``size`` places, far from one to the next."""
    step = max(1, round(size * 0.6180339887))
    while math.gcd(step, size) > 1:
        step += 1
    return step


def repeats_of(weights: Sequence[float]) -> list[int]:
    """Return the visits of each set's clips in an epoch that is long enough for all weights: for 1 and 1.5, 2 and 3."""
    exact = [Fraction(weight).limit_denominator(MOST_PARTS) for weight in weights]
    if any(weight <= 0 for weight in exact):
        raise UserError(f"the weights are {list(weights)}, expected at least 1/{MOST_PARTS} each")
    together = math.lcm(*(weight.denominator for weight in exact))
    times = [int(weight * together) for weight in exact]
    return [time // math.gcd(*times) for time in times]


CLOSE_ENOUGH, MOST_ROUNDS, MOST_VISITS = 0.01, 100, 10_000_000


def visits_of_sets(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return the visits of each set's clips in an epoch that uses the sets, not their clips, as often as they weigh.

    Sets of 6 and of 20 clips with equal weights are visited 10 and 3 times: 60 visits each. The shares are right within
    a hundredth of themselves, in as short an epoch as that allows.

    Raises:
        UserError: a set is empty, or an epoch would have more than ``MOST_VISITS``.
    """
    if not all(sizes):
        raise UserError(f"sets of {', '.join(map(str, sizes))} clips cannot be used equally often, expected at least 1")
    per_clip = [weight / size for size, weight in zip(sizes, weights, strict=True)]
    ratios = [one / min(per_clip) for one in per_clip]  # at least 1
    visits = [1]
    for rounds in range(1, MOST_ROUNDS + 1):
        visits = [round(ratio * rounds) for ratio in ratios]
        if all(abs(count / (ratio * rounds) - 1) <= CLOSE_ENOUGH for count, ratio in zip(visits, ratios, strict=True)):
            break
    total = sum(size * count for size, count in zip(sizes, visits, strict=True))
    if total > MOST_VISITS:
        raise UserError(f"sets of {', '.join(map(str, sizes))} clips with the weights {list(weights)} make an epoch of "
                        f"{total:,} uses, expected at most {MOST_VISITS:,}; take fewer clips of the largest")
    return visits


class MixedClips:
    """Sets of clips with their order.

    Args:
        sets: with the sources they were read from.
    """

    def __init__(self, sets: Sequence[ClipDataset], sources: Sequence[DataSource], seed: int) -> None:
        self.sets, self.sources = list(sets), list(sources)
        self.mixture = Mixture([len(one) for one in sets], [source.weight for source in sources], seed,
                               [str(source.path) for source in sources])

    def clip(self, visit: Visit) -> TrainingClip:
        """Return the clip of a visit, read now."""
        return self.sets[visit.source].clip(visit.clip)

    def lines(self) -> list[str]:
        """Return a line for every set, for the log."""
        total = self.mixture.size
        return [
            f"{source.path}: {counted(len(clips), 'clip', grouped=True)}, weight {source.weight:g}, "
            f"{count / total:.1%} of an epoch"
            for source, clips, count in zip(self.sources, self.sets, self.mixture.counts, strict=True)
        ]
