"""Any sound, piece by piece, and how long it is: the one place that chooses who reads a file.

libsndfile reads what counts its samples (WAV, AIFF, FLAC, Ogg of one stream ...), FFmpeg everything else. The length is
the number of samples that reading gives: of the header where it can be trusted, else counted by decoding, once a file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selva.media.container import PathLike, check_file, has_pictures, open_media
from selva.media.sound_header import (
    ROUNDING_SEC,
    check_ogg_end,
    cut_error,
    has_several_ogg_streams,
    promised_frames,
    warn_of_uncounted,
)
from selva.media.sound_stream import SoundStream
from selva.utils.errors import UserError
from selva.utils.files import sound_path

log = logging.getLogger(__name__)

_BLOCK = 1 << 19  # samples that libsndfile reads at once; no more is allocated than the file holds
_MOST_FRAMES = 1 << 48  # more is libsndfile's way of saying that it does not know


class SoundLength(NamedTuple):
    """Length of a sound.

    Attributes:
        num_samples: per channel, from time 0.
        rate: in Hz.
        can_seek: a place in it can be found by its time stamps.
    """

    num_samples: int
    rate: int
    can_seek: bool


def sound_pieces(
    path: PathLike, start_sec: float = 0.0, duration_sec: float | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (channels, n) float32, full scale 1.0, and the rate, in pieces of any length; the first one is empty.

    Args:
        duration_sec: seconds to read, None for all. Less is read where the sound ends earlier.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no sound in it, cut short, or damaged.
    """
    file = _open_counted(path)
    if file is not None:
        with file:
            yield from _file_pieces(path, file, start_sec, duration_sec)
        return
    seek, num_samples = True, None
    if start_sec > 0 and not _has_pictures(path):
        try:
            num_samples, _, seek = sound_length(path)
        except ValueError:  # what is wrong may lie outside of the range
            seek = False
    yield from SoundStream(path, start_sec, duration_sec, seek, num_samples).pieces()


def sound_length(path: PathLike) -> SoundLength:
    """Return the length that reading all of the sound in a file gives.

    Raises:
        FileNotFoundError, ValueError: as :func:`sound_pieces`.
    """
    check_file(path)
    status = os.stat(path)
    return _length(os.fspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _length(path: str, *_status: int) -> SoundLength:
    import soundfile

    file = _open_counted(path)
    if file is None:
        stream = SoundStream(path)
        return SoundLength(sum(samples.shape[1] for samples, _ in stream.pieces()), stream.rate, stream.is_continuous)
    with file:
        if promised_frames(file) == file.frames and file.format != "OGG":
            try:
                file.seek(file.frames - 1)
                if len(file.read(1, dtype="float32", always_2d=True)):
                    return SoundLength(file.frames, file.samplerate, True)
            except soundfile.LibsndfileError:
                pass  # reading all says what is wrong
        rate = file.samplerate
    return SoundLength(sum(samples.shape[1] for samples, _ in sound_pieces(path)), rate, True)


def _open_counted(path: PathLike) -> Any | None:
    """Return an open :class:`soundfile.SoundFile` whose header counts its samples, None if FFmpeg has to read it."""
    import soundfile

    check_file(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".raw":  # soundfile asks for rate and channels
        raise UserError(f"{path}: raw samples do not say their rate, channels and format; convert it to .wav")
    warn_of_uncounted(os.fspath(path))
    if suffix == ".mp3":  # libsndfile guesses its length, and complains on stderr
        return None
    try:
        file = soundfile.SoundFile(sound_path(path))
    except soundfile.LibsndfileError:
        return None
    if file.format == "RAW":  # libsndfile takes the suffix for it (.vox, .gsm)
        file.close()
        raise UserError(f"{path}: has no header that says its rate, channels and format; convert it to .wav")
    is_guessed = file.format == "MP3" or "MPEG" in file.subtype  # by the bit rate
    if is_guessed or not 0 < file.frames < _MOST_FRAMES or (file.format == "OGG" and has_several_ogg_streams(path)):
        file.close()
        return None
    return file


def _file_pieces(
    path: PathLike, file: Any, start_sec: float, duration_sec: float | None
) -> Iterator[tuple[np.ndarray, int]]:
    import soundfile

    rate, promised = file.samplerate, promised_frames(file)
    start = min(round(start_sec * rate), promised)
    wanted = promised - start
    if duration_sec is not None:
        wanted = min(wanted, round(duration_sec * rate))
    yield np.zeros((file.channels, 0), dtype=np.float32), rate
    found = 0
    try:
        file.seek(min(start, file.frames))
        while found < wanted:
            samples = file.read(min(_BLOCK, wanted - found), dtype="float32", always_2d=True)  # (samples, channels)
            if not len(samples):
                break
            found += len(samples)
            yield np.ascontiguousarray(samples.T), rate
    except soundfile.LibsndfileError as error:
        if file.format != "FLAC":
            raise UserError(f"{path}: damaged, its sound cannot be decoded ({error})") from error
        # libsndfile gives up at the first damaged frame, FFmpeg goes on after it.
        good = start + found
        rest = SoundStream(path, (start + found) / rate, (wanted - found) / rate, num_before=found)
        for samples, _ in rest.pieces():
            found += samples.shape[1]
            yield samples, rate
        if found == wanted:
            log.warning("%s: damaged after %.2f s (%s)", path, good / rate, str(error).rstrip("."))
    reached = min(start, file.frames) + found
    if file.format == "OGG" and start + wanted == promised:
        check_ogg_end(path, reached / rate)
    allowed = ROUNDING_SEC * rate if file.format == "OGG" else 0  # Ogg files may promise a few samples too many
    if found < wanted - allowed:
        raise cut_error(path, reached / rate, promised / rate)


def _has_pictures(path: PathLike) -> bool:
    with open_media(path) as container:
        return has_pictures(container)
