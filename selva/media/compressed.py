"""Sound in few bytes, for pages and previews: MP3, which every browser plays."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from selva.media.audio import as_channels, prepare_audio
from selva.utils.errors import UserError

MP3_MIME = "audio/mpeg"
MP3_RATES = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_BITS_PER_SECOND = {1: 64_000, 2: 112_000}  # by channels
_LOW_RATE_BITS_PER_SECOND = 40_000  # per channel, at 16 kHz and below


def compress_sound(waveform: Tensor, rate: int) -> bytes:
    """Return an MP3 of (samples,) or (channels, samples), full scale 1.0; 8 s of mono take 40 to 64 kB.

    A rate that MP3 does not know becomes the next higher one, at most 48 kHz. What is above full scale is clipped.

    Raises:
        UserError: no samples, more than two channels, or values that are not finite.
        RuntimeError: this build of FFmpeg has no encoder for MP3.
    """
    import av

    sound = as_channels(waveform)
    if sound.shape[0] > 2 or sound.shape[1] == 0 or not torch.isfinite(sound).all():
        raise UserError(f"the sound is {tuple(sound.shape)}, expected 1 or 2 channels, not empty, all values finite")
    if "libmp3lame" not in av.codecs_available:
        raise RuntimeError("PyAV was built without an MP3 encoder (libmp3lame); install its wheel from PyPI")
    if rate not in MP3_RATES:
        target = next((known for known in MP3_RATES if known > rate), MP3_RATES[-1])
        sound = torch.cat([_resampled(channel, rate, target) for channel in sound])
        rate = target
    layout = "mono" if sound.shape[0] == 1 else "stereo"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp3") as container:
        encoder = container.add_stream("libmp3lame", rate=rate, layout=layout)
        low = _LOW_RATE_BITS_PER_SECOND * sound.shape[0]
        encoder.bit_rate = low if rate <= 16_000 else _BITS_PER_SECOND[sound.shape[0]]
        samples = np.ascontiguousarray(sound.clamp(-1, 1).float().cpu().numpy())
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = rate
        container.mux(encoder.encode(frame))
        container.mux(encoder.encode(None))
    return buffer.getvalue()


def _resampled(channel: Tensor, rate: int, target: int) -> Tensor:
    """Return (1, samples) at another rate, at its level."""
    if not channel.any():
        return torch.zeros(1, round(len(channel) * target / rate))
    return prepare_audio(channel, rate, target, normalize="none")[None]
