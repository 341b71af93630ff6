"""Numbers that describe a sound, and how far one sound is from another.

    sound -> level, spectral centroid, roll-off, flatness, onsets
    sound, reference -> log-spectral distance, mel-cepstral distortion, agreement of onsets

They are simple on purpose: each has a closed form that can be checked, none needs a network. They tell whether a change
is large, where it lies and whether events stay in time; they do not tell whether a sound is good.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selva.audio.loudness import integrated_loudness, rms_db, true_peak_db
from selva.utils.errors import UserError

# -- spectra: frames of about 50 ms, the power of two nearest to it ---------------------------------------------------
FRAME_SEC = 0.05
OVERLAP = 4  # frames that cover a sample
FLOOR_DB = -100.0  # of a full-scale sine; quieter parts of a spectrum count as this loud
ROLLOFF_SHARE = 0.85  # of the power lies below the roll-off
BLOCK_FRAMES = 1024  # analysed at once: the frames of minutes are gigabytes
SILENCE_DB = -90.0  # quieter sounds have no spectrum worth describing

# -- mel cepstra ------------------------------------------------------------------------------------------------------
NUM_MELS = 80
NUM_CEPSTRA = 13  # 1 to 13; the 0th is the level
MEL_RANGE_HZ = (30.0, 8000.0)

LOUD_RANGE_DB = 40.0  # below its loudest frame, a frame has no part in what a sound is like on the whole

# -- onsets -----------------------------------------------------------------------------------------------------------
ONSET_FRAME_SEC = 0.032
ONSET_STEP_SEC = 0.004
ONSET_BANDS, ONSET_BANDS_HZ = 40, (60.0, 8000.0)
ONSET_LAG_FRAMES = 8  # a frame is compared with the one 32 ms earlier, with which it shares no samples
ONSET_RANGE_DB = 60.0  # below the loudest band and frame, a band counts as silent
ONSET_FLOOR_DB = -95.0  # of full scale; below, likewise
ONSET_BROAD_RISE_DB = 5.0  # mean rise over all bands that makes an onset
ONSET_NARROW_RISE_DB = 12.0  # mean rise, weighted by power, that makes one too: a low note moves few of the bands
ONSET_AROUND_SEC = 0.5  # to either side: rises count above what is usual there
ONSET_GAP_SEC = 0.06  # the closest that two onsets can be
ONSET_SHARE = 0.75  # of a peak's strength at which the onset is timed; the peak itself comes up to 18 ms late
MATCH_TOLERANCE_SEC = 0.08


# ---------------------------------------------------------------------------------------------------------------
# everything at once
# ---------------------------------------------------------------------------------------------------------------


def compare_sounds(sound: Tensor, reference: Tensor | None, rate: int) -> dict[str, Any]:
    """Return the measurements of a sound, alone and against a reference, as JSON can hold them.

    Args:
        sound, reference: (samples,) mono at the same ``rate``. Of unequal lengths, the common beginning is compared.

    Returns:
        ``duration_sec``, ``rms_db``, ``lufs``, ``true_peak_db``, ``centroid_hz``, ``rolloff_hz``, ``flatness`` and
        ``num_onsets``; with a reference also ``log_spectral_distance_db``, ``mel_cepstral_distortion_db``,
        ``onset_precision``, ``onset_recall``, ``onset_f1`` and ``onset_offset_sec``. None where a number has no
        meaning: the centroid of silence, or a distance where either sound is silent (below -90 dB). Silence would
        seem near to a recording with long pauses, nearer than a faint hiss does.

    Raises:
        ValueError: not (samples,), empty, or not finite.
    """
    _check(sound)
    shape = spectral_shape(sound, rate)
    onsets = onset_times(sound, rate)
    result: dict[str, Any] = {
        "duration_sec": len(sound) / rate,
        "rms_db": _finite(rms_db(sound)),
        "lufs": integrated_loudness(sound[None], rate),
        "true_peak_db": _finite(true_peak_db(sound, rate)),
        "centroid_hz": shape.centroid_hz if shape else None,
        "rolloff_hz": shape.rolloff_hz if shape else None,
        "flatness": shape.flatness if shape else None,
        "num_onsets": len(onsets),
    }
    if reference is None:
        return result
    _check(reference)
    length = min(len(sound), len(reference))
    sound, reference = sound[:length], reference[:length]
    match = match_events(onset_times(sound, rate), onset_times(reference, rate))
    comparable = not is_silent(sound) and not is_silent(reference)
    return result | {
        "log_spectral_distance_db": log_spectral_distance(sound, reference, rate) if comparable else None,
        "mel_cepstral_distortion_db": mel_cepstral_distortion(sound, reference, rate) if comparable else None,
        "onset_precision": match.precision,
        "onset_recall": match.recall,
        "onset_f1": match.f1,
        "onset_offset_sec": match.mean_offset_sec,
    }


def is_silent(waveform: Tensor) -> bool:
    """Return True for (samples,) below -90 dB of full scale: no spectrum of it is worth comparing."""
    return rms_db(waveform) < SILENCE_DB


def _check(waveform: Tensor) -> None:
    if waveform.ndim != 1 or not len(waveform):
        raise UserError(f"sound is {tuple(waveform.shape)}, expected (samples,), at least one")
    if not waveform.isfinite().all():
        raise UserError("the sound has samples that are NaN or infinite")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------------------
# spectra
# ---------------------------------------------------------------------------------------------------------------


def power_frames(
    waveform: Tensor, rate: int, frame_sec: float, step_sec: float | None = None, padded: bool = True
) -> Tensor:
    """Return (frames, bins) float64 power, 1 for a full-scale sine in the middle of a bin.

    Hann frames of the power of two nearest to ``frame_sec``, every ``step_sec`` (a quarter of a frame if None). Padded,
    the first is centred on the first sample and the sound is silent beyond its ends; otherwise all frames lie inside.
    """
    return torch.cat(list(_power_blocks(waveform, rate, frame_sec, step_sec, padded)))


def _power_blocks(
    waveform: Tensor, rate: int, frame_sec: float, step_sec: float | None = None, padded: bool = True
) -> Iterator[Tensor]:
    """Yield the rows of :func:`power_frames` in order, at most ``BLOCK_FRAMES`` at a time."""
    size = _frame_size(rate, frame_sec)
    step = size // OVERLAP if step_sec is None else round(step_sec * rate)
    window = torch.hann_window(size, dtype=torch.float64)
    scale = (2 / window.sum()) ** 2
    margin = size // 2 if padded else 0
    num_frames = max(0, len(waveform) + 2 * margin - size) // step + 1
    for first in range(0, num_frames, BLOCK_FRAMES):
        start = first * step - margin
        end = (min(first + BLOCK_FRAMES, num_frames) - 1) * step - margin + size
        block = waveform[max(0, start) : max(0, end)].detach().cpu().double()
        block = torch.nn.functional.pad(block, (max(0, -start), max(0, end - len(waveform))))
        yield torch.fft.rfft(block.unfold(0, size, step) * window).abs().square() * scale


def _frame_size(rate: int, frame_sec: float) -> int:
    return 2 ** round(math.log2(frame_sec * rate))


@dataclass(frozen=True)
class SpectralShape:
    """Distribution of the power of a sound: mean frequency, the one below which 85 % of it lie, and flatness.

    ``flatness`` is the geometric over the arithmetic mean of the power spectrum: near 1 for white noise, 0 for a sine.
    """

    centroid_hz: float
    rolloff_hz: float
    flatness: float


def spectral_shape(waveform: Tensor, rate: int) -> SpectralShape | None:
    """Return the shape of the spectrum of (samples,), its power averaged over time; None for silence."""
    if is_silent(waveform):
        return None
    total, num_frames = torch.zeros(()), 0
    for block in _power_blocks(waveform, rate, FRAME_SEC):
        total, num_frames = total + block.sum(dim=0), num_frames + len(block)
    power = (total / num_frames)[1:]  # (bins,) without the constant part
    frequencies = torch.arange(1, len(power) + 1, dtype=torch.float64) * rate / (2 * len(power))
    share = power.cumsum(0) / power.sum()
    floor = power.max() * 1e-15  # of the arithmetic
    return SpectralShape(
        centroid_hz=((power * frequencies).sum() / power.sum()).item(),
        rolloff_hz=frequencies[int((share < ROLLOFF_SHARE).sum())].item(),
        flatness=((power + floor).log().mean().exp() / (power + floor).mean()).item(),
    )


def log_spectral_distance(sound: Tensor, reference: Tensor, rate: int) -> float:
    """Return the log-spectral distance in dB of two sounds (samples,) of equal length.

    Per frame the root mean square, over frequencies, of the difference of the levels in dB; then the mean over frames.
    A change of gain by g dB gives |g|, as long as nothing lies below the floor of -100 dB.
    """
    pairs = zip(_power_blocks(sound, rate, FRAME_SEC), _power_blocks(reference, rate, FRAME_SEC), strict=True)
    return torch.cat([(_level_db(a) - _level_db(b)).square().mean(dim=1).sqrt() for a, b in pairs]).mean().item()


def _level_db(power: Tensor) -> Tensor:
    return 10 * power.clamp(min=10 ** (FLOOR_DB / 10)).log10()


def mel_cepstral_distortion(sound: Tensor, reference: Tensor, rate: int) -> float:
    """Return the mel-cepstral distortion in dB of two sounds (samples,) of equal length.

    Per frame ``10 / ln 10 * sqrt(2 sum_d (c_d - c'_d)^2)`` over the cepstra d = 1 … 13 (Kubichek 1993), then the mean
    over frames; without time warping, because time matters here. The cepstra are ``c_d = mean over m of ln P_m
    cos(pi d (m + 1/2) / 80)`` of the power P in 80 mel bands (HTK scale) from 30 Hz to 8 kHz, or to half the rate. So
    defined it is the root mean square over bands of the difference in dB, of what is smooth over the bands and without
    the level: a change of gain gives 0.
    """
    a, b = (_mel_cepstra(x, rate) for x in (sound, reference))
    return (10 / math.log(10) * (2 * (a - b).square().sum(dim=1)).sqrt()).mean().item()


def _mel_cepstra(waveform: Tensor, rate: int) -> Tensor:
    """Return (frames, 13) float64 mel cepstra 1 to 13."""
    low, high = MEL_RANGE_HZ
    to_mel = _mel_bands(_frame_size(rate, FRAME_SEC) // 2 + 1, rate, NUM_MELS, low, min(high, rate / 2))
    floor = 10 ** (FLOOR_DB / 10)
    return torch.cat([cepstra((power @ to_mel).clamp(min=floor).log())
                      for power in _power_blocks(waveform, rate, FRAME_SEC)])


def cepstra(log_mel: Tensor) -> Tensor:
    """Return (frames, 13), the cosine components 1 to 13 along the bands of (frames, bands)."""
    bands = log_mel.shape[1]
    place = (torch.arange(bands, dtype=torch.float64) + 0.5) / bands
    order = torch.arange(1, NUM_CEPSTRA + 1, dtype=torch.float64)
    return log_mel.double() @ torch.cos(math.pi * torch.outer(place, order)) / bands


def _mel_bands(num_bins: int, rate: int, bands: int, low_hz: float, high_hz: float) -> Tensor:
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(num_bins, low_hz, high_hz, bands, rate).double()  # (bins, bands), triangles of height 1


def long_term_spectrum(waveform: Tensor, rate: int) -> Tensor | None:
    """Return (80,) float64 levels in dB of the mel bands over a whole sound, None if it is silent.

    The mean power of the frames that are within 40 dB of the loudest, less the mean over bands: neither the gain nor
    when things happen matters. Bands and frames as for :func:`mel_cepstral_distortion`.
    """
    if is_silent(waveform):
        return None
    low, high = MEL_RANGE_HZ
    to_mel = _mel_bands(_frame_size(rate, FRAME_SEC) // 2 + 1, rate, NUM_MELS, low, min(high, rate / 2))
    power = torch.cat([power @ to_mel for power in _power_blocks(waveform, rate, FRAME_SEC)])  # (frames, bands)
    loudness = power.sum(dim=1)
    level = _level_db(power[loudness >= loudness.max() * 10 ** (-LOUD_RANGE_DB / 10)].mean(dim=0))
    return level - level.mean()


# ---------------------------------------------------------------------------------------------------------------
# onsets
# ---------------------------------------------------------------------------------------------------------------


def onset_times(waveform: Tensor, rate: int) -> list[float]:
    """Return the times in seconds at which something begins in (samples,): strokes, clicks, notes.

    Local maxima of :func:`onset_strength`, at least 1 above its median over the half second to either side, so that
    steady noise has none; of several within 60 ms the strongest counts. On synthetic impacts the times are within
    10 ms. The constants at the top of this file are all there is to tune.
    """
    _check(waveform)
    strength, frame_times = onset_strength(waveform, rate)
    around, gap = round(ONSET_AROUND_SEC / ONSET_STEP_SEC), round(ONSET_GAP_SEC / ONSET_STEP_SEC)
    strength = strength - _running_median(strength, around)
    peaks: list[int] = []
    is_near_peak = np.zeros(len(strength), bool)
    for frame in np.argsort(-strength, kind="stable"):
        if strength[frame] < 1:
            break
        if not is_near_peak[frame]:
            peaks.append(frame)
            is_near_peak[max(0, frame - gap) : frame + gap + 1] = True
    times = []
    for frame in sorted(peaks):
        threshold, first = ONSET_SHARE * strength[frame], frame - ONSET_LAG_FRAMES
        while frame > max(0, first) and strength[frame - 1] >= threshold:
            frame -= 1
        times.append(float(frame_times[frame]))
    return times


def _running_median(values: np.ndarray, around: int) -> np.ndarray:
    """Return the median of every value of (n,) with ``around`` more to either side, mirrored at the ends."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, around, mode="symmetric"), 2 * around + 1)
    blocks = (windows[first : first + BLOCK_FRAMES] for first in range(0, len(values), BLOCK_FRAMES))
    return np.concatenate([np.median(block, axis=1) for block in blocks])


def onset_strength(waveform: Tensor, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (frames,) the rise of the sound, 1 being an onset, and (frames,) the times in seconds.

    Spectral flux in dB: the rise of the level against 32 ms earlier, where there is one, in 40 mel bands from 60 Hz to
    8 kHz. The strength is the mean rise over 5 dB, or the mean weighted by the bands' power over 12 dB, whichever is
    more. What was before the beginning is taken to be what is usual in the first half second.
    """
    bands = _onset_bands(waveform, rate)  # (frames, bands)
    floor = max(ONSET_FLOOR_DB, 10 * math.log10(max(bands.max().item(), 1e-30)) - ONSET_RANGE_DB)
    usual = _onset_level(bands[: round(ONSET_AROUND_SEC / ONSET_STEP_SEC)], floor).median(dim=0).values  # (bands,)
    strength = []
    for first in range(0, len(bands), BLOCK_FRAMES):
        block, lag = bands[first : first + BLOCK_FRAMES], min(first, ONSET_LAG_FRAMES)
        level = _onset_level(bands[first - lag : first + BLOCK_FRAMES], floor)
        before = torch.cat([usual.expand(ONSET_LAG_FRAMES - lag, -1), level])[: len(block)]
        rise = (level[lag:] - before).clamp(min=0)
        above = (block - 10 ** (floor / 10)).clamp(min=0)
        share = above / above.sum(dim=1, keepdim=True).clamp(min=1e-30)
        broad, narrow = rise.mean(dim=1) / ONSET_BROAD_RISE_DB, (share * rise).sum(dim=1) / ONSET_NARROW_RISE_DB
        strength.append(torch.maximum(broad, narrow))
    centre, step = _frame_size(rate, ONSET_FRAME_SEC) / 2, round(ONSET_STEP_SEC * rate)
    return torch.cat(strength).numpy(), (centre + step * np.arange(len(bands))) / rate


def _onset_level(bands: Tensor, floor_db: float) -> Tensor:
    return (10 * bands.clamp(min=1e-30).log10()).clamp(min=floor_db)


def _onset_bands(waveform: Tensor, rate: int) -> Tensor:
    """Return (frames, bands) float64 power in mel bands: 80 kB per second, of which all must be seen for the floor."""
    size = _frame_size(rate, ONSET_FRAME_SEC)
    low, high = ONSET_BANDS_HZ
    to_bands = _mel_bands(size // 2 + 1, rate, ONSET_BANDS, low, min(high, rate / 2))
    return torch.cat([power @ to_bands
                      for power in _power_blocks(waveform, rate, ONSET_FRAME_SEC, ONSET_STEP_SEC, padded=False)])


@dataclass(frozen=True)
class EventMatch:
    """Pairs of found and true events that belong together.

    Attributes:
        pairs: (index found, index true), in order. num_found, num_true: how many there are of each.
        mean_offset_sec: found minus true time, averaged over the pairs; None without pairs.
    """

    pairs: tuple[tuple[int, int], ...]
    num_found: int
    num_true: int
    mean_offset_sec: float | None

    @property
    def precision(self) -> float:
        """Share of the found events that are true; 1 if none were found and none are there."""
        return len(self.pairs) / self.num_found if self.num_found else float(self.num_true == 0)

    @property
    def recall(self) -> float:
        """Share of the true events that were found; 1 if none are there and none were found."""
        return len(self.pairs) / self.num_true if self.num_true else float(self.num_found == 0)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        both = self.num_found + self.num_true
        return 2 * len(self.pairs) / both if both else 1.0


def match_events(
    found: Sequence[float], true: Sequence[float], tolerance_sec: float = MATCH_TOLERANCE_SEC
) -> EventMatch:
    """Return the best one-to-one matching of times no further apart than ``tolerance_sec``.

    Best is: as many pairs as possible, and of those the matching with the least sum of distances. The order of the
    times does not matter; indices refer to the sequences as given.
    """
    f_order, t_order = np.argsort(found, kind="stable"), np.argsort(true, kind="stable")
    # best(i, j): (pairs, -sum of distances) of the first i found and the first j true times. Times on a line are best
    # matched in order, so the last of either is left out, or both are a pair. With those before firsts[i] the found
    # time i is no pair, so best(i, j) = best(i - 1, j) there, and with those from the end of the row on neither it nor
    # any earlier one is. So only the rows between are kept.
    firsts, rows, first, end, reach = [0], [[(0, 0.0)]], 0, 0, tolerance_sec + 1e-9

    def best(i: int, j: int) -> tuple[int, float]:
        return rows[i][min(j - firsts[i], len(rows[i]) - 1)]

    for i, f in enumerate(f_order, 1):
        while first < len(true) and found[f] - true[t_order[first]] > reach:
            first += 1
        end = max(end, first)
        while end < len(true) and true[t_order[end]] - found[f] <= reach:
            end += 1
        row = [best(i - 1, first)]
        for j in range(first + 1, end + 1):
            pairs, closeness = best(i - 1, j - 1)
            row.append(max(best(i - 1, j), row[-1], (pairs + 1, closeness - abs(found[f] - true[t_order[j - 1]]))))
        firsts.append(first)
        rows.append(row)
    pairs, i, j = [], len(found), len(true)
    while i and j:
        if best(i, j) == best(i - 1, j):
            i -= 1
        elif best(i, j) == best(i, j - 1):
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((int(f_order[i]), int(t_order[j])))
    pairs.reverse()
    offsets = [found[f] - true[t] for f, t in pairs]
    return EventMatch(tuple(pairs), len(found), len(true), sum(offsets) / len(offsets) if offsets else None)
