"""Sound: read it from audio files and videos, prepare it for the base models, write it without loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from selva.media.container import (
    PathLike,
    audio_stream,
    check_file,
    check_not_truncated,
    check_range,
    declared_end,
    decode_frames,
    exact_seconds,
    has_pictures,
    open_media,
    stream_start,
    time_origin,
)
from selva.utils.files import atomic_path

if TYPE_CHECKING:
    from torchaudio.transforms import Resample

log = logging.getLogger(__name__)

PEAK_LEVEL = 0.95  # of full scale; what the base models were trained on
SILENCE_LEVEL = 1e-6  # a waveform that never exceeds this is silent

_PREROLL_SEC = Fraction(1)  # decoders need some sound before a cut to be sample-exact after it
_HEADER_ERROR_SEC = 0.05  # Ogg files may promise a few samples more than they hold
_STAMP_JITTER_SEC = 0.02  # Matroska rounds time stamps to milliseconds; smaller jumps are no gaps
_SUBTYPE = "PCM_24"  # 16 bits would put noise above the floor of the log-mel
_SUFFIX_FORMATS = {".wav": "WAV", ".flac": "FLAC"}


# -- reading ----------------------------------------------------------------------------------------------------------


def read_audio(path: PathLike, start_sec: float = 0.0, duration_sec: float | None = None) -> tuple[Tensor, int]:
    """Return the sound of an audio file or a video: (channels, samples) float32, full scale 1.0, and its rate in Hz.

    libsndfile reads what it knows (WAV, FLAC, MP3, OGG, AIFF ...), PyAV the rest (AAC, M4A, sound in videos). The
    sound of a video starts at time 0 of the pictures: what comes earlier is cut, a gap is silence.

    Args:
        duration_sec: seconds to read, None for all. Less is returned where the sound ends earlier.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no sound in it, damaged, or nothing left at ``start_sec``.
    """
    check_range(path, start_sec, duration_sec)
    check_file(path)
    import soundfile

    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError:
        waveform, rate = _read_audio_av(path, start_sec, duration_sec)
    else:
        with file:
            waveform, rate = _read_audio_soundfile(path, file, start_sec, duration_sec)
    if waveform.shape[1] == 0:
        raise ValueError(f"{path}: has no sound after {start_sec} s, it is shorter than that")
    return waveform, rate


def _read_audio_soundfile(
    path: PathLike, file: Any, start_sec: float, duration_sec: float | None
) -> tuple[Tensor, int]:
    import soundfile

    rate = file.samplerate
    start = min(round(start_sec * rate), file.frames)
    wanted = file.frames - start
    if duration_sec is not None:
        wanted = min(wanted, round(duration_sec * rate))
    # A frame of an MP3 needs bits of frames before it, which libsndfile does not fetch when it seeks.
    preroll = min(start, int(_PREROLL_SEC * rate)) if file.format == "MP3" else 0
    try:
        file.seek(start - preroll)
        samples = file.read(preroll + wanted, dtype="float32", always_2d=True)[preroll:]  # (samples, channels)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: damaged, its sound cannot be decoded ({error})") from error
    if len(samples) < wanted - _HEADER_ERROR_SEC * rate:
        found, promised = (start + len(samples)) / rate, file.frames / rate
        raise ValueError(f"{path}: ends after {found:.2f} s of {promised:.2f} s: cut short or damaged, copy it again")
    return torch.from_numpy(np.ascontiguousarray(samples.T)), rate  # (channels, samples)


def _read_audio_av(path: PathLike, start_sec: float, duration_sec: float | None) -> tuple[Tensor, int]:
    with open_media(path) as container:
        stream = audio_stream(container, path)
        start = exact_seconds(start_sec)
        if not has_pictures(container):  # nothing to be aligned with: begin with the first sample
            start += stream_start(stream) - time_origin(container)
        frames = decode_frames(path, container, stream, start, preroll_sec=_PREROLL_SEC)
        waveform, rate = _assemble_sound(path, frames, duration_sec)
        reached_sec = waveform.shape[1] / rate
        if duration_sec is None or reached_sec < duration_sec:
            check_not_truncated(path, container, stream, float(start), duration_sec, reached_sec)
    return waveform, rate


def _assemble_sound(
    path: PathLike, frames: Iterable[tuple[Fraction, Any]], duration_sec: float | None
) -> tuple[Tensor, int]:
    """Return the decoded frames laid out on the time line, beginning at time 0: (channels, samples) and the rate."""
    pieces: list[np.ndarray] = []
    filled, rate, wanted = 0, 0, math.inf
    for samples, rate in _time_line(path, frames):
        if not pieces and duration_sec is not None:
            wanted = round(duration_sec * rate)
        pieces.append(samples)
        filled += samples.shape[1]
        if filled >= wanted:
            break
    if not pieces:
        raise ValueError(f"{path}: has an audio stream, but no sound could be decoded from it")
    waveform = np.concatenate(pieces, axis=1)  # (channels, samples)
    return torch.from_numpy(waveform[:, : int(min(wanted, filled))].copy()), rate


def _time_line(path: PathLike, frames: Iterable[tuple[Fraction, Any]]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (channels, n) float32 and the rate, one after the other from time 0, with zeros where there is a gap."""
    filled, position, rate, channels = 0, 0, 0, 0
    for time, frame in frames:
        samples = _float_samples(frame)  # (channels, n)
        stamp = round(time * frame.sample_rate)
        if rate == 0:
            rate, position, channels = frame.sample_rate, stamp, len(samples)
            yield np.zeros((channels, 0), dtype=np.float32), rate
        if frame.sample_rate != rate or len(samples) != channels:
            found, expected = f"{len(samples)} x {frame.sample_rate} Hz", f"{channels} x {rate} Hz"
            raise ValueError(f"{path}: sound changes from {expected} to {found} after {float(time):.2f} s; convert it")
        if abs(stamp - position) > _STAMP_JITTER_SEC * rate:
            position = stamp
        if position > filled:
            yield np.zeros((channels, position - filled), dtype=np.float32), rate
            filled = position
        kept = samples[:, filled - position :]  # nothing of it lies before time 0, or twice at the same time
        yield kept, rate
        filled += kept.shape[1]
        position += samples.shape[1]


def _float_samples(frame: Any) -> np.ndarray:
    """Return a decoded audio frame as (channels, samples) float32, full scale 1.0."""
    samples = frame.to_ndarray()
    if frame.format.is_packed:
        samples = samples.reshape(-1, frame.layout.nb_channels).T  # (channels, samples)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    return samples.astype(np.float32)


def audio_blocks(path: PathLike, block_sec: float = 10.0) -> Iterator[tuple[Tensor, int]]:
    """Yield the sound of a file in pieces of ``block_sec``: (channels, samples) float32, full scale 1.0, and the rate.

    The last piece is shorter. Together they are what :func:`read_audio` returns, but memory does not grow with the
    length of the file.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_audio`, of damage when it is reached.
    """
    waiting: list[np.ndarray] = []
    rate = size = held = 0
    for samples, rate in _read_pieces(path, block_sec):
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


def _read_pieces(path: PathLike, block_sec: float) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (channels, n) and the rate in pieces of any length."""
    check_file(path)
    import soundfile

    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError:
        with open_media(path) as container:
            stream = audio_stream(container, path)
            start = Fraction(0) if has_pictures(container) else stream_start(stream) - time_origin(container)
            filled = rate = 0
            for samples, rate in _time_line(path, decode_frames(path, container, stream, start)):
                filled += samples.shape[1]
                yield samples, rate
            if not rate:
                raise ValueError(f"{path}: has an audio stream, but no sound could be decoded from it") from None
            check_not_truncated(path, container, stream, float(start), None, filled / rate)
        return
    with file:
        size = max(1, round(block_sec * file.samplerate))
        for start in range(0, file.frames, size):
            waveform, rate = _read_audio_soundfile(path, file, start / file.samplerate, size / file.samplerate)
            yield waveform.numpy(), rate


def audio_length(path: PathLike) -> tuple[int, int]:
    """Return (samples, rate) of the sound in a file, from its header alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no sound in it, or a header without a length.
    """
    import soundfile

    check_file(path)
    try:
        info = soundfile.info(path)
        return info.frames, info.samplerate
    except soundfile.LibsndfileError:
        with open_media(path) as container:
            stream = audio_stream(container, path)
            end_sec = declared_end(container, stream)
            if end_sec is None:
                raise ValueError(f"{path}: the header does not say how long the sound is; convert it") from None
            return round(end_sec * stream.rate), stream.rate


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
        ValueError: silent, not finite, or shorter than ``num_samples`` without ``pad``.
    """
    if normalize not in ("peak", "none"):
        raise ValueError(f"normalize is {normalize!r}, expected 'peak' or 'none'")
    mono = as_channels(waveform).mean(dim=0)  # (samples,)
    if not torch.isfinite(mono).all():
        raise ValueError("the sound has values that are not finite (NaN or infinite)")
    peak = mono.abs().max().item() if len(mono) else 0.0
    if peak <= SILENCE_LEVEL:
        raise ValueError(f"the sound is silent (peak {peak:.1e}, expected more than {SILENCE_LEVEL:.0e})")
    if normalize == "peak":
        mono = mono / peak * PEAK_LEVEL
    if rate != target_rate:
        mono = _resampler(rate, target_rate)(mono)
    if num_samples is None:
        return mono
    if len(mono) < num_samples:
        if not pad:
            raise ValueError(
                f"the sound has {len(mono)} samples ({len(mono) / target_rate:.3f} s at {target_rate} Hz), "
                f"expected at least {num_samples} ({num_samples / target_rate:.3f} s); use longer sound or pad"
            )
        mono = torch.nn.functional.pad(mono, (0, num_samples - len(mono)))
    return mono[:num_samples].clone()  # (num_samples,)


def as_channels(waveform: Tensor) -> Tensor:
    """Return (channels, samples) float32 on the CPU, for (samples,) too."""
    waveform = waveform.detach().to("cpu", torch.float32)
    if waveform.dim() == 1:
        waveform = waveform[None]  # (1, samples)
    if waveform.dim() != 2:
        raise ValueError(f"waveform is {tuple(waveform.shape)}, expected (channels, samples) or (samples,)")
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


def write_audio(path: PathLike, waveform: Tensor, rate: int) -> None:
    """Write sound as 24-bit WAV or FLAC, by the suffix of ``path``; every sample is kept, none is added.

    Args:
        waveform: (channels, samples) or (samples,), full scale 1.0; what lies beyond is clipped with a warning.

    Raises:
        ValueError: another suffix, an empty waveform, or values that are not finite.
    """
    import soundfile

    path = Path(path)
    if path.suffix.lower() not in _SUFFIX_FORMATS:
        raise ValueError(f"{path}: cannot write {path.suffix or 'a file without suffix'}, expected .wav or .flac")
    samples = as_channels(waveform)
    if samples.shape[1] == 0 or not torch.isfinite(samples).all():
        raise ValueError(f"{path}: the sound to write is empty or has values that are not finite")
    num_clipped = int((samples.abs() > 1).sum())
    if num_clipped:
        log.warning("%s: %d samples beyond full scale were clipped", path, num_clipped)
    with atomic_path(path) as temporary:
        soundfile.write(
            temporary,
            samples.clamp(-1, 1).T.numpy(),  # (samples, channels)
            rate,
            subtype=_SUBTYPE,
            format=_SUFFIX_FORMATS[path.suffix.lower()],
        )


def extract_audio(
    video_path: PathLike, out_path: PathLike, start_sec: float = 0.0, duration_sec: float | None = None
) -> float:
    """Write the sound that belongs to a clip of a video as .flac or .wav; return its duration in seconds.

    The first sample belongs to ``start_sec`` of the pictures, as ``read_video`` counts it. Compressed sound may exceed
    full scale when it is decoded; such sound is scaled to fit as a whole, because clipping would distort it.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_audio` and :func:`write_audio`.
    """
    waveform, rate = read_audio(video_path, start_sec, duration_sec)
    peak = waveform.abs().max().item()
    if peak > 1:
        log.info("%s: the decoded sound peaks at %.3f and was scaled to 1", video_path, peak)
        waveform = waveform / peak
    write_audio(out_path, waveform, rate)
    return waveform.shape[1] / rate
