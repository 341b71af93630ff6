"""DeSync: how many seconds a sound lies beside its video, as Synchformer hears it.

Two decisions per clip, on its first and on its last 4.8 s; each names one of 21 offsets between -2 and 2 s. The score
is the mean of their absolute values, as in MMAudio (arXiv:2412.15322).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from selva.models.synchformer_av import OFFSETS, SEGMENTS_COMPARED, SynchformerAV
from selva.utils.errors import UserError
from selva.utils.text import counted

LARGEST_OFFSET_SEC = 2.0
PAIRS_AT_ONCE = 16


def offset_grid() -> np.ndarray:
    """Return the (21,) float32 offsets in seconds that the classes stand for."""
    return np.linspace(-LARGEST_OFFSET_SEC, LARGEST_OFFSET_SEC, OFFSETS, dtype=np.float32)


def offsets_of(logits: Tensor) -> np.ndarray:
    """Return the (n,) absolute offsets in seconds that (n, 21) logits decide for; of equal ones the lowest class."""
    return np.abs(offset_grid()[logits.float().cpu().numpy().argmax(axis=1)]).astype(np.float64)


@torch.inference_mode()
def decisions(network: SynchformerAV, visual: Tensor, audio: Tensor) -> np.ndarray:
    """Return the (n, 2) absolute offsets of the first and of the last 4.8 s of every clip, in seconds.

    Args:
        visual, audio: (n, S, 8, dim) and (n, S, 6, dim) features, see ``encode_video`` and ``encode_audio``. Of unequal
            numbers of segments the common beginning counts.

    Raises:
        UserError: less than 4.8 s, which the comparison needs.
    """
    segments = min(visual.shape[1], audio.shape[1])
    if segments < SEGMENTS_COMPARED:
        raise UserError(f"{counted(segments, 'segment')} of 0.64 s (one every 0.32 s), expected at least "
                        f"{SEGMENTS_COMPARED}: DeSync needs 4.8 s")
    device = network.vproj.weight.device
    found = []
    for first in range(0, len(visual), PAIRS_AT_ONCE):
        pictures, sounds = (x[first : first + PAIRS_AT_ONCE, :segments].to(device) for x in (visual, audio))
        parts = (slice(SEGMENTS_COMPARED), slice(segments - SEGMENTS_COMPARED, segments))
        found.append(np.stack(
            [offsets_of(network.compare(pictures[:, part], sounds[:, part])) for part in parts], axis=1))
    return np.concatenate(found)
