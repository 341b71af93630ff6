"""Sounds of things that are struck at given moments."""

from __future__ import annotations

import numpy as np

RATE = 16000


def strikes(times: list[float], hz: float, seconds: float = 5.0, level: float = 0.5) -> np.ndarray:
    """Return (samples,) decaying tones that begin at these times, over faint noise."""
    sound = 1e-4 * np.random.default_rng(0).normal(size=round(seconds * RATE))
    for time in times:
        first, steps = round(time * RATE), np.arange(4000)
        part = sound[first : first + 4000]
        part += level * (np.exp(-steps / 800) * np.sin(2 * np.pi * hz * steps / RATE))[: len(part)]
    return sound.astype(np.float32)
