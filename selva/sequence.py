"""Sequence lengths: every length of a clip is computed here, from its duration in seconds.

    seconds -> audio samples, latent frames, CLIP frames, sync frames and sync tokens

Source: MMAudio (arXiv:2412.15322) and SelVA (arXiv:2512.02650); the numbers are tabled for the test in
``tests/golden/sequence_config.json``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from selva.utils.errors import UserError

CLIP_FPS = 8.0
SYNC_FPS = 25.0
SYNC_SEGMENT_FRAMES = 16  # frames that the video encoder sees at once
SYNC_SEGMENT_STEP = 8  # frames between the starts of two segments
SYNC_TOKENS_PER_SEGMENT = 8  # the encoder halves the frame rate inside a segment
LATENT_DOWNSAMPLE = 2  # mel frames per latent frame
DEFAULT_DURATION_SEC = 8.0  # what the published models were trained on
SHORTEST_SEC = SYNC_SEGMENT_FRAMES / SYNC_FPS  # one sync segment
WINDOW_STEP_SEC = SYNC_SEGMENT_STEP / SYNC_FPS  # windows of longer clips start with a sync segment, every 0.32 s

SAMPLING_RATES = {"16k": 16_000, "44k": 44_100}  # Hz
HOP_LENGTHS = {"16k": 256, "44k": 512}  # samples per mel frame


def num_sync_segments(num_frames: int) -> int:
    """Return the number of overlapping 16-frame segments in ``num_frames`` frames (0 below 16 frames)."""
    return max(0, (num_frames - SYNC_SEGMENT_FRAMES) // SYNC_SEGMENT_STEP + 1)


def first_clip_frame(segment: int) -> int:
    """Return the CLIP frame with which a window begins whose first sync segment is ``segment``.

    Segments are 0.32 s apart and CLIP frames 0.125 s, so the grids meet every 8 s only: the frame is the one on show
    when the window begins, up to 0.125 s old.
    """
    return segment * SYNC_SEGMENT_STEP * int(CLIP_FPS) // int(SYNC_FPS)


@dataclass(frozen=True)
class SequenceConfig:
    """All lengths that belong to one clip.

    Attributes:
        mode: "16k" or "44k", the family of VAE and vocoder.
        duration_sec: the duration that the lengths were computed from.
        sampling_rate: audio samples per second.
        hop_length: audio samples per mel frame.
        latent_seq_len: latent frames N.
        clip_seq_len: CLIP frames T at 8 per second.
        num_sync_frames: video frames at 25 per second that the sync encoder needs.
        sync_seq_len: sync tokens S, eight per segment.
        num_audio_frames: audio samples; always ``latent_seq_len * hop_length * 2``.
    """

    mode: str
    duration_sec: float
    sampling_rate: int
    hop_length: int
    latent_seq_len: int
    clip_seq_len: int
    num_sync_frames: int
    sync_seq_len: int
    num_audio_frames: int


def sequence_config(mode: str, duration_sec: float = DEFAULT_DURATION_SEC) -> SequenceConfig:
    """Return the lengths of a clip of ``duration_sec`` seconds for the "16k" or the "44k" models.

    Raises:
        ValueError: unknown mode, or a duration that is shorter than one sync segment (0.64 s).
    """
    if mode not in SAMPLING_RATES:
        raise UserError(f"unknown audio mode {mode!r}, expected one of {', '.join(SAMPLING_RATES)}")
    if not math.isfinite(duration_sec) or duration_sec < SHORTEST_SEC:
        raise UserError(f"duration is {duration_sec} s, expected at least {SHORTEST_SEC} s, one segment of 16 frames")
    rate, hop = SAMPLING_RATES[mode], HOP_LENGTHS[mode]
    latent_seq_len = math.ceil(duration_sec * rate / hop / LATENT_DOWNSAMPLE)
    num_sync_frames = int(duration_sec * SYNC_FPS)
    segments = math.floor((duration_sec * SYNC_FPS - SYNC_SEGMENT_FRAMES) / SYNC_SEGMENT_STEP) + 1
    return SequenceConfig(
        mode=mode,
        duration_sec=duration_sec,
        sampling_rate=rate,
        hop_length=hop,
        latent_seq_len=latent_seq_len,
        clip_seq_len=int(duration_sec * CLIP_FPS),
        num_sync_frames=num_sync_frames,
        sync_seq_len=segments * SYNC_TOKENS_PER_SEGMENT,
        num_audio_frames=latent_seq_len * hop * LATENT_DOWNSAMPLE,
    )
