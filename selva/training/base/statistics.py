"""Mean and deviation of the latents of a data set, by which a generator trained from scratch normalises them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from selva.data.memmap.reader import MemmapDataset
from selva.utils.progress import Progress

CHUNK = 256  # rows that are in memory at a time


def latent_statistics(sets: Sequence[MemmapDataset]) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (1, 1, C) per channel of the posterior means of all rows and tokens, in float32.

    Sets with video only, where there are any: as MMAudio, which counts the first of them. Every row counts once,
    whatever the weight of its set. Divisor n - 1.
    """
    chosen = [one for one in sets if one.has_video] or list(sets)
    channels = chosen[0].rows["mean"].shape[2]
    count, mean, square = 0, np.zeros(channels), np.zeros(channels)  # of the values, their mean, squared distances
    with Progress(sum(map(len, chosen)), "latent statistics", "rows") as progress:
        done = 0
        for one in chosen:
            for first in range(0, len(one), CHUNK):
                values = one.rows["mean"][first : first + CHUNK].astype(np.float64).reshape(-1, channels)
                # Chan, Golub and LeVeque (1979): two parts are joined without losing digits to a large mean.
                new, distance = count + len(values), values.mean(0) - mean
                square += values.var(0) * len(values) + distance**2 * (count * len(values) / new)
                mean += distance * (len(values) / new)
                count = new
                done += min(CHUNK, len(one) - first)
                progress.update(done)
    std = np.sqrt(square / (count - 1))
    return tuple(torch.from_numpy(x.astype(np.float32))[None, None] for x in (mean, std))  # pyright: ignore[reportReturnType]
