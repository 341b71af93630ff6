"""Plan of a data folder: the windows of every clip that are trained on, and how much of them is sound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from selva.data.cache import DataCache
from selva.data.folder import FolderClip, FolderScan
from selva.data.padding import num_sound_frames, windows_with_sound
from selva.media import audio_seconds
from selva.models.variants import Variant, features_problem
from selva.sequence import SYNC_TOKENS_PER_SEGMENT, WINDOW_STEP_SEC, SequenceConfig, sequence_config
from selva.utils.errors import UserError

MAX_WINDOWS = 8  # stretches of a long clip, spread evenly, whose latents are kept

Problems = list[tuple[Path, str]]  # files that cannot be used, and the reason


@dataclass(frozen=True)
class PlannedClip:
    """A clip of a folder, and the stretches of it that are trained on.

    Attributes:
        sequence: lengths of every window. starts: the sync segment with which each window begins, 0.32 s apart.
        audio_hash: of the bytes of the sound file. sound_sec: its length.
    """

    files: FolderClip
    sequence: SequenceConfig
    starts: tuple[int, ...]
    audio_hash: str
    sound_sec: float

    def start_sec(self, window: int) -> float:
        """Return the second at which a window begins."""
        return self.starts[window] * WINDOW_STEP_SEC

    def num_sound_frames(self, window: int) -> int:
        """Return the latent frames of a window that are of sound, the first ones; the rest is padding."""
        return num_sound_frames(self.sound_sec, self.start_sec(window), self.sequence)

    @property
    def is_padded(self) -> bool:
        """True where a window of the clip is longer than its sound."""
        windows = range(len(self.starts))
        return any(self.num_sound_frames(window) < self.sequence.latent_seq_len for window in windows)


def plan_clips(
    scan: FolderScan, cache: DataCache, variant: Variant, max_duration_sec: float
) -> tuple[list[PlannedClip], Problems]:
    """Return the windows of every clip that its sound reaches, and the clips that do not fit. Reads no weights.

    Of sounds only the length is read; where that is impossible, encoding them says why.
    """
    planned, problems = [], []
    for clip in scan.clips:
        try:
            sequence, starts = plan_windows(clip, variant, max_duration_sec)
            sound_sec = _sound_sec(clip.audio_path, cache)
            kept = windows_with_sound([start * WINDOW_STEP_SEC for start in starts], sound_sec)
            planned.append(PlannedClip(
                clip, sequence, tuple(starts[i] for i in kept), cache.content_hash(clip.audio_path), sound_sec))
        except (ValueError, OSError) as error:
            problems.append((clip.features_path, str(error)))
    return planned, problems


def _sound_sec(path: Path, cache: DataCache) -> float:
    """Return the length of a sound, found out once; infinite where it cannot be read, which encoding will say."""
    try:
        found = cache.note(path, "seconds", lambda: audio_seconds(path))
        return found if isinstance(found, float) else audio_seconds(path)
    except (ValueError, OSError):
        return math.inf


def plan_windows(clip: FolderClip, variant: Variant, max_duration_sec: float) -> tuple[SequenceConfig, tuple[int, ...]]:
    """Return the lengths at which a clip is trained, and the first sync segment of each of its windows.

    A clip of up to ``max_duration_sec`` has one window of its own length. A longer one has up to ``MAX_WINDOWS`` of
    that length, spread evenly from its beginning to its end.

    Raises:
        ValueError: the features are of other encoders than the variant's, or shorter than their duration says.
    """
    if problem := features_problem(clip.extracted_for, variant):
        raise UserError(f"{clip.features_path}: {problem}")
    whole = sequence_config(variant.mode, clip.duration_sec)
    for name, (tokens, width), needed, wanted in (
        ("clip_features", clip.clip_shape, whole.clip_seq_len, variant.generator.clip_dim),
        ("sync_features", clip.sync_shape, whole.sync_seq_len, variant.generator.sync_dim),
    ):
        if width != wanted:
            raise UserError(f"{clip.features_path}: {name} are {width} wide, but {variant.name} takes {wanted}; "
                             f"extract again with --variant {variant.name}")
        if tokens < needed:
            raise UserError(f"{clip.features_path}: {name} is {(1, tokens, width)}, expected at least "
                             f"{(1, needed, width)} for {clip.duration_sec:g} s; extract again")
    if clip.duration_sec <= max_duration_sec:
        return whole, (0,)
    window = sequence_config(variant.mode, max_duration_sec)
    last = min(
        int((clip.duration_sec - max_duration_sec) / WINDOW_STEP_SEC),
        (whole.sync_seq_len - window.sync_seq_len) // SYNC_TOKENS_PER_SEGMENT,
    )
    count = min(MAX_WINDOWS, last + 1)
    return window, tuple(round(i * last / max(1, count - 1)) for i in range(count))
