"""Levels to which a sound can be brought, and below which it is silent; needs no PyTorch."""

from __future__ import annotations

from typing import Literal, get_args

Normalize = Literal["peak", "none"]  # of a recording before it is encoded, see selva.media.prepare_audio
AUDIO_NORMALIZATIONS: tuple[str, ...] = get_args(Normalize)

LOUDNESS_METHODS = ("none", "rms", "lufs", "peak")
DEFAULT_TARGETS = {"rms": -27.0, "lufs": -23.0, "peak": -1.0}  # ComfyUI-SelVA; EBU R 128; EBU R 128

SILENCE_DB = -60.0  # RMS of 50 ms below which a sound is silent, relative to full scale
