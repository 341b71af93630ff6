"""Loudness and true peak as ITU-R BS.1770-4 measures them, and bringing a sound to a level.

torchaudio's own loudness limits the sound to full scale between the two filters, and so is up to several dB low for
loud sound; here the filters run without a limit, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selva.audio.config import DEFAULT_TARGETS, LOUDNESS_METHODS
from selva.utils.errors import UserError

BLOCK_SEC, STEP_SEC = 0.4, 0.1
ABSOLUTE_GATE_LUFS, RELATIVE_GATE_LU = -70.0, -10.0
OFFSET_DB = -0.691  # makes a 997 Hz sine at full scale in one channel -3.01 LUFS

TRUE_PEAK_OVERSAMPLING = 4  # BS.1770-4, annex 2
TRUE_PEAK_FILTER_WIDTH = 16  # zero crossings on each side
TRUE_PEAK_BLOCK = 1 << 18  # samples resampled at once, with so many more on each side, which the filter reaches
TRUE_PEAK_MARGIN = 2 * TRUE_PEAK_FILTER_WIDTH
TRUE_PEAK_LIMIT_DB = -1.0  # EBU R 128
SILENCE_DB = -90.0  # quieter sound is noise of the arithmetic, which no gain makes useful

UNITS = {"rms": "dBFS RMS", "lufs": "LUFS", "peak": "dBTP"}

Filter = tuple[tuple[float, float, float], tuple[float, float, float]]  # b and a of a second-order section


def integrated_loudness(waveform: Tensor, rate: int) -> float | None:
    """Return the loudness in LUFS of (channels, samples); None if it is shorter than 0.4 s or too quiet to count.

    Every channel has weight 1, as left, right and centre have in the standard.
    """
    from torchaudio.functional import lfilter

    block, step = round(BLOCK_SEC * rate), round(STEP_SEC * rate)
    if waveform.shape[1] < block:
        return None
    weighted = waveform.double()
    for b, a in (head_filter(rate), low_cut_filter(rate)):
        weighted = lfilter(weighted, torch.tensor(a).double(), torch.tensor(b).double(), clamp=False)
    power = weighted.square().unfold(1, block, step).mean(dim=2).sum(dim=0)  # (blocks,)
    loud = power[power > _power(ABSOLUTE_GATE_LUFS)]
    if not len(loud):
        return None
    loud = loud[loud > loud.mean() * 10 ** (RELATIVE_GATE_LU / 10)]
    return OFFSET_DB + 10 * math.log10(loud.mean().item())


def _power(lufs: float) -> float:
    return 10 ** ((lufs - OFFSET_DB) / 10)


def head_filter(rate: int) -> Filter:
    """Return the first stage at any rate: a shelf of 4 dB above 1.7 kHz, as of a head in the sound field.

    The standard tables it for 48 kHz; the analogue filter behind the table is transformed to ``rate``.
    """
    centre, gain, quality = 1681.974450955533, 10 ** (3.999843853973347 / 20), 0.7071752369554196
    k = math.tan(math.pi * centre / rate)
    band = gain**0.4996667741545416
    a0 = 1 + k / quality + k * k
    b = ((gain + band * k / quality + k * k) / a0, 2 * (k * k - gain) / a0, (gain - band * k / quality + k * k) / a0)
    return b, (1.0, 2 * (k * k - 1) / a0, (1 - k / quality + k * k) / a0)


def low_cut_filter(rate: int) -> Filter:
    """Return the second stage at any rate: a high pass at 38 Hz, as of the ear."""
    centre, quality = 38.13547087602444, 0.5003270373238773
    k = math.tan(math.pi * centre / rate)
    a0 = 1 + k / quality + k * k
    return (1.0, -2.0, 1.0), (1.0, 2 * (k * k - 1) / a0, (1 - k / quality + k * k) / a0)


def rms_db(waveform: Tensor) -> float:
    """Return the root mean square over all samples and channels in dB of full scale; -inf for digital silence."""
    return _decibels(waveform.double().square().mean().sqrt().item()) if waveform.numel() else -math.inf


def true_peak_db(waveform: Tensor, rate: int) -> float:
    """Return the true peak in dBTP: the largest magnitude that the sound reaches between its samples, too.

    Measured at four times the rate (BS.1770-4, annex 2); never below the largest sample.

    Args:
        waveform: (..., samples), channels together. Returns -inf for digital silence or no samples.
    """
    from torchaudio.functional import resample

    if not waveform.numel():
        return -math.inf
    peak, num_samples = 0.0, waveform.shape[-1]
    for first in range(0, num_samples, TRUE_PEAK_BLOCK):
        before = min(first, TRUE_PEAK_MARGIN)
        block = waveform[..., first - before : first + TRUE_PEAK_BLOCK + TRUE_PEAK_MARGIN].double()
        over = resample(block, 1, TRUE_PEAK_OVERSAMPLING, lowpass_filter_width=TRUE_PEAK_FILTER_WIDTH)
        own = slice(before, before + TRUE_PEAK_BLOCK)
        own_over = over[..., before * TRUE_PEAK_OVERSAMPLING : own.stop * TRUE_PEAK_OVERSAMPLING]
        peak = max(peak, own_over.abs().max().item(), block[..., own].abs().max().item())
    return _decibels(peak)


def _decibels(amplitude: float) -> float:
    return 20 * math.log10(amplitude) if amplitude > 0 else -math.inf


@dataclass(frozen=True)
class LoudnessReport:
    """Result of :func:`normalize_loudness`: levels and gain; ``str()`` puts them into one line.

    Attributes:
        method, target: as asked for; ``target`` and ``level`` are in the unit of the method.
        level: before the gain; None where it cannot be measured. gain_db: the gain applied.
        true_peak: after the gain, dBTP. limited: the gain is lower than the target needs, to keep the true peak down.
        reason: why the level is as it was, "" if it was changed.
    """

    method: str
    target: float | None
    level: float | None
    gain_db: float
    true_peak: float
    limited: bool = False
    reason: str = ""

    def __str__(self) -> str:
        peak = f"true peak {self.true_peak:.1f} dBTP"
        if self.reason:
            return f"level left as it is ({self.reason}), {peak}"
        unit = UNITS[self.method]
        assert self.level is not None, "a level that cannot be measured is a reason"
        reached = self.level + self.gain_db
        limited = f", not {self.target:g}, to keep the true peak down" if self.limited else ""
        return f"{self.level:.1f} to {reached:.1f} {unit} ({self.gain_db:+.1f} dB{limited}), {peak}"


def normalize_loudness(
    waveform: Tensor,
    rate: int,
    method: str = "none",
    target: float | None = None,
    true_peak_limit_db: float = TRUE_PEAK_LIMIT_DB,
) -> tuple[Tensor, LoudnessReport]:
    """Return the sound at the level asked for, and a report of what was done.

    One gain for the whole sound: nothing is clipped or compressed. If the true peak would exceed the limit, the gain is
    lowered, and the sound stays quieter than ``target``.

    Args:
        waveform: (samples,) or (channels, samples).
        method: "rms" over the whole sound, "lufs" (gated loudness, at least 0.4 s), "peak" (the true peak), or "none",
            which changes nothing, whatever the peak is.
        target: in dBFS, LUFS or dBTP; None is -27, -23 or -1.

    Raises:
        ValueError: unknown method, a target or limit that is not finite, or a sound with NaN or infinity.
    """
    if method not in LOUDNESS_METHODS:
        raise UserError(f"unknown method {method!r}, expected one of {', '.join(LOUDNESS_METHODS)}")
    target = DEFAULT_TARGETS.get(method) if target is None else target
    for what, value in (("target", target), ("true peak limit", true_peak_limit_db)):
        if value is not None and not math.isfinite(value):
            raise UserError(f"{what} is {value}, expected a finite number of dB")
    if not waveform.isfinite().all():
        raise UserError("the sound has samples that are NaN or infinite")
    peak = true_peak_db(waveform, rate)
    level = None if method == "none" else _measure(waveform, rate, method, peak)
    reason = _reason_to_leave(waveform, method, level)
    if reason:
        return waveform, LoudnessReport(method, target, level, 0.0, peak, reason=reason)
    assert level is not None and target is not None, "else there is a reason to leave it"
    allowed = true_peak_limit_db - peak
    gain_db = min(target - level, allowed)
    gained = waveform * 10 ** (gain_db / 20)
    return gained, LoudnessReport(method, target, level, gain_db, peak + gain_db, limited=target - level > allowed)


def _measure(waveform: Tensor, rate: int, method: str, peak: float) -> float | None:
    if method == "lufs":
        return integrated_loudness(torch.atleast_2d(waveform), rate)
    return peak if method == "peak" else rms_db(waveform)


def _reason_to_leave(waveform: Tensor, method: str, level: float | None) -> str:
    if method == "none":
        return "not normalised"
    if rms_db(waveform) < SILENCE_DB:
        return "silence"
    return "too short or too quiet for LUFS" if level is None else ""
