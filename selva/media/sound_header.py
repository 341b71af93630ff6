"""Lengths that headers and ends of sound files promise, where no library says it; so cut files are found."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from selva.media.container import PathLike
from selva.utils.errors import UserError

log = logging.getLogger(__name__)

ROUNDING_SEC = 0.05  # by which headers are wrong in files that are whole
_XING_ERROR_SEC = 0.5  # encoder delay and padding
_OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the largest page
_ADTS_HEADER = 7  # bytes
# Sizes that stand for "unknown" in files written to a pipe: 0xFFFFFFFF (FFmpeg), 0x7FFFF000 (SoX), less some header.
_UNKNOWN_SIZES = (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_UNKNOWN_SLACK = 8192
_UNCOUNTED_BYTES = 16_384  # after the last chunk of a file, that are too many for some program's own remarks
_CHUNK_LINE = re.compile(r"^\s*(data|SSND|Data Size|BODY)\s*:\s*(\d+)(?: \(should be (\d+)\))?\s*$", re.MULTILINE)
_FORM_LINE = re.compile(r"^\s*(riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)\s*$", re.MULTILINE)


def cut_error(path: PathLike, reached_sec: float, promised_sec: float | None = None) -> UserError:
    """Return the error about a file that ends too early."""
    promise = "" if promised_sec is None else f" of {promised_sec:.2f} s"
    return UserError(f"{path}: ends after {reached_sec:.2f} s{promise}: cut short or damaged, copy it again")


def promised_frames(file: Any) -> int:
    """Return the samples per channel that the header of an open :class:`soundfile.SoundFile` promises.

    libsndfile takes what is there, and says only in its log that the header of a WAV or an AIFF promised more.
    """
    pattern = _FORM_LINE if file.format in ("W64", "RF64") else _CHUNK_LINE
    for found in pattern.finditer(file.extra_info):
        if found[3] is None:
            continue
        promised, present = int(found[2]), int(found[3])
        is_unknown = any(0 <= size - promised <= _UNKNOWN_SLACK for size in _UNKNOWN_SIZES)
        if is_unknown or promised <= present or present <= 0:
            continue
        frames = round(file.frames * (promised / present))
        if frames - file.frames > ROUNDING_SEC * file.samplerate:
            return frames
    return file.frames


@lru_cache(maxsize=4096)  # said once per file, however often it is opened
def warn_of_uncounted(path: str) -> None:
    """Say if a WAV or an AIFF goes on after the sound that its header counts: that part is never read.

    So do files of recorders that lost power, and files that were joined byte by byte.
    """
    uncounted, counted = _bytes_after_sound(path)
    if uncounted > _UNCOUNTED_BYTES:
        log.warning("%s: goes on after the sound that its header counts, by %.0f %% of it, which is not read; its "
                    "header was not finished, or several files were joined: repair it", path, 100 * uncounted / counted)


def _bytes_after_sound(path: str) -> tuple[int, int]:
    """Return the bytes after the sound of a WAV or an AIFF that are in no chunk, and those of its sound."""
    with Path(path).open("rb") as file:
        size, at, num_sound = file.seek(0, 2), 12, 0
        file.seek(0)
        form = file.read(4)
        while form in (b"RIFF", b"FORM") and at + 8 <= size:
            file.seek(at)
            name, length = file.read(4), int.from_bytes(file.read(4), "little" if form == b"RIFF" else "big")
            is_chunk = all(32 <= letter < 127 for letter in name) and name not in (b"RIFF", b"FORM")
            if not is_chunk or at + 8 + length > size:
                file.seek(at)
                is_padding = not any(file.read(4096))
                return (0 if is_padding or not num_sound else size - at), num_sound
            if name in (b"data", b"SSND"):
                num_sound += length
            at += 8 + length + length % 2
    return 0, num_sound


def is_length_of_mp3_guessed(path: PathLike, stream: Any, rate: int) -> bool:
    """Return True if FFmpeg had to guess the length of an MP3 by its bit rate, as no header counts its frames.

    So it does where several MP3s were joined: the header counts only those of the first.
    """
    num_frames = _xing_frames(path)
    if num_frames is None or stream.duration is None:
        return True
    counted_sec = num_frames * (1152 if rate >= 32_000 else 576) / rate
    return abs(counted_sec - float(stream.duration * stream.time_base)) > _XING_ERROR_SEC


def _xing_frames(path: PathLike) -> int | None:
    """Return the number of frames in the Xing, Info or VBRI header of an MP3; None if it has none."""
    with Path(path).open("rb") as file:
        head = file.read(10)
        start = 0
        while head[:3] == b"ID3" and len(head) == 10:  # tags before the sound; their sizes have 7 bits per byte
            start += 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
            file.seek(start)
            head = file.read(10)
        file.seek(start)
        data = file.read(4096)
    for name, offset in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        at = data.find(name)
        if at < 0 or len(data) < at + offset + 4:
            continue
        if name != b"VBRI" and not data[at + 7] & 1:
            continue  # it does not count them
        return int.from_bytes(data[at + offset : at + offset + 4], "big") or None
    return None


def check_last_packet(path: PathLike, container: Any, packet: bytes | None, reached_sec: float) -> None:
    """Raise if an ADTS file (.aac) ends within its last frame, whose header says how long it is."""
    if container.format.name != "aac" or packet is None:
        return
    if len(packet) < _ADTS_HEADER or packet[0] != 0xFF:
        return
    if (packet[3] & 3) << 11 | packet[4] << 3 | packet[5] >> 5 > len(packet):
        raise cut_error(path, reached_sec)


def has_several_ogg_streams(path: PathLike) -> bool:
    """Return True if an Ogg file holds streams one after the other, or beside each other as videos do.

    libsndfile reads the first, if that is a sound, and does not know when it begins beside pictures.
    """
    began = False
    with Path(path).open("rb") as file:
        while True:
            header = file.read(27)
            if len(header) < 27 or header[:4] != b"OggS":
                return False
            begins = bool(header[5] & 2)
            if begins and began:
                return True
            began |= begins
            file.seek(sum(file.read(header[26])), 1)


def check_ogg_end(path: PathLike, reached_sec: float) -> None:
    """Raise if an Ogg file ends within a page; warn if its last page is not marked as such."""
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 2 * _OGG_PAGE))
        data = file.read()
    at = data.rfind(b"OggS")
    if at < 0:
        return
    page = data[at:]
    num_segments = page[26] if len(page) > 26 else 255
    body = 27 + num_segments
    if len(page) < body or len(page) < body + sum(page[27:body]):
        raise cut_error(path, reached_sec)
    if not page[5] & 4:
        log.warning("%s: its last page is not marked as the end; it may have been cut short after %.2f s",
                    path, reached_sec)
