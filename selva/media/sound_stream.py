"""Sound as FFmpeg decodes it: laid out on the time line of its file, with silence where there is none.

    packets --decode--> frames with time stamps --time line--> pieces, one after the other, and what is missing
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from selva.media.container import (
    TRUNCATION_SEC,
    PathLike,
    audio_stream,
    declared_end,
    exact_seconds,
    has_pictures,
    open_media,
    seek_before,
    time_origin,
    warn_of_uncertain_end,
)
from selva.media.sound_header import check_last_packet, check_ogg_end, cut_error, is_length_of_mp3_guessed
from selva.utils.errors import UserError
from selva.utils.text import counted

log = logging.getLogger(__name__)

MAX_GAP_SEC = 10.0  # a longer gap between two frames is a damaged time stamp, or two recordings joined
MAX_LOST_SHARE = 0.2  # of the sound that cannot be decoded and becomes silence; more is refused

_MAX_LATE_SEC = 3600.0  # sound of a video may begin late, as long as the video lasts, but not later than this
_MAX_LEAD_SEC = 0.12  # sound before time 0 that decoders need to start, 5186 samples of HE-AAC at most; more is said
_PREROLL_SEC = Fraction(1)  # decoders need some sound before a cut to be sample-exact after it
_STAMP_JITTER_SEC = 0.02  # Matroska rounds time stamps to milliseconds; smaller jumps are no gaps
_STAMP_ROUNDING_SEC = 0.002
_MAX_BAD_PACKETS = 10  # one after the other that cannot even be read
_LONGEST_PACKET_SEC = 1  # a longer one of which nothing can be decoded has a damaged duration
_FREE_SILENCE_SEC = 60.0  # silence in place of what is missing; beyond, no more of it than of sound
_OVERLAP_SEC = 1.0  # beside pictures, frames may overlap by so much, and their time stamps decide
_SILENCE_BLOCK = 1 << 19  # samples of silence per piece


class _Decoded(NamedTuple):
    """A decoded frame, or None for a packet that could not be decoded.

    Attributes:
        stamp: seconds, of the container.
        lost_sec: of packets before the frame, or instead of it, in which no sound was found. Decoders with a delay
            make up for such packets later; then the time stamps leave no gap.
        num_lost: number of these packets.
    """

    stamp: Fraction | None
    frame: Any
    lost_sec: Fraction = Fraction(0)
    num_lost: int = 0


class SoundStream:
    """The sound of one range of a file, read once by :meth:`pieces`; afterwards it says what was found.

    Time 0 is that of the pictures. A file without pictures begins with its first sample, and its samples follow one
    another even where the time stamps start again, as they do in files that were joined.

    Attributes:
        rate: samples per second, 0 before the first frame.
        is_continuous: time stamps never went back, so that seeking finds the right place.
        lost: samples of the range that are silence because they could not be decoded.
        gap: samples of the range that are silence because the time stamps say so.

    Args:
        seek: False reads from the beginning of the file to ``start_sec``.
        num_samples: of the whole sound, if that is known; time stamps that were rounded are fitted to it at the end.
        num_before: good samples that were read by other means, just before the range.
    """

    def __init__(
        self,
        path: PathLike,
        start_sec: float = 0.0,
        duration_sec: float | None = None,
        seek: bool = True,
        num_samples: int | None = None,
        num_before: int = 0,
    ) -> None:
        self.path, self.start, self.duration_sec = path, exact_seconds(start_sec), duration_sec
        self._may_seek, self._num_samples = seek and self.start > _PREROLL_SEC, num_samples
        self.rate = self.channels = self.lost = self.gap = 0
        self.is_continuous, self._num_before = True, num_before
        self._position = 0  # of the next frame, in samples from time 0
        self._filled, self._end = 0, math.inf  # what was handed over ends here; what is wanted ends there
        self._num_packets = self._num_failed = self._num_decoded = 0
        self._lost_before = Fraction(0)  # seconds before the first frame
        self._lost_from: Fraction | None = None  # the time stamp at which they begin
        self._zero: Fraction | None = None  # seconds; the stamp of time 0
        self._error = ""

    def pieces(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield (channels, n) float32 and the rate, one after the other; the first one is empty.

        Raises:
            ValueError: no sound in the file, cut short, or damaged beyond what can be replaced by silence.
        """
        if self._may_seek:
            with open_media(self.path) as container:
                first = self._first_after_seek(container)
                if first is not None:
                    yield from self._read(container, first)
                    return
        with open_media(self.path) as container:  # a failed seek leaves a file anywhere, so it is opened again
            stream = audio_stream(container, self.path)
            yield from self._read(container, _decode(self.path, container, stream, self))

    # -- time line -----------------------------------------------------------------------------------------------------

    def _read(self, container: Any, decoded: Iterator[_Decoded]) -> Iterator[tuple[np.ndarray, int]]:
        stream = audio_stream(container, self.path)
        alone = not has_pictures(container)
        if self._zero is None and not alone:
            self._zero = time_origin(container)
        for item in decoded:
            if self._zero is None and item.stamp is not None:
                self._zero = item.stamp
            if item.frame is None:
                self._lose(item)
                continue
            first = self.rate == 0
            if first:
                yield self._begin(item.frame), self.rate
            self._check_form(item.frame)
            self._place(item, alone, container if first else None)
            if first:
                self._count_lost_before()
            self._check_silence()
            yield from self._silence(self._position)
            end = self._position + item.frame.samples
            if end > self._filled:
                samples = _float_samples(item.frame)[:, self._filled - self._position :]
                samples = samples[:, : int(min(self._end - self._filled, samples.shape[1]))]
                self._filled += samples.shape[1]
                self._num_decoded += samples.shape[1]
                yield samples, self.rate
            self._position = end
            if self._filled >= self._end:
                break
        else:
            if not self.rate:
                reason = f" (damaged: {self._error})" if self._error else ""
                raise UserError(f"{self.path}: has an audio stream, but no sound could be decoded from it{reason}")
            self._check_end(container, stream)
            if self._num_samples is not None and self._num_samples - self._position < _STAMP_JITTER_SEC * self.rate:
                self._position = max(self._position, self._num_samples)
            yield from self._silence(self._position)  # packets at the end that could not be decoded
        self._judge_losses()

    def _begin(self, frame: Any) -> np.ndarray:
        """Set what the first frame decides; return the empty piece."""
        self.rate, self.channels = frame.sample_rate, frame.layout.nb_channels
        self._filled = round(self.start * self.rate)
        self._first_sample = self._filled
        if self.duration_sec is not None:
            self._end = self._filled + round(self.duration_sec * self.rate)
        if self._num_samples is not None:
            self._end = min(self._end, max(self._num_samples, self._filled))
        return np.zeros((self.channels, 0), dtype=np.float32)

    def _check_form(self, frame: Any) -> None:
        channels = frame.layout.nb_channels
        if frame.sample_rate != self.rate or channels != self.channels:
            found, expected = f"{channels} x {frame.sample_rate} Hz", f"{self.channels} x {self.rate} Hz"
            seconds = self._position / self.rate
            raise UserError(f"{self.path}: sound changes from {expected} to {found} after {seconds:.2f} s; convert it")

    def _place(self, item: _Decoded, alone: bool, first_of: Any | None) -> None:
        """Move the position to where a frame belongs; ``first_of`` is the container if it is the first one."""
        if item.stamp is None or self._zero is None:  # one of several frames of a packet: it follows the one before
            if first_of is not None:
                self._position = round(self._lost_before * self.rate)
            return
        stamp = round((item.stamp - self._zero) * self.rate)
        if first_of is not None:
            late_sec = (stamp - self._filled) / self.rate
            length_sec = (first_of.duration or 0) / 1_000_000
            if late_sec > min(max(MAX_GAP_SEC, length_sec), _MAX_LATE_SEC):
                raise UserError(self._jump(self._filled / self.rate, stamp / self.rate))
            if self.start == 0 and -stamp > _MAX_LEAD_SEC * self.rate:
                log.warning("%s: its sound begins %.2f s before its pictures; that part is left out",
                            self.path, -stamp / self.rate)
            self._position = stamp
            return
        jump_sec = (stamp - self._position) / self.rate
        if abs(jump_sec) <= (_STAMP_ROUNDING_SEC if item.num_lost and jump_sec > 0 else _STAMP_JITTER_SEC):
            return
        if alone and jump_sec < 0:
            log.debug("%s: time stamps start again after %.2f s", self.path, self._position / self.rate)
            self.is_continuous = False
            self._zero += Fraction(stamp - self._position, self.rate)
        elif jump_sec > MAX_GAP_SEC or jump_sec < -_OVERLAP_SEC:
            raise UserError(self._jump(self._position / self.rate, stamp / self.rate))
        elif item.num_lost and jump_sec > 0:
            self._error = self._error or "no sound in them"
            self._num_failed += item.num_lost
            count = round(item.lost_sec * self.rate)  # exact, other than the time stamp
            is_close = abs(count - (stamp - self._position)) <= _STAMP_ROUNDING_SEC * self.rate
            self._skip(count if is_close else stamp - self._position)
        else:
            self.gap += self._in_range(stamp)
            self._position = stamp

    def _jump(self, found_sec: float, next_sec: float) -> str:
        return (
            f"{self.path}: the time stamps of its sound jump from {found_sec:.2f} s to {next_sec:.2f} s, expected no "
            f"gap beyond {MAX_GAP_SEC:g} s: damaged, or recordings that were joined; cut it there or convert it"
        )

    def _silence(self, position: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield zeros up to ``position``, but no more than was asked for."""
        end = int(min(position, self._end))
        while self._filled < end:
            count = min(end - self._filled, _SILENCE_BLOCK)
            self._filled += count
            yield np.zeros((self.channels, count), dtype=np.float32), self.rate

    # -- what is missing -----------------------------------------------------------------------------------------------

    def _lose(self, item: _Decoded) -> None:
        """Leave room for a packet that could not be decoded."""
        if self.rate == 0:
            self._lost_before += item.lost_sec
            self._lost_from = item.stamp if self._lost_from is None else self._lost_from
            return
        if item.num_lost:
            self._error = self._error or "no sound in them"
            self._num_failed += item.num_lost
        self._skip(round(item.lost_sec * self.rate))

    def _count_lost_before(self) -> None:
        """Count what could not be decoded before the first frame, whose place is known now."""
        start = self._position - round(self._lost_before * self.rate)
        if self._lost_from is not None and self._zero is not None:
            start = round((self._lost_from - self._zero) * self.rate)
        self.lost += max(0, int(min(self._position, self._end)) - max(start, self._first_sample))

    def _skip(self, count: int) -> None:
        """Leave out samples that could not be decoded."""
        self.lost += self._in_range(self._position + count)
        self._position += count

    def _in_range(self, end: int) -> int:
        """Return the number of samples from the position to ``end`` were asked for."""
        return max(0, int(min(end, self._end)) - max(self._position, self._first_sample))

    def _check_silence(self) -> None:
        """Raise if most of the sound would be silence: many small jumps could fill any memory."""
        if self.gap + self.lost > max(self._num_decoded, _FREE_SILENCE_SEC * self.rate):
            raise UserError(
                f"{self.path}: damaged, of its first {self._position / self.rate:.2f} s "
                f"{(self.gap + self.lost) / self.rate:.2f} s are missing; copy it again or convert it"
            )

    def _judge_losses(self) -> None:
        """Raise if too much could not be decoded; otherwise say how much."""
        if self.gap:
            log.warning("%s: its time stamps leave gaps of %.2f s, which are filled with silence",
                        self.path, self.gap / self.rate)
        if self.lost == 0:
            if self._num_failed and self._first_sample == 0:
                log.warning("%s: %d of %s of its sound cannot be decoded (%s), nothing else is missing",
                            self.path, self._num_failed, counted(self._num_packets, "packet"), self._error)
            return
        share = self.lost / max(1, self._num_before + self._filled - self._first_sample)
        what = (f"{self.lost / self.rate:.2f} s ({share:.0%}) of its sound cannot be decoded ({self._num_failed} of "
                f"{counted(self._num_packets, 'packet')}: {self._error})")
        if share > MAX_LOST_SHARE:
            raise UserError(f"{self.path}: damaged, {what}, expected at most {MAX_LOST_SHARE:.0%}; copy it again")
        log.warning("%s: %s; silence replaces it", self.path, what)

    def _check_end(self, container: Any, stream: Any) -> None:
        """Raise if a file whose last packet was read holds less than it promises."""
        reached_sec = self._position / self.rate
        if container.format.name == "mp3" and is_length_of_mp3_guessed(self.path, stream, self.rate):
            return
        check_last_packet(self.path, container, self._last_packet, reached_sec)
        if container.format.name == "ogg":
            check_ogg_end(self.path, reached_sec)
        declared_sec = declared_end(container, stream)
        if declared_sec is None:
            warn_of_uncertain_end(self.path, container, reached_sec)
        else:
            declared_sec += float(time_origin(container) - (self._zero or 0))
            if reached_sec < declared_sec - TRUNCATION_SEC:
                raise cut_error(self.path, reached_sec, declared_sec)

    # -- decoding ------------------------------------------------------------------------------------------------------

    _last_packet: bytes | None = None  # the beginning of it, and its size
    _first_sample = 0

    def count(self, packet: Any) -> None:
        """Take note of a packet of the file."""
        self._num_packets += 1
        if packet.stream.container.format.name == "aac":
            self._last_packet = bytes(packet)

    def count_failed(self, error: Exception) -> None:
        """Take note of a packet that cannot be decoded."""
        self._num_failed += 1
        self._error = getattr(error, "strerror", None) or str(error)

    def _first_after_seek(self, container: Any) -> Iterator[_Decoded] | None:
        """Move to before the start; return what is decoded there, None if the file has to be read from its start."""
        stream = audio_stream(container, self.path)
        zero = time_origin(container) if has_pictures(container) else _first_stamp(self.path)
        if zero is None or not seek_before(container, stream, zero + self.start - _PREROLL_SEC):
            return None
        decoded = _decode(self.path, container, stream, self)
        for item in decoded:
            if item.frame is None:
                continue  # the seek ended in the middle of something
            # Some containers only guess where a time stamp lies.
            if item.stamp is None or item.stamp > zero + self.start - _PREROLL_SEC:
                break
            self._zero, self._num_failed, self._num_packets = zero, 0, 1
            return _again(item, decoded)
        self._num_failed = self._num_packets = 0
        return None


def _again(first: _Decoded, rest: Iterator[_Decoded]) -> Iterator[_Decoded]:
    yield first
    yield from rest


def _first_stamp(path: PathLike) -> Fraction | None:
    """Return the time stamp of the first sound in a file, None if it has none."""
    with open_media(path) as container:
        for item in _decode(path, container, audio_stream(container, path), None):
            return item.stamp
    return None


def _decode(path: PathLike, container: Any, stream: Any, counter: SoundStream | None) -> Iterator[_Decoded]:
    """Yield what the packets of ``stream`` decode to, from where the container stands to its end.

    Raises:
        ValueError: the file cannot be read on.
    """
    import av.error

    if stream.codec_context.name == "flac":  # FFmpeg would hand out noise; its frames have checksums
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    length = idle_sec = Fraction(0)  # of the last frame: what a packet without a duration is taken to hold
    num_idle = 0
    try:
        for packet in _packets(container, stream, counter):
            lost_sec = packet.duration * packet.time_base if packet.duration else length
            if abs(lost_sec - length) < _STAMP_ROUNDING_SEC or lost_sec > _LONGEST_PACKET_SEC:
                lost_sec = length
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                if counter is not None:
                    counter.count_failed(error)
                yield _Decoded(_seconds(packet), None, lost_sec)
                continue
            if not frames and not packet.is_discard and not packet.has_sidedata("skip_samples"):
                idle_sec, num_idle = idle_sec + lost_sec, num_idle + 1
            for frame in frames:
                stamp = _seconds(frame)
                if stamp is None and not length:  # WMA: the first frame has none, though its packet has one
                    stamp = _seconds(packet)
                length = Fraction(frame.samples, frame.sample_rate)
                yield _Decoded(stamp, frame, idle_sec, num_idle)
                idle_sec, num_idle = Fraction(0), 0
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: damaged, cannot be read to its end ({error.strerror})") from error
    try:
        for frame in stream.codec_context.decode(None):
            yield _Decoded(_seconds(frame), frame, idle_sec, num_idle)
            idle_sec, num_idle = Fraction(0), 0
    except av.error.FFmpegError:  # nothing was left, or nothing could be decoded at all
        pass
    if num_idle and length:
        yield _Decoded(None, None, idle_sec, num_idle)


def _packets(container: Any, stream: Any, counter: SoundStream | None) -> Iterator[Any]:
    """Yield the packets of ``stream`` that hold anything, from where the container stands to its end."""
    import av.error

    num_bad = 0  # one after the other
    while num_bad < _MAX_BAD_PACKETS:
        try:
            for packet in container.demux(stream):
                if not packet.size:  # Ogg has empty ones; the last one only flushes the decoder
                    continue
                num_bad = 0
                if counter is not None:
                    counter.count(packet)
                yield packet
            return
        except av.error.InvalidDataError as error:  # of this packet; the next one may be good
            num_bad += 1
            if num_bad == _MAX_BAD_PACKETS:
                raise
            if counter is not None:
                counter.count_failed(error)


def _seconds(item: Any) -> Fraction | None:
    return None if item.pts is None or item.time_base is None else item.pts * item.time_base


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
