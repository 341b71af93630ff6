"""Clips that are nearly the same: copies that were encoded, scaled or cut anew, which a hash of bytes does not find.

Two sounds are near-duplicates if the same happens in them at the same time: their levels in 16 bands every 25 ms, in
dB and relative to the half second around, correlate by 0.85 or more, where one may begin up to 0.3 s later. Loudness,
tone colour and fades do not matter, and steady sounds such as rain only match their own copies.

Two videos are near-duplicates if they show the same (the cosine of their mean CLIP features is 0.99 or more) and move
in the same way: their sync features, without what they have in common over time, correlate by 0.6 or more.

Measured on eight pieces of real recordings and six clips of a procedural gong, with features of ``tiny_16k``: copies as
MP3, at another level, with noise at -20 dB, resampled or cut by 0.1 s correlate by 0.93 or more, other sounds of the
gong by at most 0.4, and artificial strokes that are alike to the sample, in other places, by at most 0.6. Videos
encoded anew correlate by 0.8, cut by 0.12 s by 0.5 to 0.8, other videos by at most 0.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from selva.sequence import SYNC_TOKENS_PER_SEGMENT

SAME_SOUND, SAME_PICTURE, SAME_MOTION = 0.85, 0.99, 0.6
MOST_COMPARED = 2000  # clips; every pair is compared

FRAME_SEC, HOP_SEC = 0.1, 0.025
LOCAL_SEC = 0.5  # what changes more slowly, a fade or a gust, is like many others
LARGEST_SHIFT_SEC = 0.3
NUM_BANDS, LOWEST_HZ, HIGHEST_HZ = 16, 100.0, 7000.0
RANGE_DB = 50.0  # what is so far below the loudest band is noise of a codec
LONGEST_SEC = 20.0  # from the beginning; enough to tell
STEADY_DB = 0.5  # a sound that changes less has no pattern that could be compared
MOTION_WIDTH = 32

Group = tuple[tuple[int, ...], float]  # indices, and the lowest similarity that holds them together


def sound_fingerprint(waveform: Tensor, rate: int) -> np.ndarray:
    """Return (frames, NUM_BANDS) float32 of (channels, samples): the level over time in dB around the local mean."""
    mono = waveform.mean(dim=0)[: round(LONGEST_SEC * rate)]
    size, hop = round(FRAME_SEC * rate), max(1, round(HOP_SEC * rate))
    if len(mono) < size:
        return np.zeros((0, NUM_BANDS), np.float32)
    window = torch.hann_window(size)
    spectrum = torch.stft(mono - mono.mean(), size, hop, window=window, center=False, return_complex=True)
    power = spectrum.abs().square()  # (bins, T)
    edges = torch.logspace(math.log10(LOWEST_HZ), math.log10(HIGHEST_HZ), NUM_BANDS + 1)
    # What lies outside belongs to the outer bands, else the leakage of a hum at 50 Hz would be all that there is.
    band = (torch.bucketize(torch.linspace(0, rate / 2, len(power)), edges) - 1).clamp(0, NUM_BANDS - 1)
    bands = torch.zeros(NUM_BANDS, power.shape[1]).index_add_(0, band, power)
    level = 10 * torch.log10(bands.clamp_min(1e-20))  # (bands, T)
    level = level.clamp_min(level.max().item() - RANGE_DB)
    level = level - _local_mean(level)
    if level.square().mean().sqrt() < STEADY_DB:
        level = torch.zeros_like(level)
    return level.T.contiguous().numpy()


def _local_mean(level: Tensor) -> Tensor:
    """Return the mean of (bands, T) over ``LOCAL_SEC`` around each frame, over what there is at both ends."""
    half = round(LOCAL_SEC / HOP_SEC / 2)
    total = torch.nn.functional.pad(level.double().cumsum(dim=1), (1, 0))  # (bands, T + 1)
    index = torch.arange(level.shape[1])
    first, last = (index - half).clamp_min(0), (index + half + 1).clamp_max(level.shape[1])
    return ((total[:, last] - total[:, first]) / (last - first)).float()


def motion_fingerprint(sync_features: Tensor) -> np.ndarray:
    """Return (tokens, MOTION_WIDTH) float32: the change of (tokens, channels) sync features over time.

    The mean of each of the 8 tokens of a segment is taken off, and channels are mixed down at random, which keeps
    correlations.
    """
    tokens, channels = sync_features.shape
    mix = np.random.default_rng(0).standard_normal((channels, MOTION_WIDTH)) / math.sqrt(MOTION_WIDTH)
    mixed = sync_features.double().numpy() @ mix
    segments = mixed.reshape(tokens // SYNC_TOKENS_PER_SEGMENT, SYNC_TOKENS_PER_SEGMENT, MOTION_WIDTH)
    return (segments - segments.mean(axis=0)).reshape(tokens, MOTION_WIDTH).astype(np.float32)


def correlations(fingerprints: Sequence[np.ndarray], largest_shift: int = 0) -> np.ndarray:
    """Return (n, n) float32: the correlation of each two fingerprints over the frames of both, at the best shift.

    Args:
        fingerprints: each (frames, channels), zero on average.
        largest_shift: frames that one may be later than the other.
    """
    count = len(fingerprints)
    lengths = np.array([len(p) for p in fingerprints])
    longest = int(lengths.max(initial=0))
    if not longest:
        return np.zeros((count, count), np.float32)
    stacked = np.zeros((count, longest, fingerprints[0].shape[1]), np.float32)
    for row, values in zip(stacked, fingerprints, strict=True):
        row[: len(values)] = values
    energy = np.pad(np.cumsum(np.square(stacked, dtype=np.float64).sum(axis=2), axis=1), ((0, 0), (1, 0)))  # (n, T + 1)
    index = np.arange(count)
    best = np.zeros((count, count), np.float32)
    for shift in range(min(largest_shift, longest - 1) + 1):
        cross = stacked[:, shift:].reshape(count, -1) @ stacked[:, : longest - shift].reshape(count, -1).T
        common = np.clip(np.minimum(lengths[:, None] - shift, lengths[None, :]), 0, None)  # frames that both have
        later = energy[index[:, None], shift + common] - energy[:, shift][:, None]
        earlier = energy[index[None, :], common]
        scale = np.sqrt(later * earlier)
        found = np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 1e-6).astype(np.float32)
        best = np.maximum(best, np.maximum(found, found.T))
    return best


def same_sounds(fingerprints: Sequence[np.ndarray], hop_sec: float = HOP_SEC) -> list[Group]:
    """Return the groups of sounds that are nearly the same, each given by its :func:`sound_fingerprint`."""
    return _groups(correlations(fingerprints, round(LARGEST_SHIFT_SEC / hop_sec)), SAME_SOUND)


def same_videos(pictures: Sequence[Tensor], motions: Sequence[np.ndarray]) -> list[Group]:
    """Return the groups of videos that are nearly the same.

    Args:
        pictures: mean CLIP features (channels,) of each. motions: the :func:`motion_fingerprint` of each.
    """
    if not pictures:
        return []
    matrix = torch.nn.functional.normalize(torch.stack(list(pictures)), dim=1)
    alike = (matrix @ matrix.T).numpy() >= SAME_PICTURE
    return _groups(np.where(alike, correlations(motions), 0), SAME_MOTION)


def _groups(similarity: np.ndarray, threshold: float) -> list[Group]:
    """Return the connected groups of indices whose similarity reaches ``threshold``."""
    parent = list(range(len(similarity)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    pairs = [(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(similarity, 1) >= threshold), strict=True)]
    for first, second in pairs:
        parent[root(second)] = root(first)
    members: dict[int, list[int]] = {}
    for index in sorted({index for pair in pairs for index in pair}):
        members.setdefault(root(index), []).append(index)
    lowest: dict[int, float] = {}
    for first, second in pairs:
        score = float(similarity[first, second])
        lowest[root(first)] = min(lowest.get(root(first), math.inf), score)
    return [(tuple(indices), lowest[top]) for top, indices in members.items()]


def named_groups(groups: Iterable[Group], ids: Sequence[str]) -> list[tuple[tuple[str, ...], float]]:
    """Return the groups with ids in place of indices."""
    return [(tuple(ids[index] for index in indices), score) for indices, score in groups]
