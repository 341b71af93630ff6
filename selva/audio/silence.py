"""Silent stretches of a sound: one rule for cutting recordings and for judging clips.

A block of 50 ms is silent if its RMS, over all channels, is below -60 dB of full scale. The rule looks at the level
alone, never at how much it changes: rain, hum and engines are as steady as silence, and are sound.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from selva.audio.config import SILENCE_DB
from selva.media import audio_blocks
from selva.media.container import PathLike
from selva.utils.errors import UserError

BLOCK_SEC = 0.05
MOSTLY_SILENT = 0.5  # share of a clip
READ_SEC = 10.0  # what is held in memory while a long recording is read


def block_power(waveform: Tensor, rate: int) -> Tensor:
    """Return (blocks,) the mean square of every whole block of (channels, samples); of all of it if it is shorter."""
    size = min(waveform.shape[1], max(1, round(BLOCK_SEC * rate)))
    return waveform.unfold(1, size, size).square().mean(dim=(0, 2))


def silent_share(waveform: Tensor, rate: int, silence_db: float = SILENCE_DB) -> float:
    """Return the silent share of (channels, samples), 0 to 1."""
    return (block_power(waveform, rate) < 10 ** (silence_db / 10)).float().mean().item()


class SilenceMap:
    """Silent stretches of a recording: one bit for every 50 ms of it.

    Args:
        silent: (blocks,) bool. rate: samples per second. num_samples: of the recording.
    """

    def __init__(self, silent: np.ndarray, rate: int, num_samples: int) -> None:
        self.num_samples = num_samples
        self.block = max(1, round(BLOCK_SEC * rate))
        self._silent = silent
        self._edges = np.minimum(np.arange(len(silent) + 1) * self.block, num_samples)
        self._silent_before = np.concatenate([[0], np.cumsum(silent * np.diff(self._edges))])  # samples, at each edge

    def share(self, start: np.ndarray | int, length: int) -> np.ndarray:
        """Return the silent share, 0 to 1, of the ``length`` samples from ``start``; for many starts at once."""
        start = np.asarray(start)
        before = np.interp(start, self._edges, self._silent_before)
        return (np.interp(start + length, self._edges, self._silent_before) - before) / length

    def trimmed(self, start: int, end: int) -> tuple[int, int]:
        """Return the stretch from ``start`` to ``end`` without the blocks of silence at both of its ends.

        Borders move to edges of blocks, so up to 50 ms of silence stay. Where all is silent, both are ``start``.
        """
        first, last = start // self.block, min(-(-end // self.block), len(self._silent))
        loud = np.flatnonzero(~self._silent[first:last])
        if not len(loud):
            return start, start
        begin, stop = self._edges[first + loud[0]], self._edges[first + loud[-1] + 1]
        return max(start, int(begin)), min(end, int(stop))


def find_silence(path: PathLike, silence_db: float = SILENCE_DB) -> SilenceMap:
    """Return the silent stretches of a file; it is decoded in pieces of 10 s, so memory stays small.

    Raises:
        FileNotFoundError, ValueError: it cannot be read to its end, or has no sound.
    """
    silent = bytearray()  # grows in one piece; many small arrays would keep freed blocks from being used again
    num_samples, rest, rate = 0, None, 0
    for waveform, rate in audio_blocks(path, READ_SEC):
        num_samples += waveform.shape[1]
        if rest is not None and rest.shape[1]:
            waveform = torch.cat([rest, waveform], dim=1)
        size = max(1, round(BLOCK_SEC * rate))
        whole = waveform.shape[1] // size * size
        rest = waveform[:, whole:].clone()
        if whole:
            silent += (block_power(waveform[:, :whole], rate) < 10 ** (silence_db / 10)).numpy().tobytes()
    if rest is None:
        raise UserError(f"{path}: has no sound in it")
    if rest.shape[1]:  # the last block of a recording may be shorter
        silent += (block_power(rest, rate) < 10 ** (silence_db / 10)).numpy().tobytes()
    return SilenceMap(np.frombuffer(silent, dtype=bool), rate, num_samples)
