"""Integrated loudness as ITU-R BS.1770-4 measures it.

torchaudio's own function limits the sound to full scale between the two filters, and so is up to several dB low for
loud sound; here the filters run without a limit, in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_SEC, STEP_SEC = 0.4, 0.1
ABSOLUTE_GATE_LUFS, RELATIVE_GATE_LU = -70.0, -10.0
OFFSET_DB = -0.691  # makes a 997 Hz sine at full scale in one channel -3.01 LUFS

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
