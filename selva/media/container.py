"""PyAV, wrapped once: open a file, find its streams, read its header, decode it from a given time.

Every error names the file. Time 0 is that of the package, see :mod:`selva.media`.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from selva.sequence import SHORTEST_SEC
from selva.utils.errors import UserError
from selva.utils.text import counted

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

# They have no header that tells a length; FFmpeg guesses it by their bit rate, and may be far off.
_GUESSED_FORMATS = ("mpeg", "aac", "ac3", "eac3", "dts", "dtshd", "truehd", "mlp", "loas", "amr", "amrnb", "amrwb")
MAX_PAUSE_SEC = 30  # a screen recording has no pictures while nothing moves; beyond this, time stamps are wrong
_MAX_STEP_BACK_SEC = 1  # frames of a damaged file may be out of order; further back, another recording begins
_LEAST_BYTES_PER_SEC = 500  # a header that promises a longer file than that is not believed
_ASF_FILE_PROPERTIES = bytes.fromhex("A1DCAB8C47A9CF118EE400C00C205365")
TRUNCATION_SEC = 0.5  # a stream that ends this much before the end in its header was cut short


# -- opening ----------------------------------------------------------------------------------------------------------


def check_file(path: PathLike) -> None:
    """Raise if there is no file at ``path``."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder, expected a video or audio file")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")


def check_range(path: PathLike, start_sec: float, duration_sec: float | None) -> None:
    """Raise if a clip of a file cannot begin or last as asked for."""
    if not (math.isfinite(start_sec) and start_sec >= 0):
        raise UserError(f"{path}: start is {start_sec} s, expected 0 or more")
    if duration_sec is not None and not (math.isfinite(duration_sec) and duration_sec > 0):
        raise UserError(f"{path}: duration is {duration_sec} s, expected more than 0")


def exact_seconds(seconds: float) -> Fraction:
    """Return the number as it is written: 1.3 is 13/10, so that a frame at 1.3 s is not missed by a rounding error."""
    return Fraction(str(seconds))


@contextmanager
def open_media(path: PathLike) -> Iterator[Any]:
    """Yield the PyAV container of a file to read."""
    import av.error

    check_file(path)
    try:
        # Absolute, because FFmpeg takes a relative name like "pipe:1.mp4" for a protocol.
        container = av.open(os.path.abspath(path), metadata_errors="replace", options=_open_options(path))
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: cannot be read as video or audio ({error.strerror})") from error
    with container:
        try:
            yield container
        except av.error.FFmpegError as error:
            if isinstance(error, ValueError | OSError):
                raise
            # Errors of libraries behind FFmpeg, which Python has no name for, and no batch expects.
            raise UserError(f"{path}: cannot be decoded ({error.strerror})") from error


def _open_options(path: PathLike) -> dict[str, str]:
    """Return options for FFmpeg: to read the sound of a long WAV to its end, where its header counts none.

    Recorders fill in the size of an RF64 (or BW64) file last. Without it, FFmpeg finds nothing.
    """
    with open(path, "rb") as file:
        head = file.read(36)
    is_unfinished = head[:4] in (b"RF64", b"BW64") and head[12:16] == b"ds64" and not any(head[28:36])
    return {"ignore_length": "1"} if is_unfinished else {}


# -- streams ----------------------------------------------------------------------------------------------------------


def _is_cover(stream: Any) -> bool:
    """Return True if a video stream is only the cover picture of a sound file."""
    import av.stream

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def has_pictures(container: Any) -> bool:
    """Return True if a file is a video, and not sound with a cover picture."""
    return any(not _is_cover(stream) for stream in container.streams.video)


def video_stream(container: Any, path: PathLike) -> Any:
    """Return the first video stream that is no cover picture and can be decoded; ``path`` is for the error."""
    pictures = [stream for stream in container.streams.video if not _is_cover(stream)]
    for stream in pictures:
        if can_decode(stream):
            return stream
    if pictures:
        raise UserError(f"{path}: its video codec is not supported; convert it to H.264")
    found = ", ".join(stream.type for stream in container.streams) or "no streams"
    raise UserError(f"{path}: has no video stream (found: {found})")


def audio_stream(container: Any, path: PathLike) -> Any:
    """Return the audio stream that players choose: the default one; ``path`` is for errors and remarks."""
    tracks = list(container.streams.audio)
    known = [stream for stream in tracks if can_decode(stream)]
    if known:
        best = container.streams.best("audio")
        best = best if best in known else known[0]
        if len(tracks) > 1:
            _say_track(str(path), tracks.index(best) + 1, len(tracks), _is_default(best))
        return best
    if tracks:
        raise UserError(f"{path}: its audio codec is not supported; convert it to AAC or WAV")
    found = ", ".join(stream.type for stream in container.streams) or "no streams"
    raise UserError(f"{path}: has no audio stream (found: {found})")


def can_decode(stream: Any) -> bool:
    """Return True if there is a decoder for a stream; without one, PyAV's stream lacks most of its attributes."""
    return stream.codec_context is not None


def _is_default(stream: Any) -> bool:
    import av.stream

    return bool(stream.disposition & av.stream.Disposition.default)


@lru_cache(maxsize=4096)  # said once per file, however often it is opened
def _say_track(path: str, number: int, count: int, is_default: bool) -> None:
    why = ", the default one" if is_default else ""
    log.warning("%s: has %s; number %d is taken%s", path, counted(count, "sound track"), number, why)


def time_origin(container: Any) -> Fraction:
    """Return the time stamp, in seconds, that is time 0 of the file, for its pictures and for its sound.

    It is the start of the container: of the stream that begins first. Formats for broadcast may hold programs whose
    clocks have nothing to do with each other; there it is the start of the pictures. Pictures without sound that begin
    less than a sync segment late keep their stamps: the published extraction lets the first one stand in.
    """
    import av.format

    pictures = [stream for stream in container.streams.video if not _is_cover(stream)]
    streams = [*pictures, *container.streams.audio]
    is_broadcast = bool(container.format.flags & av.format.Flags.ts_discont.value)
    if is_broadcast:
        streams = streams[:1]
    # Not container.start_time: rounded to microseconds, it may lie after the first picture.
    starts = [stream_start(stream) for stream in streams if stream.start_time is not None]
    start = max(Fraction(0), min(starts, default=Fraction(0)))  # before 0 there is only what decoders need to start
    is_silent = bool(pictures) and not container.streams.audio
    return Fraction(0) if is_silent and start < SHORTEST_SEC and not is_broadcast else start


def stream_start(stream: Any) -> Fraction:
    """Return the time stamp, in exact seconds, at which a stream begins; 0 if the file does not say."""
    return (stream.start_time or 0) * stream.time_base


# -- headers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MediaInfo:
    """Header of a media file; None where it says nothing or has no such stream.

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
    """Return the header of an audio or video file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither audio nor video.
    """
    with open_media(path) as container:
        video = video_stream(container, path) if has_pictures(container) else None
        audio = container.streams.best("audio") if container.streams.audio else None
        if video is None and audio is None:
            raise UserError(f"{path}: has neither pictures nor sound in it")
        return MediaInfo(
            format=container.format.name,
            streams=tuple(stream.type for stream in container.streams),
            duration_sec=None if container.duration is None else container.duration / 1_000_000,
            fps=float(video.average_rate) if video is not None and video.average_rate else None,
            width=video.width if video is not None else None,
            height=video.height if video is not None else None,
            audio_rate=audio.rate if audio is not None and can_decode(audio) else None,
            audio_channels=audio.channels if audio is not None and can_decode(audio) else None,
        )


def video_length(path: PathLike) -> float:
    """Return the seconds from time 0 to the end of the pictures, from the header; nothing is decoded.

    Where there is no such header (a stream that was never finished; MPEG program streams, for which FFmpeg guesses), or
    where it promises far more than a file of that size can hold, the packets of the file are read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video, without any frame, or with time stamps that jump.
    """
    with open_media(path) as container:
        stream = video_stream(container, path)
        declared = declared_end(container, stream)
        if declared is not None and 0 < declared <= os.path.getsize(path) / _LEAST_BYTES_PER_SEC:
            return declared
        starts = packet_times(path, container, stream)
        for last, time in pairwise(starts):
            check_step(path, last, time, Fraction(0))
        return float(starts[-1] + (1 / stream.average_rate if stream.average_rate else 0))


def packet_times(path: PathLike, container: Any, stream: Any) -> list[Fraction]:
    """Return the times at which the frames of ``stream`` are shown, ascending, in exact seconds, without decoding.

    Raises:
        ValueError: no frames, or frames without time stamps.
    """
    origin = time_origin(container)
    times: list[Fraction] = []
    for packet in read_packets(path, container, stream):
        if packet.pts is None:
            raise UserError(f"{path}: its frames have no time stamps; put it into an .mp4 first")
        if not packet.is_discard:
            times.append(packet.pts * packet.time_base - origin)
    if not times:
        raise UserError(f"{path}: has a video stream, but no frames in it")
    return sorted(times)


def declared_end(container: Any, stream: Any) -> float | None:
    """Return the time at which the header says that ``stream`` ends, None if it says nothing about this stream."""
    if container.format.name in _GUESSED_FORMATS:
        return None
    origin_sec = float(time_origin(container))
    if container.format.name == "asf" and (end_sec := _end_of_cut_asf(container.name)) is not None:
        return end_sec - origin_sec
    if stream.duration is not None:
        begin = Fraction(0) if _duration_is_end(container, stream) else stream_start(stream)
        # Of an AVI without its index, which stands at the end, FFmpeg counts what is there; its header counts frames.
        units = max(stream.duration, stream.frames) if container.format.name == "avi" else stream.duration
        return float(begin + units * stream.time_base) - origin_sec
    if "DURATION" in stream.metadata:  # Matroska, "00:00:09.000000000"
        try:
            hours, minutes, seconds = stream.metadata["DURATION"].split(":")
            end_sec = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        except ValueError:
            return None
        # FFmpeg writes the stamp of the end there, MKVToolNix (which says that it did) the seconds from the start.
        if any(key.startswith("_STATISTICS_WRITING_APP") for key in stream.metadata):
            end_sec += float(stream_start(stream))
        return end_sec - origin_sec
    if len(container.streams) == 1 and container.duration is not None and origin_sec == 0:
        return (container.duration + (container.start_time or 0)) / 1_000_000  # from a later start, or from 0: unknown
    return None


def _end_of_cut_asf(path: str) -> float | None:
    """Return the seconds that the header of an ASF (.wmv, .wma) promises; None if the file is as long as it says."""
    with open(path, "rb") as file:
        head = file.read(65_536)
    at = head.find(_ASF_FILE_PROPERTIES)
    if at < 0 or len(head) < at + 92:
        return None
    size, duration, preroll, flags = (int.from_bytes(head[at + start : at + start + count], "little")
                                      for start, count in ((40, 8), (64, 8), (80, 8), (88, 4)))
    is_whole = flags & 1 or size <= os.path.getsize(path)  # a live stream never says
    return None if is_whole else duration / 10_000_000 - preroll / 1000


def warn_of_uncertain_end(path: PathLike, container: Any, reached_sec: float) -> None:
    """Say if a stream ends before its FLV says: no error, as live recordings note anything, and one may be shorter."""
    if container.format.name != "flv" or not container.duration:
        return
    promised_sec = container.duration / 1_000_000
    if reached_sec < promised_sec - TRUNCATION_SEC:
        log.warning("%s: ends after %.2f s, its header says %.2f s; it may have been cut short", path, reached_sec,
                    promised_sec)


def _duration_is_end(container: Any, stream: Any) -> bool:
    """Return True where lengths count from time stamp 0: ASF, Opus in Ogg, MP4 in fragments (no frames in index)."""
    name = container.format.name
    is_opus = name == "ogg" and can_decode(stream) and stream.codec_context.name in ("opus", "libopus")
    return name == "asf" or is_opus or (name.startswith("mov,") and not stream.frames)


def check_not_truncated(
    path: PathLike, container: Any, stream: Any, start_sec: float, duration_sec: float | None, reached_sec: float
) -> None:
    """Raise if the header promises more in the wanted range than the ``reached_sec`` that could be decoded of it."""
    declared = declared_end(container, stream)
    if declared is None:
        if duration_sec is None or start_sec + reached_sec < start_sec + duration_sec - TRUNCATION_SEC:
            warn_of_uncertain_end(path, container, start_sec + reached_sec)
        return
    end_sec = declared if duration_sec is None else min(declared, start_sec + duration_sec)
    if start_sec + reached_sec < end_sec - TRUNCATION_SEC:
        raise UserError(
            f"{path}: ends after {start_sec + reached_sec:.2f} s of {declared:.2f} s: cut short or damaged, copy it "
            "again"
        )


def check_step(path: PathLike, last: Fraction | None, time: Fraction, start: Fraction) -> None:
    """Raise if the picture at ``time`` cannot follow the one at ``last`` (None: the first), counted from ``start``.

    Raises:
        ValueError: time jumps, by more than ``MAX_PAUSE_SEC`` without a picture, or backwards; names the place.
    """
    since = max(last or Fraction(0), Fraction(0))  # what lies before the start of a clip concerns nobody
    if time - since > MAX_PAUSE_SEC or (since and since - time > _MAX_STEP_BACK_SEC):
        raise UserError(
            f"{path}: its time stamps jump from {float(since + start):.2f} s to {float(time + start):.2f} s, expected "
            f"at most {MAX_PAUSE_SEC} s between two pictures: damaged, or several recordings joined; cut it there"
        )


# -- packets and frames -----------------------------------------------------------------------------------------------


def read_packets(path: PathLike, container: Any, stream: Any) -> Iterator[Any]:
    """Yield the packets of ``stream`` in file order; an empty one of pictures shows the one before it again."""
    import av.error

    try:
        for packet in container.demux(stream):
            if packet.size or _shows_again(packet):  # the last one is empty and only flushes decoders
                yield packet
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: damaged, cannot be read to its end ({error.strerror})") from error


def decode_frames(
    path: PathLike, container: Any, stream: Any, start: Fraction, seek: bool = True
) -> Iterator[tuple[Fraction, Any]]:
    """Yield (time, picture) in presentation order; ``time`` is exact, in seconds relative to ``start``.

    Decoding begins at or before ``start``, so the first times may be negative. A picture without a time stamp follows
    the one before it.
    """
    import av.error

    zero = time_origin(container) + start
    time: Fraction = -start
    following: Fraction | None = None
    sought = seek and start > 0 and seek_before(container, stream, zero)
    try:
        for stamp, frame in _shown_pictures(container, stream):
            if stamp is not None:
                time = stamp - zero
            elif following is not None:
                time = following
            elif sought:
                break
            else:
                raise UserError(f"{path}: its frames have no time stamps; put it into an .mp4 first")
            following = _following(time, frame, stream)
            if sought and (time > 0 or not frame.key_frame):
                break
            sought = False
            yield time, frame
    except av.error.FFmpegError as error:
        if not sought:  # else the seek ended in the middle of a frame
            raise UserError(
                f"{path}: damaged after {float(time + start):.2f} s, cannot be decoded ({error.strerror})"
            ) from error
    if sought:  # Some containers only guess where a key frame or a time stamp lies; read those from the start.
        with open_media(path) as whole:
            yield from decode_frames(path, whole, whole.streams[stream.index], start, seek=False)


def _shows_again(packet: Any) -> bool:
    """Return True for a packet without content that has a time: of pictures that stand still, as in Theora."""
    return not packet.size and packet.pts is not None and packet.stream.type == "video"


def _shown_pictures(container: Any, stream: Any) -> Iterator[tuple[Fraction | None, Any]]:
    """Yield (time stamp in exact seconds, picture) as they are shown, each as often as the file repeats it."""
    again: deque[Fraction] = deque()  # decoders may be some packets behind
    last = None
    for packet in container.demux(stream):
        if _shows_again(packet):  # no decoder takes it
            again.append(packet.pts * packet.time_base)
            continue
        for frame in packet.decode():
            stamp = None if frame.pts is None else frame.pts * frame.time_base
            while again and last is not None and stamp is not None and again[0] < stamp:
                yield again.popleft(), last
            yield stamp, frame
            last = frame
    if last is not None:
        yield from ((stamp, last) for stamp in again)


def _following(time: Fraction, frame: Any, stream: Any) -> Fraction | None:
    """Return the time of the picture after ``frame``, None if the file does not say how long it is shown."""
    if frame.duration:
        return time + frame.duration * frame.time_base
    return time + 1 / stream.average_rate if stream.average_rate else None


def seek_before(container: Any, stream: Any, seconds: Fraction) -> bool:
    """Move to the last key frame at or before ``seconds``; return True if the file allows it."""
    import av.error

    try:
        container.seek(math.floor(seconds / stream.time_base), stream=stream)
    except av.error.FFmpegError:
        return False
    return True
