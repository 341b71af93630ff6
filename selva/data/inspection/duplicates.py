"""Clips that are nearly the same: copies that were encoded, scaled or cut anew, which a hash of bytes does not find.

Two sounds are near-duplicates if they are one recording. First, the same happens in them at the same time: their
levels in 16 bands every 25 ms, in dB and relative to the half second around, correlate by 0.85 or more, where one may
begin up to 0.3 s later. Strokes of two gongs at the same moments do so too, so then the waveforms are compared: with
their spectra flattened half and wholly, so that neither an equaliser nor one loud partial decides, they correlate by
0.65 or more. Loudness, tone colour and fades do not matter; steady sounds such as rain only match their own copies.

Two videos are near-duplicates if they show the same (the cosine of their mean CLIP features is 0.99 or more) and move
in the same way: their sync features, without what they have in common over time, correlate by 0.6 or more.

Measured on the sounds of ``toyworld/``: the waveforms of copies (MP3, AAC, Opus, other levels, shifts of 0.3 s, cuts,
shelves of 6 and 9 dB, a high pass at 100 Hz, noise at -20 dB) correlate by 0.74 or more, those of strokes of two things
of a kind at the same moments by at most 0.53, where their levels correlate by up to 1.0. Videos encoded anew correlate
by 0.8, cut by 0.12 s by 0.5 to 0.8, other videos by at most 0.2 (features of ``tiny_16k``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import resample

from selva.sequence import SYNC_TOKENS_PER_SEGMENT

SAME_SOUND, SAME_WAVEFORM, SAME_PICTURE, SAME_MOTION = 0.85, 0.65, 0.99, 0.6
MOST_COMPARED = 2000  # clips; every pair is compared

FRAME_SEC, HOP_SEC = 0.1, 0.025
LOCAL_SEC = 0.5  # what changes more slowly, a fade or a gust, is like many others
LARGEST_SHIFT_SEC = 0.3
NUM_BANDS, LOWEST_HZ, HIGHEST_HZ = 16, 100.0, 7000.0
RANGE_DB = 50.0  # what is so far below the loudest band is noise of a codec
LONGEST_SEC = 20.0  # from the beginning; enough to tell
STEADY_DB = 0.5  # a sound that changes less has no pattern that could be compared
MOTION_WIDTH = 32
FINE_RATE, FINE_SEC = 16_000, 8.0  # of the waveforms that are compared
FLATTENED = (0.5, 1.0)  # of their spectra
ENVELOPE_HZ, FLOOR_DB = 200.0, -30.0  # how smooth what is flattened is; below it nothing is raised
AUDIBLE_HZ = (60.0, 7200.0)
MOST_WAVEFORMS = 3000  # pairs, some minutes of work

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


def fine_fingerprint(waveform: Tensor, rate: int) -> Tensor:
    """Return (2, samples) float32 of (channels, samples): the sound at 16 kHz, its spectrum half and wholly flat."""
    mono = resample(waveform.mean(dim=0)[: round(FINE_SEC * rate)], rate, FINE_RATE)
    size = 2 * len(mono)  # room for shifts
    spectrum = torch.fft.rfft(mono - mono.mean(), size)
    power = spectrum.abs().square()
    half = max(1, round(ENVELOPE_HZ / FINE_RATE * size / 2))
    total = torch.nn.functional.pad(power.double().cumsum(dim=0), (1, 0))
    index = torch.arange(len(power))
    first, last = (index - half).clamp_min(0), (index + half + 1).clamp_max(len(power))
    envelope = ((total[last] - total[first]) / (last - first)).float()
    envelope = envelope + envelope.max().clamp_min(1e-20) * 10 ** (FLOOR_DB / 10)
    hertz = torch.linspace(0, FINE_RATE / 2, len(power))
    spectrum = spectrum * ((hertz > AUDIBLE_HZ[0]) & (hertz < AUDIBLE_HZ[1]))
    flat = torch.stack([spectrum / envelope ** (share / 2) for share in FLATTENED])
    return torch.fft.irfft(flat, size)[:, : len(mono)]


def waveform_correlation(one: Tensor, other: Tensor) -> float:
    """Return the correlation of two :func:`fine_fingerprint` at the best shift, 0 to 1, whatever their signs."""
    size = one.shape[1] + other.shape[1]
    product = torch.fft.rfft(one, size) * torch.fft.rfft(other, size).conj()
    most = min(round((LARGEST_SHIFT_SEC + HOP_SEC) * FINE_RATE), one.shape[1] - 1, other.shape[1] - 1)
    shifts = torch.arange(-most, most + 1)  # that one is later than the other
    cross = torch.fft.irfft(product, size)[:, shifts]
    first = shifts.clamp_min(0)  # of one, of what both have
    last = (other.shape[1] + shifts).clamp_max(one.shape[1])
    energy = _energy_between(one, first, last) * _energy_between(other, first - shifts, last - shifts)
    found = cross.abs() / energy.sqrt().clamp_min(1e-9)
    return found.max(dim=1).values.mean().clamp_max(1.0).item()


def _energy_between(values: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return the sums of squares of (rows, samples) between the samples ``first`` and ``last``, at least 2 % of all."""
    total = torch.nn.functional.pad(values.double().square().cumsum(dim=1), (1, 0))
    return (total[:, last] - total[:, first]).clamp_min(0.02 * total[:, -1:])


def same_sounds(
    fingerprints: Sequence[np.ndarray], hop_sec: float = HOP_SEC, closely: Callable[[int, int], float] | None = None
) -> tuple[list[Group], int]:
    """Return the groups of sounds that are nearly the same, and the number of pairs that were not compared closely.

    Args:
        fingerprints: the :func:`sound_fingerprint` of each.
        closely: (index, index) -> :func:`waveform_correlation` of these two; None where there are no waveforms.
    """
    similarity = correlations(fingerprints, round(LARGEST_SHIFT_SEC / hop_sec))
    return _groups(similarity, SAME_SOUND, closely)


def same_videos(pictures: Sequence[Tensor], motions: Sequence[np.ndarray]) -> list[Group]:
    """Return the groups of videos that are nearly the same.

    Args:
        pictures: mean CLIP features (channels,) of each. motions: the :func:`motion_fingerprint` of each.
    """
    if not pictures:
        return []
    matrix = torch.nn.functional.normalize(torch.stack(list(pictures)), dim=1)
    alike = (matrix @ matrix.T).numpy() >= SAME_PICTURE
    return _groups(np.where(alike, correlations(motions), 0), SAME_MOTION)[0]


def _groups(
    similarity: np.ndarray, threshold: float, closely: Callable[[int, int], float] | None = None
) -> tuple[list[Group], int]:
    """Return the connected groups of indices whose similarity reaches ``threshold``, and the pairs left undecided.

    Args:
        closely: what a pair has to reach ``SAME_WAVEFORM`` in too. It is asked once for each pair that is not in one
            group already, and ``MOST_WAVEFORMS`` times at most.
    """
    parent = list(range(len(similarity)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    pairs, asked, undecided = [], 0, 0
    for first, second in zip(*map(np.ndarray.tolist, np.nonzero(np.triu(similarity, 1) >= threshold)), strict=True):
        if closely is not None and root(first) != root(second):
            if asked == MOST_WAVEFORMS:
                undecided += 1
                continue
            asked += 1
            if closely(first, second) < SAME_WAVEFORM:
                continue
        pairs.append((first, second))
        parent[root(second)] = root(first)
    members: dict[int, list[int]] = {}
    for index in sorted({index for pair in pairs for index in pair}):
        members.setdefault(root(index), []).append(index)
    lowest: dict[int, float] = {}
    for first, second in pairs:
        score = float(similarity[first, second])
        lowest[root(first)] = min(lowest.get(root(first), math.inf), score)
    return [(tuple(indices), lowest[top]) for top, indices in members.items()], undecided


def named_groups(groups: Iterable[Group], ids: Sequence[str]) -> list[tuple[tuple[str, ...], float]]:
    """Return the groups with ids in place of indices."""
    return [(tuple(ids[index] for index in indices), score) for indices, score in groups]
