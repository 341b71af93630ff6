"""Sound: read it from audio files and videos, prepare it for the base models, write it without loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from selva.media.container import PathLike, check_range
from selva.media.sound_pieces import sound_length, sound_pieces
from selva.utils.errors import UserError
from selva.utils.files import atomic_path, sound_path
from selva.utils.text import counted

if TYPE_CHECKING:
    from torchaudio.transforms import Resample

log = logging.getLogger(__name__)

PEAK_LEVEL = 0.95  # of full scale; what the base models were trained on
SILENCE_LEVEL = 1e-6  # a waveform that never exceeds this is silent
CANCELLED_DB = 20.0  # by which the mean of channels lies below them if they cancel each other; unrelated ones lose 3 dB

_SUBTYPE = "PCM_24"  # 16 bits would put noise above the floor of the log-mel
_SUFFIX_FORMATS = {".wav": "WAV", ".flac": "FLAC"}
_FLAC_CHANNELS, _FLAC_RATE, _FLAC_FINE_RATE = 8, 655_350, 65_535  # above the last, rates are multiples of 10 Hz


# -- reading ----------------------------------------------------------------------------------------------------------


def read_audio(path: PathLike, start_sec: float = 0.0, duration_sec: float | None = None) -> tuple[Tensor, int]:
    """Return the sound of an audio file or a video: (channels, samples) float32, full scale 1.0, and its rate in Hz.

    libsndfile reads what counts its samples (WAV, AIFF, FLAC, Ogg), PyAV the rest (MP3, AAC, sound in videos). The
    sound of a video starts at time 0 of the pictures: what comes earlier is cut, a gap of up to 10 s is silence. So are
    packets that cannot be decoded, with a warning, up to a fifth of the sound.

    Args:
        duration_sec: seconds to read, None for all. Less is returned where the sound ends earlier.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no sound in it, cut short, damaged, or nothing left at ``start_sec``.
    """
    check_range(path, start_sec, duration_sec)
    pieces = list(sound_pieces(path, start_sec, duration_sec))
    rate = pieces[0][1]
    waveform = np.concatenate([samples for samples, _ in pieces], axis=1)  # (channels, samples)
    if waveform.shape[1] == 0:
        raise UserError(f"{path}: has no sound after {start_sec} s, it is shorter than that")
    return torch.from_numpy(waveform), rate


def audio_blocks(path: PathLike, block_sec: float = 10.0) -> Iterator[tuple[Tensor, int]]:
    """Yield the sound of a file in pieces of ``block_sec``: (channels, samples) float32, full scale 1.0, and the rate.

    The last piece is shorter. Together they are what :func:`read_audio` returns, but memory does not grow with the
    length of the file.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_audio`, of damage when it is reached.
    """
    waiting: list[np.ndarray] = []
    rate = size = held = 0
    for samples, rate in sound_pieces(path):
        size = max(1, round(block_sec * rate))
        waiting.append(samples)
        held += samples.shape[1]
        if held < size:
            continue
        joined = np.concatenate(waiting, axis=1)
        whole = held // size * size
        for start in range(0, whole, size):
            yield torch.from_numpy(joined[:, start : start + size].copy()), rate
        waiting, held = [joined[:, whole:]], held - whole
    if held:
        yield torch.from_numpy(np.concatenate(waiting, axis=1)), rate


def audio_length(path: PathLike) -> tuple[int, int]:
    """Return (samples, rate) of the sound in a file: what :func:`read_audio` gives of the whole of it.

    From the header where it can be trusted, otherwise by decoding, once per file and process.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no sound in it, cut short or damaged.
    """
    length = sound_length(path)
    return length.num_samples, length.rate


def audio_seconds(path: PathLike) -> float:
    """Return the seconds of the sound in a file, see :func:`audio_length`."""
    num_samples, rate = audio_length(path)
    return num_samples / rate


# -- preparing --------------------------------------------------------------------------------------------------------


def prepare_audio(
    waveform: Tensor,
    rate: int,
    target_rate: int,
    num_samples: int | None = None,
    normalize: Literal["peak", "none"] = "peak",
    pad: bool = False,
) -> Tensor:
    """Return ``waveform`` as the base models were trained on it: (samples,) float32 at ``target_rate``.

    Mean of the channels, peak at 0.95 over everything that was passed in (so before resampling and before cutting),
    band-limited resampling (librosa's "kaiser best"), then the first ``num_samples`` samples.

    Args:
        waveform: (channels, samples) or (samples,), full scale 1.0.
        num_samples: length of the result; None keeps all.
        normalize: "none" keeps the level.
        pad: fill up sound that is too short with zeros, i.e. with real silence for the encoder; otherwise an error.

    Raises:
        ValueError: silent, not finite, of channels that cancel each other, or shorter than ``num_samples`` without
            ``pad``.
    """
    if normalize not in ("peak", "none"):
        raise UserError(f"normalize is {normalize!r}, expected 'peak' or 'none'")
    channels = as_channels(waveform)
    mono = channels.mean(dim=0)  # (samples,)
    if not torch.isfinite(mono).all():
        raise UserError("the sound has values that are not finite (NaN or infinite)")
    if reason := cancellation(mean_power(channels), mean_power(mono)):
        raise UserError(reason)
    peak = mono.abs().max().item() if len(mono) else 0.0
    if peak <= SILENCE_LEVEL:
        raise UserError(f"the sound is silent (peak {peak:.1e}, expected more than {SILENCE_LEVEL:.0e})")
    if normalize == "peak":
        mono = mono / peak * PEAK_LEVEL
    if rate != target_rate:
        mono = _resampler(rate, target_rate)(mono)
    if num_samples is None:
        return mono
    if len(mono) < num_samples:
        if not pad:
            raise UserError(
                f"the sound has {counted(len(mono), 'sample')} ({len(mono) / target_rate:.3f} s at {target_rate} Hz), "
                f"expected at least {num_samples} ({num_samples / target_rate:.3f} s)"
            )
        mono = torch.nn.functional.pad(mono, (0, num_samples - len(mono)))
    return mono[:num_samples].clone()  # (num_samples,)


def mean_power(waveform: Tensor) -> float:
    """Return the mean square of all samples of all channels, 0.0 of nothing."""
    return waveform.double().square().mean().item() if waveform.numel() else 0.0


def cancellation(channel_power: float, mono_power: float) -> str:
    """Return the reason for which the mean of channels is not what was recorded, "" if it is.

    Args:
        channel_power: mean power of the channels. mono_power: of their mean.
    """
    if channel_power <= SILENCE_LEVEL**2 or mono_power * 10 ** (CANCELLED_DB / 10) > channel_power:
        return ""
    below_db = 10 * math.log10(channel_power / mono_power) if mono_power > 0 else math.inf
    amount = f"{below_db:.0f} dB below them" if below_db < 120 else "silence"
    return (f"its channels cancel each other: their mean, which models hear, is {amount}, expected less than "
            f"{CANCELLED_DB:g} dB; invert one channel, or keep only one")


def warn_of_cancellation(path: PathLike, waveform: Tensor, part: str = "") -> None:
    """Say that sound which is kept as it is cannot be trained on; ``part`` names the clip of a long recording."""
    if reason := cancellation(mean_power(waveform), mean_power(waveform.mean(dim=0))):
        log.warning("%s: %s%s", path, f"{part}: " if part else "", reason)


def as_channels(waveform: Tensor) -> Tensor:
    """Return (channels, samples) float32 on the CPU, for (samples,) too."""
    waveform = waveform.detach().to("cpu", torch.float32)
    if waveform.dim() == 1:
        waveform = waveform[None]  # (1, samples)
    if waveform.dim() != 2:
        raise UserError(f"waveform is {tuple(waveform.shape)}, expected (channels, samples) or (samples,)")
    return waveform


@lru_cache(maxsize=16)
def _resampler(rate: int, target_rate: int) -> Resample:
    """Return the "kaiser best" resampler; its filter takes longer to compute than a clip to resample."""
    from torchaudio.transforms import Resample

    return Resample(
        rate,
        target_rate,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        beta=14.769656459379492,
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def flac_problem(num_channels: int, rate: int) -> str:
    """Return the reason why a .flac cannot hold a sound, "" if it can."""
    if num_channels > _FLAC_CHANNELS:
        return f"has {counted(num_channels, 'channel')}, but .flac holds {_FLAC_CHANNELS}"
    if rate > _FLAC_RATE:
        return f"has a rate of {rate} Hz, but .flac holds up to {_FLAC_RATE}"
    if rate > _FLAC_FINE_RATE and rate % 10:
        return f"has a rate of {rate} Hz, but above {_FLAC_FINE_RATE} .flac holds multiples of 10"
    return ""


def write_audio(path: PathLike, waveform: Tensor, rate: int) -> None:
    """Write sound as 24-bit WAV or FLAC, by the suffix of ``path``; every sample is kept, none is added.

    Args:
        waveform: (channels, samples) or (samples,), full scale 1.0; what lies beyond is clipped with a warning.

    Raises:
        ValueError: another suffix, an empty waveform, values that are not finite, or a .flac that cannot hold it.
        OSError: it cannot be written; what was there is untouched.
    """
    import soundfile

    path = Path(path)
    if path.suffix.lower() not in _SUFFIX_FORMATS:
        raise UserError(f"{path}: cannot write {path.suffix or 'a file without suffix'}, expected .wav or .flac")
    samples = as_channels(waveform)
    if path.suffix.lower() == ".flac" and (problem := flac_problem(len(samples), rate)):
        raise UserError(f"{path}: the sound to write {problem}; convert it, or write .wav")
    if samples.shape[1] == 0 or not torch.isfinite(samples).all():
        raise UserError(f"{path}: the sound to write is empty or has values that are not finite")
    num_clipped = int((samples.abs() > 1).sum())
    if num_clipped:
        log.warning("%s: %s clipped at full scale", path, counted(num_clipped, "sample"))
    with atomic_path(path) as temporary:
        try:
            soundfile.write(
                sound_path(temporary),
                samples.clamp(-1, 1).T.numpy(),  # (samples, channels)
                rate,
                subtype=_SUBTYPE,
                format=_SUFFIX_FORMATS[path.suffix.lower()],
            )
            # libsndfile says nothing where only the last block did not fit onto the disk.
            with soundfile.SoundFile(sound_path(temporary)) as written:
                found = sum(len(block) for block in written.blocks(1 << 18, dtype="int32"))
        except (RuntimeError, AssertionError) as error:  # LibsndfileError is a RuntimeError
            raise OSError(f"{path}: cannot be written ({str(error) or 'cut short'}); is the disk full?") from error
        if found != samples.shape[1]:
            raise OSError(f"{path}: cannot be written (only {found} of {counted(samples.shape[1], 'sample')}); is the "
                          "disk full?")


def extract_audio(
    video_path: PathLike, out_path: PathLike, start_sec: float = 0.0, duration_sec: float | None = None,
    peaks: list[float] | None = None,
) -> float:
    """Write the sound that belongs to a clip of a video as .flac or .wav; return its duration in seconds.

    The first sample belongs to ``start_sec`` of the pictures, as ``read_video`` counts it. Compressed sound may exceed
    full scale (1.0) when it is decoded; such sound is scaled to fit as a whole, because clipping would distort it.

    Args:
        peaks: gets the largest sample of the decoded sound, relative to full scale.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_audio` and :func:`write_audio`.
    """
    waveform, rate = read_audio(video_path, start_sec, duration_sec)
    if Path(out_path).suffix.lower() == ".flac" and (problem := flac_problem(len(waveform), rate)):
        raise UserError(f"{video_path}: its sound {problem}; convert it")
    warn_of_cancellation(video_path, waveform)
    peak = waveform.abs().max().item()
    if peak > 1:
        log.debug("%s: the decoded sound peaks at %.3f and was scaled to 1", video_path, peak)
        waveform = waveform / peak
    if peaks is not None:
        peaks.append(peak)
    write_audio(out_path, waveform, rate)
    return waveform.shape[1] / rate
