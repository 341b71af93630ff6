"""Levels to which a sound can be brought; needs no PyTorch."""

from __future__ import annotations

LOUDNESS_METHODS = ("none", "rms", "lufs", "peak")
DEFAULT_TARGETS = {"rms": -27.0, "lufs": -23.0, "peak": -1.0}  # ComfyUI-SelVA; EBU R 128; EBU R 128

SILENCE_DB = -60.0  # RMS of 50 ms below which a sound is silent, relative to full scale
