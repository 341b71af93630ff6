"""Videos with new sound: their pictures are copied as they are where possible, otherwise encoded again."""

from __future__ import annotations

import heapq
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selva.media.audio import as_channels
from selva.media.container import (
    PathLike,
    check_range,
    decode_frames,
    exact_seconds,
    open_media,
    read_packets,
    time_origin,
    video_stream,
)
from selva.media.pictures import orientation, steady
from selva.utils.errors import UserError
from selva.utils.files import atomic_path

log = logging.getLogger(__name__)

_COPYABLE_CODECS = {  # what each container can hold, and FFmpeg writes into it
    ".mp4": ("h264", "hevc", "mpeg4", "av1", "vp9"),
    ".m4v": ("h264", "mpeg4"),
    ".mov": ("h264", "hevc", "mpeg4"),
    ".mkv": ("h264", "hevc", "mpeg4", "av1", "vp9"),
}
_COPYABLE_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # their packets need no rewriting
_PICTURE_TIME_BASE = Fraction(1, 60_000)  # holds 24, 25, 29.97, 30 and 60 fps exactly; MPEG-4 allows 16 bits
_COLOR_MATRICES = {1: "bt709", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}  # what FFmpeg would turn into bt601 otherwise
_TOLERANCE_SEC = Fraction(1, 10)  # lengths of picture and sound that differ less, and by less than a frame, fit
_AAC_FRAME = 1024  # samples per packet


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
    check_range(video_path, start_sec, duration_sec)
    out_path, sound = Path(out_path), as_channels(waveform)
    if out_path.suffix.lower() not in _COPYABLE_CODECS:
        raise UserError(f"{out_path}: cannot write {out_path.suffix!r}, expected one of {', '.join(_COPYABLE_CODECS)}")
    if out_path.exists() and out_path.samefile(video_path):
        raise UserError(f"{out_path}: is the video itself, choose another name for the result")
    if sound.shape[0] > 2 or sound.shape[1] == 0 or not torch.isfinite(sound).all():
        raise UserError(f"the sound is {tuple(sound.shape)}, expected 1 or 2 channels, not empty, all values finite")

    span = _picture_span(video_path, out_path.suffix.lower())
    available_sec = span.end_sec - exact_seconds(start_sec)
    if available_sec <= 0:
        raise UserError(f"{video_path}: has no picture at {start_sec} s, it ends after {float(span.end_sec):.2f} s")
    length = Fraction(sound.shape[1], rate)
    if length > available_sec + span.frame_sec:
        length = available_sec
    if duration_sec is not None:
        length = min(length, exact_seconds(duration_sec))
    copy = start_sec == 0 and span.copyable and abs(available_sec - length) <= span.frame_sec
    sound = sound[:, : round(length * rate)].clamp(-1, 1)

    if copy:
        try:
            _write(video_path, out_path, None, length, sound, rate)
            return float(length)
        except (ValueError, OSError) as error:  # the header of the source may lack what another container needs
            log.info("%s: its pictures cannot be copied, they are encoded again (%s)", video_path, error)
    _write(video_path, out_path, exact_seconds(start_sec), length, sound, rate)
    return float(length)


def _write(
    video_path: PathLike, out_path: Path, start: Fraction | None, length: Fraction, sound: Tensor, rate: int
) -> None:
    """Write the pictures from ``start``, encoded again, or from the beginning as they are (None); and the sound."""
    with open_media(video_path) as source, _open_output(out_path) as target:
        stream = video_stream(source, video_path)
        if start is None:
            pictures = _copied_pictures(video_path, source, stream, target, length)
        else:
            stream.thread_type = "AUTO"
            pictures = _encoded_pictures(video_path, source, stream, target, start, length)
        next(pictures)  # runs up to the point where the output stream exists: all must, before the first packet
        sounds = _encoded_sound(target, sound, rate)
        next(sounds)
        for packet in heapq.merge(pictures, sounds, key=_decoding_time):
            target.mux(packet)


# -- the video --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PictureSpan:
    """Extent of the pictures of a file, by its packets alone (exact, and much cheaper than decoding)."""

    end_sec: Fraction
    frame_sec: Fraction  # mean time between two frames, but no more than one can hear: a difference to ignore
    copyable: bool  # the packets can be put into the other file as they are


def _picture_span(path: PathLike, suffix: str) -> _PictureSpan:
    with open_media(path) as container:
        stream, origin = video_stream(container, path), time_origin(container)
        starts: list[Fraction] = []
        last_duration, discarded = Fraction(0), False
        for packet in read_packets(path, container, stream):
            if packet.pts is None:
                raise UserError(f"{path}: its frames have no time stamps; put it into an .mp4 first")
            start = packet.pts * packet.time_base - origin
            if not starts or start >= max(starts[-1], starts[0]):
                last_duration = (packet.duration or 0) * packet.time_base
            starts.append(start)
            discarded |= packet.is_discard
        if not starts:
            raise UserError(f"{path}: has a video stream, but no frames in it")
        starts.sort()
        if not last_duration and len(starts) > 1:
            last_duration = starts[-1] - starts[-2]
        end = starts[-1] + last_duration
        copyable = (
            not discarded
            and origin == 0
            and starts[0] == 0
            and container.format.name in _COPYABLE_FORMATS
            and stream.codec_context.name in _COPYABLE_CODECS[suffix]
        )
        return _PictureSpan(end, min((end - starts[0]) / len(starts), _TOLERANCE_SEC), copyable)


# -- the result -------------------------------------------------------------------------------------------------------


@contextmanager
def _open_output(path: Path) -> Iterator[Any]:
    """Yield a PyAV container to write to; the file appears under its name when it is complete."""
    import av.error

    options = {} if path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
    with atomic_path(path) as temporary:
        try:
            with av.open(os.path.abspath(temporary), "w", options=options) as container:
                yield container
        except av.error.FFmpegError as error:
            raise OSError(f"{path}: cannot be written ({error.strerror})") from error


def _copied_pictures(path: PathLike, source: Any, stream: Any, target: Any, length: Fraction) -> Iterator[Any]:
    """Yield None once the output stream exists, then the packets of ``stream``; none lasts beyond ``length``."""
    copy = target.add_stream_from_template(stream)
    yield None
    for packet in read_packets(path, source, stream):
        remaining = length - packet.pts * packet.time_base
        if packet.duration and packet.duration * packet.time_base > remaining:
            packet.duration = max(1, round(remaining / packet.time_base))
        packet.stream = copy
        yield packet


def _encoded_pictures(
    path: PathLike, source: Any, stream: Any, target: Any, start: Fraction, length: Fraction
) -> Iterator[Any]:
    """Yield None once the output stream exists, then packets with the pictures of the range, upright, newly encoded."""
    import av.video.frame

    shown = _shown_frames(steady(path, decode_frames(path, source, stream, start), start), length)
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
    import av.filter

    matrix = _COLOR_MATRICES.get(int(first.colorspace))
    steps = [
        *orientation(first).filters,
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
