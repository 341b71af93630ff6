"""The sound of a clip, its own or of a recording paired with it: for the file beside the features and for the VAE."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from selva.data.padding import MAX_AUDIO_SHORTFALL_SEC
from selva.inputs.jobs import ClipJob
from selva.media import (
    audio_blocks,
    audio_length,
    audio_seconds,
    copied_audio_suffix,
    prepare_audio,
    probe,
    read_audio,
    video_length,
)
from selva.media.audio import SILENCE_LEVEL
from selva.sequence import SHORTEST_SEC, SequenceConfig
from selva.utils.errors import UserError

LEAST_UNUSED_SEC = 0.5  # a rest of a video that is worth a word
MOST_APART_SEC = 1.0  # a recorder is started before the camera, or stopped after it


class UnusableClip(UserError):
    """Error about a clip that is not damaged, but cannot be part of such a set."""


def unused_seconds(job: ClipJob, sound_only: bool = False) -> float:
    """Return the seconds of a video, or of its sound, after a clip whose stretch nobody has chosen.

    0 if they are not worth a word. From the header; a video without one counts as used.
    """
    length_of = audio_seconds if sound_only else video_length
    try:
        rest = length_of(job.path) - job.start_sec - job.duration_sec if job.is_beginning else 0.0
    except (ValueError, OSError):
        return 0.0
    return rest if rest > LEAST_UNUSED_SEC else 0.0


def sound_seconds(job: ClipJob) -> float:
    """Return the seconds of a clip that is its sound alone: what was asked for, or what the file has from there.

    Raises:
        UnusableClip: that is shorter than the models take.
        ValueError: no sound in it, cut short or damaged.
    """
    seconds = min(job.duration_sec, audio_seconds(job.path) - job.start_sec)
    if seconds < SHORTEST_SEC:
        raise UnusableClip(f"{job.path}: has {max(0.0, seconds):.2f} s of sound from {job.start_sec:g} s, expected at "
                           f"least {SHORTEST_SEC:g} s")
    return seconds


def sound_file(job: ClipJob, audio: str) -> tuple[str, str]:
    """Return the name of the sound that belongs beside the features ("" for none), and a remark."""
    if audio == "none":
        return "", ""
    source = job.sound or job.path
    if "audio" not in probe(source).streams:
        return "", f"{source}: has no sound; training needs {job.id}.wav or .flac beside the features"
    return job.id + (copied_audio_suffix(source) if audio == "copy" else ".flac"), _apart(job)


def _apart(job: ClipJob) -> str:
    """Return a remark if a recording is much longer or shorter than its video, so that the two may not be in step."""
    if job.sound is None:
        return ""
    samples, rate = audio_length(job.sound)
    seconds, pictures = samples / rate, video_length(job.path)
    if abs(seconds - pictures) <= MOST_APART_SEC:
        return ""
    return (f"{job.sound}: is {seconds:.1f} s long and {job.path.name} {pictures:.1f} s; check that both begin at the "
            "same moment")


def is_silent(path: Path) -> bool:
    """Return True if all of a sound is silent, by the rule of training; False where it cannot be read.

    Reading ends at the first block with something in it.
    """
    try:
        return all(block.abs().max().item() <= SILENCE_LEVEL for block, _ in audio_blocks(path) if block.numel())
    except (ValueError, OSError):
        return False


def vae_waveform(job: ClipJob, seconds: float, lengths: SequenceConfig) -> tuple[np.ndarray, str]:
    """Return (samples,) float32 for the VAE, prepared as for training, and a remark if much of it is padding.

    Raises:
        UnusableClip: there is no sound, or it is silent.
    """
    source = job.sound or job.path
    if "audio" not in probe(source).streams:
        raise UnusableClip(f"{source}: has no sound")
    waveform, rate = read_audio(source, job.start_sec, seconds)
    found, remark = waveform.shape[1] / rate, ""
    if found < seconds - MAX_AUDIO_SHORTFALL_SEC:
        remark = (f"{source}: has {found:.2f} s of sound from {job.start_sec:g} s, for features of {seconds:.2f} s; "
                  f"the rest of its latents is silence (clip {job.id})")
    try:
        prepared = prepare_audio(waveform, rate, lengths.sampling_rate, lengths.num_audio_frames, pad=True)
    except ValueError as error:
        raise UnusableClip(f"{source}: {error}") from error
    return prepared.numpy(), remark
