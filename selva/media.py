"""Video and audio files <-> tensors: pictures at the two frame rates of the encoders, sound of a known rate.

The only module that knows PyAV, soundfile and torchvision; each is imported where it is used.

Time 0 of a file is time stamp 0 of its container, for the pictures and for the sound, so that both stay aligned.
(Transport streams start at an arbitrary stamp; there time 0 is the first picture.)
"""

from __future__ import annotations

import heapq
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from selva.files import atomic_path
from selva.sequence import CLIP_FPS, DEFAULT_DURATION_SEC, SYNC_FPS, SYNC_SEGMENT_FRAMES

if TYPE_CHECKING:
    from torchaudio.transforms import Resample

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

PEAK_LEVEL = 0.95  # of full scale; what the base models were trained on
SILENCE_LEVEL = 1e-6  # a waveform that never exceeds this is silent
SELVA_FILL_SEC = 0.125  # SelVA's training data repeats the last frame for at most 1 CLIP and 3 sync frames

_TRUNCATION_SEC = 0.5  # a stream that ends this much before the end in its header was cut short
_AUDIO_PREROLL_SEC = Fraction(1)  # decoders need some sound before a cut to be sample-exact after it
_STAMP_JITTER_SEC = 0.02  # Matroska rounds time stamps to milliseconds; smaller jumps are no gaps
_SUBTYPE = "PCM_24"  # 16 bits would put noise above the floor of the log-mel
_SUFFIX_FORMATS = {".wav": "WAV", ".flac": "FLAC"}
_VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")
_COPYABLE_CODECS = ("h264", "hevc", "mpeg4", "av1", "vp9")  # what every container in _VIDEO_SUFFIXES can hold
_COPYABLE_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # their packets need no rewriting
_PICTURE_TIME_BASE = Fraction(1, 60_000)  # holds 24, 25, 29.97, 30 and 60 fps exactly; MPEG-4 allows 16 bits
_COLOR_MATRICES = {1: "bt709", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}  # what FFmpeg would turn into bt601 otherwise
_MUX_TOLERANCE_SEC = Fraction(1, 10)  # lengths of picture and sound that differ less, and by less than a frame, fit
_AAC_FRAME = 1024  # samples per packet


# --- which frames ---------------------------------------------------------------------------------------------------


class _FrameClock:
    """Tells for frames in presentation order how often each is sampled at ``fps`` frames per second."""

    def __init__(self, fps: float) -> None:
        self.interval_sec = 1 / fps
        self.next_sec = 0.0

    def uses(self, time_sec: float) -> int:
        count = 0
        while time_sec >= self.next_sec:
            count += 1
            # A running sum, not k / fps: its rounding decides which frame is taken (at 25 fps for 183 of 200 frames),
            # and the published features were made with it.
            self.next_sec += self.interval_sec
        return count


def select_frames(times: Sequence[float], fps: float, start_sec: float = 0.0, end_sec: float = math.inf) -> list[int]:
    """Return the indices of the frames that represent a video at ``fps`` frames per second.

    Sample k is the first frame at or after k / fps, so a slower source repeats frames. The samples are counted from
    time 0 also when ``start_sec`` is later: the frame at ``start_sec`` then stands for all samples before it too.
    :func:`read_video` counts from its start instead, by passing times relative to it.

    Args:
        times: presentation times in seconds, ascending.
        start_sec: earlier frames are skipped.
        end_sec: later frames are ignored; a frame at exactly ``end_sec`` is used.

    Raises:
        ValueError: ``fps`` is not positive, or a time is not finite.
    """
    if not fps > 0:
        raise ValueError(f"frame rate is {fps}, expected a positive number")
    clock = _FrameClock(fps)
    selected: list[int] = []
    for index, time in enumerate(times):
        if not math.isfinite(time):
            raise ValueError(f"time of frame {index} is {time}, expected a finite number of seconds")
        if start_sec <= time <= end_sec:
            selected += [index] * clock.uses(time)
    return selected


def shortened_duration(duration_sec: float, num_clip_frames: int, num_sync_frames: int) -> float:
    """Return ``duration_sec``, or what the frames found at 8 and at 25 frames per second cover if that is less."""
    if num_clip_frames / CLIP_FPS < duration_sec:
        duration_sec = num_clip_frames / CLIP_FPS
    if num_sync_frames / SYNC_FPS < duration_sec:
        duration_sec = num_sync_frames / SYNC_FPS
    return duration_sec


# --- reading pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoFrames:
    """The pictures of one clip, as the two image encoders want them.

    Attributes:
        clip_frames: (T, 3, clip_size, clip_size) uint8 RGB, T = int(8 * duration_sec).
        sync_frames: (F, 3, sync_size, sync_size) uint8 RGB, F = int(25 * duration_sec).
        duration_sec: what the frames cover, at most what was asked for; all other lengths follow from it.
        requested_sec: what was asked for.
        start_sec: where in the file the clip begins.
        source_fps: average frame rate of the file; 0.0 if the file does not say.
        source_size: (height, width) of the pictures as shown.
        num_filled: sync frames at the end that repeat the last frame (see ``fill_sec``).
    """

    clip_frames: Tensor
    sync_frames: Tensor
    duration_sec: float
    requested_sec: float
    start_sec: float
    source_fps: float
    source_size: tuple[int, int]
    num_filled: int


def resize_frame(picture: Tensor, size: int, crop: bool = False) -> Tensor:
    """Return ``picture`` as (3, size, size) uint8.

    Bicubic with antialiasing on uint8, as the published models saw their frames; torchvision's result on floats is
    a different one.

    Args:
        picture: (3, H, W) uint8.
        crop: False squashes the picture to a square (CLIP, and sync frames of SelVA); True makes the shorter side
            ``size`` and cuts out the centre (sync frames of MMAudio).
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    target = [size] if crop else [size, size]
    resized = functional.resize(picture, target, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return functional.center_crop(resized, [size, size]) if crop else resized  # (3, size, size)


def read_video(
    path: PathLike,
    duration_sec: float = DEFAULT_DURATION_SEC,
    start_sec: float = 0.0,
    clip_size: int = 384,
    sync_size: int = 224,
    sync_crop: bool = False,
    fill_sec: float = 0.0,
) -> VideoFrames:
    """Return the pictures of ``duration_sec`` seconds from ``start_sec``, sampled at 8 and at 25 frames per second.

    The frames are those of :func:`select_frames` with times relative to ``start_sec``, turned upright if the file
    says how. Frames are resized as they are decoded, so memory does not depend on the size of the video.

    A video that ends early makes a shorter clip: its duration becomes what the sampled frames cover (191 frames at
    23.976 fps give 7.96 s). A file that ends before the end in its own header is damaged and an error.

    Args:
        fill_sec: if not more than this is missing between the last samples and the end (of the request, or of a
            shorter video), repeat the last frame, so that 50 frames at 25 fps are 2 s and not 1.96. 0.0 is what the
            published inference does; ``SELVA_FILL_SEC`` is what SelVA's training data do.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video, damaged, nothing to see in the range, or less than 0.64 s (one sync segment).
    """
    _check_range(path, start_sec, duration_sec)
    clip: list[Tensor] = []
    sync: list[Tensor] = []
    clip_clock, sync_clock = _FrameClock(CLIP_FPS), _FrameClock(SYNC_FPS)
    size, end_sec, wanted_sec = (0, 0), 0.0, duration_sec
    with _open(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        for exact_time, frame in _frames(path, container, stream, _exact(start_sec)):
            time = float(exact_time)
            end_sec = time + _frame_duration(frame, stream)
            if time > duration_sec:
                break
            num_clip, num_sync = clip_clock.uses(time), sync_clock.uses(time)  # none before time 0
            if num_clip or num_sync:
                picture = _upright_rgb(frame)  # (3, H, W)
                size = (picture.shape[1], picture.shape[2])
                if num_clip:
                    clip += [resize_frame(picture, clip_size)] * num_clip
                if num_sync:
                    sync += [resize_frame(picture, sync_size, sync_crop)] * num_sync
            if shortened_duration(duration_sec, len(clip), len(sync)) == duration_sec:
                break
        else:
            _check_not_truncated(path, container, stream, start_sec, duration_sec, end_sec)
            if fill_sec:  # not beyond the end of the video itself
                wanted_sec = max(0.0, min(duration_sec, end_sec))
        fps = float(stream.average_rate or 0)
    num_filled = _fill_end(clip, sync, wanted_sec, fill_sec)
    covered_sec = shortened_duration(wanted_sec, len(clip), len(sync))
    _check_enough(path, covered_sec, start_sec, duration_sec, end_sec)
    return VideoFrames(
        clip_frames=torch.stack(clip[: int(covered_sec * CLIP_FPS)]),  # (T, 3, clip_size, clip_size)
        sync_frames=torch.stack(sync[: int(covered_sec * SYNC_FPS)]),  # (F, 3, sync_size, sync_size)
        duration_sec=covered_sec,
        requested_sec=duration_sec,
        start_sec=start_sec,
        source_fps=fps,
        source_size=size,
        num_filled=num_filled,
    )


def _fill_end(clip: list[Tensor], sync: list[Tensor], duration_sec: float, fill_sec: float) -> int:
    """Repeat the last frames in place if at most ``fill_sec`` is missing; return the number of added sync frames."""
    if not clip or not sync:
        return 0
    missing_clip = max(0, math.ceil(duration_sec * CLIP_FPS) - len(clip))
    missing_sync = max(0, math.ceil(duration_sec * SYNC_FPS) - len(sync))
    if missing_clip > int(fill_sec * CLIP_FPS) or missing_sync > int(fill_sec * SYNC_FPS):
        return 0
    clip += clip[-1:] * missing_clip
    sync += sync[-1:] * missing_sync
    return missing_sync


def _upright_rgb(frame: Any) -> Tensor:
    """Return a decoded frame as (3, H, W) uint8 RGB, turned the way a player shows it."""
    picture = frame.to_ndarray(format="rgb24")  # (H, W, 3)
    quarter_turns = round(frame.rotation / 90)  # counter-clockwise, as in NumPy
    if quarter_turns:
        picture = np.rot90(picture, quarter_turns)
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)  # (3, H, W)


# --- reading sound --------------------------------------------------------------------------------------------------


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
    _check_range(path, start_sec, duration_sec)
    _check_file(path)
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
    try:
        file.seek(start)
        samples = file.read(wanted, dtype="float32", always_2d=True)  # (samples, channels)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: damaged, its sound cannot be decoded ({error})") from error
    if len(samples) < wanted:
        found, promised = (start + len(samples)) / rate, file.frames / rate
        raise ValueError(f"{path}: ends after {found:.2f} s of {promised:.2f} s: cut short or damaged, copy it again")
    return torch.from_numpy(np.ascontiguousarray(samples.T)), rate  # (channels, samples)


def _read_audio_av(path: PathLike, start_sec: float, duration_sec: float | None) -> tuple[Tensor, int]:
    with _open(path) as container:
        stream = _audio_stream(container, path)
        start = _exact(start_sec)
        if not _has_pictures(container) and stream.start_time is not None:
            start += stream.start_time * stream.time_base  # nothing to be aligned with: begin with the first sample
        frames = _frames(path, container, stream, start, preroll_sec=_AUDIO_PREROLL_SEC)
        waveform, rate = _assemble_sound(path, frames, duration_sec)
        reached_sec = waveform.shape[1] / rate
        if duration_sec is None or reached_sec < duration_sec:
            _check_not_truncated(path, container, stream, float(start), duration_sec, reached_sec)
    return waveform, rate


def _assemble_sound(
    path: PathLike, frames: Iterable[tuple[Fraction, Any]], duration_sec: float | None
) -> tuple[Tensor, int]:
    """Return the decoded frames laid out on the time line, beginning at time 0: (channels, samples) and the rate."""
    pieces: list[np.ndarray] = []
    filled, position, rate, wanted = 0, 0, 0, math.inf
    for time, frame in frames:
        samples = _float_samples(frame)  # (channels, n)
        stamp = round(time * frame.sample_rate)
        if rate == 0:
            rate, position = frame.sample_rate, stamp
            pieces.append(np.zeros((len(samples), 0), dtype=np.float32))
            if duration_sec is not None:
                wanted = round(duration_sec * rate)
        if frame.sample_rate != rate or len(samples) != len(pieces[0]):
            found, expected = f"{len(samples)} x {frame.sample_rate} Hz", f"{len(pieces[0])} x {rate} Hz"
            raise ValueError(f"{path}: sound changes from {expected} to {found} after {float(time):.2f} s; convert it")
        if abs(stamp - position) > _STAMP_JITTER_SEC * rate:
            position = stamp
        if position > filled:
            pieces.append(np.zeros((len(samples), position - filled), dtype=np.float32))
            filled = position
        kept = samples[:, filled - position :]  # nothing of it lies before time 0, or twice at the same time
        pieces.append(kept)
        filled += kept.shape[1]
        position += samples.shape[1]
        if filled >= wanted:
            break
    if not pieces:
        raise ValueError(f"{path}: has an audio stream, but no sound could be decoded from it")
    waveform = np.concatenate(pieces, axis=1)  # (channels, samples)
    return torch.from_numpy(waveform[:, : int(min(wanted, filled))].copy()), rate


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


# --- preparing sound ------------------------------------------------------------------------------------------------


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
    mono = _as_channels(waveform).mean(dim=0)  # (samples,)
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


# --- writing sound --------------------------------------------------------------------------------------------------


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
    samples = _as_channels(waveform)
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

    The first sample belongs to ``start_sec`` of the pictures, as :func:`read_video` counts it. Compressed sound may
    exceed full scale when it is decoded; such sound is scaled to fit as a whole, because clipping would distort it.

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


# --- video with new sound -------------------------------------------------------------------------------------------


def mux_video(
    video_path: PathLike,
    waveform: Tensor,
    rate: int,
    out_path: PathLike,
    start_sec: float = 0.0,
    duration_sec: float | None = None,
) -> float:
    """Write the pictures of ``video_path`` from ``start_sec`` with ``waveform`` as sound; return the seconds written.

    Pictures and sound are cut to the shortest of the video, the sound and ``duration_sec``; sound that is up to one
    frame longer than the pictures is kept. The video stream is copied unchanged where all of it is used, otherwise
    encoded again (H.264). The sound is AAC.

    Args:
        waveform: (channels, samples) or (samples,), one or two channels, full scale 1.0; belongs to ``start_sec``.
        out_path: .mp4, .m4v, .mov or .mkv.

    Raises:
        FileNotFoundError: no such video.
        ValueError: not a video, damaged, nothing to see at ``start_sec``, or sound that cannot be written.
        OSError: ``out_path`` cannot be written.
    """
    _check_range(video_path, start_sec, duration_sec)
    out_path, sound = Path(out_path), _as_channels(waveform)
    if out_path.suffix.lower() not in _VIDEO_SUFFIXES:
        raise ValueError(f"{out_path}: cannot write {out_path.suffix!r}, expected one of {', '.join(_VIDEO_SUFFIXES)}")
    if out_path.exists() and out_path.samefile(video_path):
        raise ValueError(f"{out_path}: is the video itself, choose another name for the result")
    if sound.shape[0] > 2 or sound.shape[1] == 0 or not torch.isfinite(sound).all():
        raise ValueError(f"the sound is {tuple(sound.shape)}, expected 1 or 2 channels, not empty, all values finite")

    span = _picture_span(video_path)
    available_sec = span.end_sec - _exact(start_sec)
    if available_sec <= 0:
        raise ValueError(f"{video_path}: has no picture at {start_sec} s, it ends after {float(span.end_sec):.2f} s")
    length = Fraction(sound.shape[1], rate)
    if length > available_sec + span.frame_sec:
        length = available_sec
    if duration_sec is not None:
        length = min(length, _exact(duration_sec))
    copy = start_sec == 0 and span.copyable and abs(available_sec - length) <= span.frame_sec
    sound = sound[:, : round(length * rate)].clamp(-1, 1)

    with _open(video_path) as source, atomic_path(out_path) as temporary, _open_output(out_path, temporary) as target:
        stream = _video_stream(source, video_path)
        if copy:
            pictures = _copied_pictures(video_path, source, stream, target, length)
        else:
            stream.thread_type = "AUTO"
            pictures = _encoded_pictures(video_path, source, stream, target, _exact(start_sec), length)
        next(pictures)  # runs up to the point where the output stream exists: all must, before the first packet
        sounds = _encoded_sound(target, sound, rate)
        next(sounds)
        for packet in heapq.merge(pictures, sounds, key=_decoding_time):
            target.mux(packet)
    return float(length)


@dataclass(frozen=True)
class _PictureSpan:
    """Where the pictures of a file are, by its packets alone (exact, and much cheaper than decoding)."""

    end_sec: Fraction
    frame_sec: Fraction  # mean time between two frames, but no more than one can hear: a difference to ignore
    copyable: bool  # the packets can be put into another file as they are


def _picture_span(path: PathLike) -> _PictureSpan:
    with _open(path) as container:
        stream, origin = _video_stream(container, path), _origin(container)
        starts: list[Fraction] = []
        last_duration, discarded = Fraction(0), False
        for packet in _packets(path, container, stream):
            if packet.pts is None:
                raise ValueError(f"{path}: its frames have no time stamps; put it into an .mp4 first")
            start = packet.pts * packet.time_base - origin
            if not starts or start >= max(starts[-1], starts[0]):
                last_duration = (packet.duration or 0) * packet.time_base
            starts.append(start)
            discarded |= packet.is_discard
        if not starts:
            raise ValueError(f"{path}: has a video stream, but no frames in it")
        starts.sort()
        if not last_duration and len(starts) > 1:
            last_duration = starts[-1] - starts[-2]
        end = starts[-1] + last_duration
        copyable = (
            not discarded
            and origin == 0
            and starts[0] == 0
            and container.format.name in _COPYABLE_FORMATS
            and stream.codec_context.name in _COPYABLE_CODECS
        )
        return _PictureSpan(end, min((end - starts[0]) / len(starts), _MUX_TOLERANCE_SEC), copyable)


def _copied_pictures(path: PathLike, source: Any, stream: Any, target: Any, length: Fraction) -> Iterator[Any]:
    """Yield None once the output stream exists, then the packets of ``stream``; none lasts beyond ``length``."""
    copy = target.add_stream_from_template(stream)
    yield None
    for packet in _packets(path, source, stream):
        remaining = length - packet.pts * packet.time_base
        if packet.duration and packet.duration * packet.time_base > remaining:
            packet.duration = max(1, round(remaining / packet.time_base))
        packet.stream = copy
        yield packet


def _encoded_pictures(
    path: PathLike, source: Any, stream: Any, target: Any, start: Fraction, length: Fraction
) -> Iterator[Any]:
    """Yield None once the output stream exists, then packets with the pictures of the range, upright, newly encoded."""
    import av

    shown = _shown_frames(_frames(path, source, stream, start), length)
    begin, end, frame = next(shown)
    upright = _picture_filter(stream, frame)
    picture = upright(frame)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"crf": "18", "preset": "veryfast", "bf": "0"} if codec == "libx264" else {"qscale": "2", "bf": "0"}
    encoder = target.add_stream(codec, rate=stream.average_rate or 25, options=options)
    encoder.width, encoder.height, encoder.pix_fmt = picture.width, picture.height, picture.format.name
    encoder.codec_context.time_base = _PICTURE_TIME_BASE
    if stream.sample_aspect_ratio:
        encoder.codec_context.sample_aspect_ratio = stream.sample_aspect_ratio
    for name in ("color_primaries", "color_trc", "colorspace"):  # the filter keeps the values, but not these names
        setattr(encoder.codec_context, name, getattr(frame, name))
    yield None

    durations: deque[int] = deque()  # of frames inside the encoder; without B-frames they leave it in order
    while picture is not None:
        picture.pts, picture.time_base = round(begin / _PICTURE_TIME_BASE), _PICTURE_TIME_BASE
        picture.pict_type = av.video.frame.PictureType.NONE  # the encoder chooses, not the source
        durations.append(round(end / _PICTURE_TIME_BASE) - picture.pts)
        yield from _timed(encoder.encode(picture), durations)
        begin, end, frame = next(shown, (end, end, None))
        picture = upright(frame) if frame is not None else None
    yield from _timed(encoder.encode(None), durations)


def _timed(packets: Iterable[Any], durations: deque[int]) -> Iterator[Any]:
    for packet in packets:
        packet.duration = round(durations.popleft() * _PICTURE_TIME_BASE / packet.time_base)
        yield packet


def _shown_frames(frames: Iterable[tuple[Fraction, Any]], length: Fraction) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """Yield (begin, end, frame): when a player shows each frame of 0 ... ``length``. Together they cover all of it."""
    begin, shown = Fraction(0), None
    for time, frame in frames:
        if time >= length:
            break
        if shown is not None and time > begin:
            yield begin, time, shown
            begin = time
        shown = frame
    if shown is not None:
        yield begin, length, shown


def _picture_filter(stream: Any, first: Any) -> Callable[[Any], Any]:
    """Return a function that makes of frames like ``first`` what players expect: upright, 4:2:0, even sides."""
    import av

    matrix = _COLOR_MATRICES.get(int(first.colorspace))
    turns = {0: [], 1: [("transpose", "cclock")], 2: [("hflip", ""), ("vflip", "")], 3: [("transpose", "clock")]}
    steps = [
        *turns[round(first.rotation / 90) % 4],
        ("crop", "trunc(iw/2)*2:trunc(ih/2)*2:0:0"),
        ("scale", "out_range=tv" + (f":out_color_matrix={matrix}" if matrix else "")),  # the range that players expect
        ("format", "yuv420p"),
    ]
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(template=stream), *(graph.add(*step) for step in steps), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()

    def apply(frame: Any) -> Any:
        graph.push(frame)
        return graph.pull()

    return apply


def _encoded_sound(target: Any, sound: Tensor, rate: int) -> Iterator[Any]:
    """Yield None once the output stream exists, then the AAC packets of ``sound`` (channels, samples)."""
    import av

    layout = "mono" if sound.shape[0] == 1 else "stereo"
    encoder = target.add_stream("aac", rate=rate, layout=layout)
    encoder.bit_rate = min(192_000, 6 * rate * sound.shape[0])  # 6 bits per sample is the limit of the format
    yield None
    for start in range(0, sound.shape[1], _AAC_FRAME):
        samples = np.ascontiguousarray(sound[:, start : start + _AAC_FRAME].numpy())
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        yield from encoder.encode(frame)
    yield from encoder.encode(None)


def _decoding_time(packet: Any) -> Fraction:
    return (packet.dts if packet.dts is not None else packet.pts) * packet.time_base


# --- headers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MediaInfo:
    """What the header of a file says; None where it says nothing or has no such stream.

    Attributes:
        format: short name of the container, e.g. "mov,mp4,m4a,3gp,3g2,mj2".
        streams: kind of every stream in file order, e.g. ("video", "audio").
        duration_sec: of the longest stream.
        fps: average frame rate.
        width, height: of the stored pictures, before they are turned upright.
        audio_rate: samples per second.
        audio_channels: 1 for mono.
    """

    format: str
    streams: tuple[str, ...]
    duration_sec: float | None
    fps: float | None
    width: int | None
    height: int | None
    audio_rate: int | None
    audio_channels: int | None


def probe(path: PathLike) -> MediaInfo:
    """Return what the header of an audio or video file says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither audio nor video.
    """
    with _open(path) as container:
        video = _video_stream(container, path) if _has_pictures(container) else None
        audio = container.streams.audio[0] if container.streams.audio else None
        if video is None and audio is None:
            raise ValueError(f"{path}: has neither pictures nor sound in it")
        return MediaInfo(
            format=container.format.name,
            streams=tuple(stream.type for stream in container.streams),
            duration_sec=None if container.duration is None else container.duration / 1_000_000,
            fps=float(video.average_rate) if video is not None and video.average_rate else None,
            width=video.width if video is not None else None,
            height=video.height if video is not None else None,
            audio_rate=audio.rate if audio is not None else None,
            audio_channels=audio.channels if audio is not None else None,
        )


def audio_length(path: PathLike) -> tuple[int, int]:
    """Return (samples, rate) of the sound in a file, from its header alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no sound in it, or a header without a length.
    """
    import soundfile

    _check_file(path)
    try:
        info = soundfile.info(path)
        return info.frames, info.samplerate
    except soundfile.LibsndfileError:
        with _open(path) as container:
            stream = _audio_stream(container, path)
            end_sec = _declared_end(container, stream)
            if end_sec is None:
                raise ValueError(f"{path}: the header does not say how long the sound is; convert it") from None
            return round(end_sec * stream.rate), stream.rate


# --- FFmpeg, wrapped once -------------------------------------------------------------------------------------------


def _check_file(path: PathLike) -> None:
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder, expected a video or audio file")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")


def _check_range(path: PathLike, start_sec: float, duration_sec: float | None) -> None:
    if not (math.isfinite(start_sec) and start_sec >= 0):
        raise ValueError(f"{path}: start is {start_sec} s, expected 0 or more")
    if duration_sec is not None and not (math.isfinite(duration_sec) and duration_sec > 0):
        raise ValueError(f"{path}: duration is {duration_sec} s, expected more than 0")


def _exact(seconds: float) -> Fraction:
    """Return the number as it is written: 1.3 is 13/10, so that a frame at 1.3 s is not missed by a rounding error."""
    return Fraction(str(seconds))


@contextmanager
def _open(path: PathLike) -> Iterator[Any]:
    """Yield the PyAV container of a file to read."""
    import av

    _check_file(path)
    try:
        # Absolute, because FFmpeg takes a relative name like "pipe:1.mp4" for a protocol.
        container = av.open(os.path.abspath(path), metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read as video or audio ({error.strerror})") from error
    with container:
        yield container


@contextmanager
def _open_output(path: Path, temporary: Path) -> Iterator[Any]:
    """Yield a PyAV container to write to; errors name ``path``, the final name."""
    import av

    options = {} if path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
    try:
        with av.open(os.path.abspath(temporary), "w", options=options) as container:
            yield container
    except av.error.FFmpegError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error


def _is_cover(stream: Any) -> bool:
    """Return whether a video stream is only the cover picture of a sound file."""
    import av

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _has_pictures(container: Any) -> bool:
    return any(not _is_cover(stream) for stream in container.streams.video)


def _video_stream(container: Any, path: PathLike) -> Any:
    for stream in container.streams.video:
        if not _is_cover(stream):
            return stream
    found = ", ".join(stream.type for stream in container.streams) or "no streams"
    raise ValueError(f"{path}: has no video stream (found: {found})")


def _audio_stream(container: Any, path: PathLike) -> Any:
    if container.streams.audio:
        return container.streams.audio[0]
    found = ", ".join(stream.type for stream in container.streams) or "no streams"
    raise ValueError(f"{path}: has no audio stream (found: {found})")


def _origin(container: Any) -> Fraction:
    """Return the time stamp, in seconds, that is time 0 of the file."""
    import av

    if not container.format.flags & av.format.Flags.ts_discont.value:
        return Fraction(0)
    pictures = [stream for stream in container.streams.video if not _is_cover(stream)]
    first = (pictures or container.streams)[0]
    return (first.start_time or 0) * first.time_base


def _packets(path: PathLike, container: Any, stream: Any) -> Iterator[Any]:
    """Yield the packets of ``stream`` in file order."""
    import av

    try:
        for packet in container.demux(stream):
            if packet.size:  # the last one is empty and only flushes decoders
                yield packet
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: damaged, cannot be read to its end ({error.strerror})") from error


def _frames(
    path: PathLike, container: Any, stream: Any, start: Fraction, preroll_sec: Fraction = Fraction(0), seek: bool = True
) -> Iterator[tuple[Fraction, Any]]:
    """Yield (time, frame) in presentation order; ``time`` is exact, in seconds relative to ``start``.

    Decoding begins at or before ``start - preroll_sec``, so the first times may be negative.
    """
    import av

    zero = _origin(container) + start
    time = -start
    sought = seek and start > preroll_sec and _seek(container, stream, zero - preroll_sec)
    try:
        for frame in container.decode(stream):
            if frame.pts is None:
                raise ValueError(f"{path}: its frames have no time stamps; put it into an .mp4 first")
            time = frame.pts * frame.time_base - zero
            if sought and (time > -preroll_sec or (stream.type == "video" and not frame.key_frame)):
                break
            sought = False
            yield time, frame
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{path}: damaged after {float(time + start):.2f} s, cannot be decoded ({error.strerror})"
        ) from error
    if sought:  # Some containers only guess where a key frame or a time stamp lies; read those from the start.
        with _open(path) as whole:
            yield from _frames(path, whole, whole.streams[stream.index], start, preroll_sec, seek=False)


def _seek(container: Any, stream: Any, seconds: Fraction) -> bool:
    """Move to the last key frame at or before ``seconds``; return whether the file allows it."""
    import av

    try:
        container.seek(math.floor(seconds / stream.time_base), stream=stream)
    except av.error.FFmpegError:
        return False
    return True


def _frame_duration(frame: Any, stream: Any) -> float:
    if frame.duration:
        return float(frame.duration * frame.time_base)
    return float(1 / stream.average_rate) if stream.average_rate else 0.0


def _declared_end(container: Any, stream: Any) -> float | None:
    """Return the time at which the header says that ``stream`` ends, None if it says nothing about this stream."""
    if stream.duration is not None:
        return float((stream.start_time or 0) + stream.duration) * float(stream.time_base) - float(_origin(container))
    if "DURATION" in stream.metadata:  # Matroska, "00:00:09.000000000"
        try:
            hours, minutes, seconds = stream.metadata["DURATION"].split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        except ValueError:
            return None
    if len(container.streams) == 1 and container.duration is not None:
        return (container.duration + (container.start_time or 0)) / 1_000_000 - float(_origin(container))
    return None


def _check_not_truncated(
    path: PathLike, container: Any, stream: Any, start_sec: float, duration_sec: float | None, reached_sec: float
) -> None:
    """Raise if the header promises more in the wanted range than the ``reached_sec`` that could be decoded of it."""
    declared = _declared_end(container, stream)
    if declared is None:
        return
    end_sec = declared if duration_sec is None else min(declared, start_sec + duration_sec)
    if start_sec + reached_sec < end_sec - _TRUNCATION_SEC:
        raise ValueError(
            f"{path}: ends after {start_sec + reached_sec:.2f} s of {declared:.2f} s: "
            "cut short or damaged, copy it again"
        )


def _check_enough(path: PathLike, covered_sec: float, start_sec: float, duration_sec: float, end_sec: float) -> None:
    """Raise if a clip is shorter than the sync encoder needs."""
    shortest_sec = SYNC_SEGMENT_FRAMES / SYNC_FPS
    if covered_sec < shortest_sec:
        raise ValueError(
            f"{path}: has {covered_sec:.2f} s of pictures from {start_sec:.2f} s to {start_sec + duration_sec:.2f} s, "
            f"expected at least {shortest_sec} s; its pictures end after {start_sec + end_sec:.2f} s"
        )


def _as_channels(waveform: Tensor) -> Tensor:
    """Return (channels, samples) float32 on the CPU, for (samples,) too."""
    waveform = waveform.detach().to("cpu", torch.float32)
    if waveform.dim() == 1:
        waveform = waveform[None]  # (1, samples)
    if waveform.dim() != 2:
        raise ValueError(f"waveform is {tuple(waveform.shape)}, expected (channels, samples) or (samples,)")
    return waveform
