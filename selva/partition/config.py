"""Settings of cutting recordings; needs no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selva.audio.config import SILENCE_DB
from selva.partition.windows import MAX_WINDOWS


@dataclass(frozen=True)
class PartitionConfig:
    """Settings for cutting recordings.

    Attributes:
        min_length_sec: shorter recordings, or given segments, are left out; None for the published 8.1 s of recordings,
            and for 0.64 s, the shortest clip that the models take, of segments.
        max_segments: windows of one recording.
        skip_silence: move or drop windows that are mostly silent.
        silence_db: RMS of a block of 50 ms below which it is silent, relative to full scale.
    """

    min_length_sec: float | None = None
    max_segments: int = MAX_WINDOWS
    skip_silence: bool = False
    silence_db: float = SILENCE_DB

    def __post_init__(self) -> None:
        if self.min_length_sec is not None and not 0 <= self.min_length_sec < math.inf:
            raise ValueError(f"min_length_sec is {self.min_length_sec}, expected 0 or more seconds")
        if self.max_segments < 1:
            raise ValueError(f"max_segments is {self.max_segments}, expected at least 1")
        if not -200 <= self.silence_db < 0:
            raise ValueError(f"silence_db is {self.silence_db}, expected a level below full scale, such as -60")
