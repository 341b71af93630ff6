"""Video files of pictures and sound that a program made."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

from selva.media.container import PathLike
from selva.utils.errors import UserError
from selva.utils.files import atomic_path

_SUFFIXES = (".mp4", ".mov", ".mkv")
# Without the macroblock tree, whose results differ from run to run (5 files of 24 runs on the same pictures).
_X264_OPTIONS = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}


def write_video(
    path: PathLike, pictures: Iterable[np.ndarray], fps: int, sound: np.ndarray, rate: int, lossless: bool = False
) -> None:
    """Write H.264 pictures with AAC sound, or with FLAC sound of 16 bits where ``lossless``.

    The same pictures and sound make the same file, byte for byte.

    Args:
        path: .mp4, .mov or .mkv; replaced whole, or not at all.
        pictures: (H, W, 3) uint8 RGB each, all of one size, both sides even.
        sound: (samples,) mono, full scale 1.0; begins with the first picture.

    Raises:
        ValueError: another suffix, no pictures, sides that are odd, or sound that is empty or not finite.
    """
    import av

    path, samples = Path(path), np.asarray(sound, dtype=np.float32)
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{path}: cannot write {path.suffix!r}, expected one of {', '.join(_SUFFIXES)}")
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise UserError(f"{path}: the sound is {samples.shape}, expected (samples,), not empty, all values finite")
    pictures = iter(pictures)
    first = next(pictures, None)
    if first is None or first.shape[0] % 2 or first.shape[1] % 2:
        found = "no pictures" if first is None else f"pictures of {first.shape[1]} x {first.shape[0]}"
        raise UserError(f"{path}: got {found}, expected at least one, with even sides")
    with atomic_path(path) as temporary, av.open(str(temporary), "w") as container:
        video = container.add_stream("libx264", rate=fps, options=_X264_OPTIONS)
        video.height, video.width, video.pix_fmt = first.shape[0], first.shape[1], "yuv420p"
        audio = container.add_stream("flac" if lossless else "aac", rate=rate, layout="mono")
        if not lossless:
            audio.bit_rate = 128_000
        for packet in audio.encode(_sound_frame(samples, rate, audio.format.name)):
            container.mux(packet)
        container.mux(audio.encode(None))
        for picture in (first, *pictures):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(video.encode(None))


def _sound_frame(samples: np.ndarray, rate: int, sample_format: str):
    """Return one PyAV frame of the whole sound in the format that the encoder takes, fltp or s16."""
    import av

    if sample_format == "s16":
        samples = np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(samples[None], format=sample_format, layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    return frame
