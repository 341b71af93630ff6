"""Masks: the part of the pictures that the image encoders see; the rest becomes neutral grey.

    .png .jpg ...   one picture for the whole clip
    a video         each picture takes the frame of the mask that is nearest to it in time; both files start at time 0
    .npy            (H, W) for the whole clip, or (T, H, W) with one mask for each frame of the video file

White, or 1, keeps; black, or 0, removes; values between blend. Transparent pixels of an image remove. A mask lies on
the picture as it is shown, i.e. turned upright, and is resized to it. Arrays are bool, integers (0 ... 1 or 0 ... 255)
or floats (0 ... 1).

The grey is 0.5, half of full scale, as the published extractor fills (one of its tooltips says zero): in 8 bits 128,
which 127.5 rounds to. The encoders see +-1 around zero, so that is "nothing".
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from selva.features import ARRAY_ERRORS
from selva.media.container import (
    PathLike,
    check_file,
    decode_frames,
    open_media,
    packet_times,
    video_stream,
)
from selva.media.mask_settings import IMAGE_SUFFIXES, MaskSettings
from selva.media.pictures import frame_duration, steady, upright
from selva.utils.errors import UserError
from selva.utils.text import counted

log = logging.getLogger(__name__)


_GREY = 127.5
_MISSING_SEC = 0.125  # a mask may lack its last frames by this much, as the pictures themselves may
_ASPECT_TOLERANCE = 0.02


class Masker:
    """Mask for the pictures of one clip; a context manager.

    Args:
        settings: the mask. video_path: the video that it belongs to, for messages. source: the mask at every time.
        stack: what to close at the end.
    """

    def __init__(self, settings: MaskSettings, video_path: PathLike, source: _Source, stack: ExitStack) -> None:
        self.settings, self.video_path = settings, video_path
        self._source, self._stack = source, stack
        self._last: np.ndarray | None = None  # the mask that the weight was made of
        self._weight: Tensor | None = None
        self._brightest, self._stretch_said = 0.0, False

    @classmethod
    def of_file(cls, settings: MaskSettings, video_path: PathLike, start: Fraction) -> Masker:
        """Return the masker of a mask file, for a clip that begins after ``start`` exact seconds.

        Raises:
            FileNotFoundError: no such mask.
            ValueError: not a mask, or one that does not fit the video.
        """
        stack = ExitStack()
        return cls(settings, video_path, _open_source(settings.path, video_path, start, stack), stack)

    @classmethod
    def of_array(
        cls, settings: MaskSettings, array: np.ndarray, video_path: PathLike, times: list[Fraction]
    ) -> Masker:
        """Return the masker of an array (h, w), or (T, h, w) with one mask for each picture at ``times``.

        Raises:
            ValueError: not a mask, or one that does not fit the pictures.
        """
        return cls(settings, video_path, _array_source(settings.path, array, video_path, lambda: times), ExitStack())

    def __enter__(self) -> Masker:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.close()
        if kind is None and self._weight is not None and self._brightest == 0:
            log.warning("%s: the mask is black in the whole clip, so the encoders see only grey of %s",
                        self.settings.path, self.video_path)

    def apply(self, picture: Tensor, time: Fraction) -> Tensor:
        """Return ``picture`` (3, H, W) uint8, shown ``time`` seconds after the start of the clip, with its mask."""
        keep, size = self._source.at(time), (picture.shape[1], picture.shape[2])
        if self._weight is None or keep is not self._last or self._weight.shape[1:] != size:
            self._last = keep
            self._brightest = max(self._brightest, float(keep.max()))
            fitted = self._fitted(torch.from_numpy(np.ascontiguousarray(keep)), *size)
            weight = 1 - self.settings.strength * (1 - fitted)  # (H, W)
            # Laid out like the decoded pictures, channels last: then the blend is a single loop, twice as fast.
            self._weight = weight[..., None].expand(*size, 3).contiguous().permute(2, 0, 1)  # (3, H, W)
        faded = picture.to(torch.float32).sub_(_GREY).mul_(self._weight).add_(_GREY)
        return faded.round_().to(torch.uint8)  # (3, H, W)

    def _fitted(self, keep: Tensor, height: int, width: int) -> Tensor:
        if keep.shape == (height, width):
            return keep
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        stretch = keep.shape[1] * height / (keep.shape[0] * width)
        if abs(stretch - 1) > _ASPECT_TOLERANCE and not self._stretch_said:
            self._stretch_said = True
            log.warning("%s: is %d x %d, but the picture of %s is shown as %d x %d; the mask is stretched",
                        self.settings.path, keep.shape[1], keep.shape[0], self.video_path, width, height)
        resized = functional.resize(keep[None], [height, width], InterpolationMode.BILINEAR, antialias=True)
        return resized[0].clamp(0, 1)  # (H, W)


# -- sources of masks -------------------------------------------------------------------------------------------------


class _Source(Protocol):
    def at(self, time: Fraction) -> np.ndarray:
        """Return the (h, w) float32 mask, 0 ... 1, of the picture at ``time`` after the start; times ascend."""
        ...


def _open_source(path: Path, video_path: PathLike, start: Fraction, stack: ExitStack) -> _Source:
    check_file(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        return _open_array(path, video_path, start)
    if suffix in IMAGE_SUFFIXES:
        return _Static(_read_image(path))
    return _FromVideo(path, start, stack)


class _Static:
    def __init__(self, keep: np.ndarray) -> None:
        self.keep = keep

    def at(self, time: Fraction) -> np.ndarray:
        return self.keep


def _read_image(path: PathLike) -> np.ndarray:
    with open_media(path) as container:
        for _, frame in decode_frames(path, container, video_stream(container, path), Fraction(0)):
            return _brightness(frame)
    raise UserError(f"{path}: has no picture in it")


def _brightness(frame: Any) -> np.ndarray:
    """Return a decoded frame as (h, w) float32 between 0 and 1, black where it is transparent."""
    transparent = frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)
    picture = upright(frame.to_ndarray(format="rgba" if transparent else "rgb24"), frame)  # (h, w, 3 or 4)
    grey = picture[..., :3].mean(axis=2, dtype=np.float32) / 255
    return grey * (picture[..., 3].astype(np.float32) / 255) if transparent else grey


class _FromVideo:
    """The frame of a mask video that is nearest in time, decoded as it is needed."""

    def __init__(self, path: PathLike, start: Fraction, stack: ExitStack) -> None:
        self.path, self.start = path, start
        container = stack.enter_context(open_media(path))
        self.stream = video_stream(container, path)
        self._frames = steady(path, decode_frames(path, container, self.stream, start), start)
        self._next = next(self._frames, None)
        if self._next is None:
            raise UserError(f"{path}: the mask has no frames at {float(start):g} s")
        self._current = self._next
        self._shown: tuple[Fraction, np.ndarray] | None = None  # the last one that was converted

    def at(self, time: Fraction) -> np.ndarray:
        while self._next is not None and self._next[0] <= time:
            self._current, self._next = self._next, next(self._frames, None)
        (begin, frame), following = self._current, self._next
        if following is None:
            end = float(begin) + frame_duration(frame, self.stream)
            if float(time) > end + _MISSING_SEC:
                raise UserError(
                    f"{self.path}: the mask ends after {end + float(self.start):.2f} s, but there are pictures at "
                    f"{float(time + self.start):.2f} s; use a mask as long as the video"
                )
        elif following[0] - time < time - begin:
            begin, frame = following
        if self._shown is None or self._shown[0] != begin:
            self._shown = (begin, _brightness(frame))
        return self._shown[1]


# -- arrays -----------------------------------------------------------------------------------------------------------


def _open_array(path: PathLike, video_path: PathLike, start: Fraction) -> _Source:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ARRAY_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "pickle" in reason or "Python objects" in reason:  # NumPy's own words advise to load the file unsafely
            reason = "it holds Python objects or is no NumPy array, and pickles are never loaded"
        raise UserError(f"{path}: cannot be read as a mask ({reason})") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: the mask is several arrays, expected one")

    def times() -> list[Fraction]:
        with open_media(video_path) as container:
            found = packet_times(video_path, container, video_stream(container, video_path))
        return [time - start for time in found]

    return _array_source(path, array, video_path, times)


def _array_source(
    path: PathLike, array: np.ndarray, video_path: PathLike, times_of: Callable[[], list[Fraction]]
) -> _Source:
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(
            f"{path}: the mask is {array.shape}, expected (H, W), or (T, H, W) with one for each video frame"
        )
    scale = _array_scale(path, array)
    if array.ndim == 2 or len(array) == 1:
        return _Static(_scaled(array if array.ndim == 2 else array[0], scale))
    times = times_of()
    if len(times) != len(array):
        raise UserError(
            f"{path}: the mask is {array.shape}, {counted(len(array), 'frame')}, but {video_path} has {len(times)}; "
            "expected one for each frame of the file, or a single (H, W)"
        )
    return _FromArray(array, scale, times)


def _array_scale(path: PathLike, array: np.ndarray) -> float:
    """Return the divisor that brings the array to 0 ... 1, after checking every value of it."""
    if array.dtype.kind not in "buif":
        raise UserError(f"{path}: the mask is {array.dtype}, expected bool, integers or floats")
    frames = array if array.ndim == 3 else array[None]
    lowest, highest = 0.0, 0.0
    for frame in frames:  # one by one: the array may be larger than the memory
        lowest, highest = min(lowest, float(frame.min())), max(highest, float(frame.max()))
        if not np.isfinite([frame.min(), frame.max()]).all():  # NaN comes out of both
            raise UserError(f"{path}: the mask has values that are not finite (NaN or infinite)")
    limit = 255 if array.dtype.kind in "iu" else 1
    if lowest < 0 or highest > limit:
        expected = "0 to 1, or 0 to 255" if limit == 255 else "0 to 1"
        raise UserError(f"{path}: the mask has values from {lowest:g} to {highest:g}, expected {expected}")
    return 255.0 if highest > 1 else 1.0


def _scaled(frame: np.ndarray, scale: float) -> np.ndarray:
    return np.asarray(frame, dtype=np.float32) / np.float32(scale)


class _FromArray:
    """One mask for each frame of the video file."""

    def __init__(self, array: np.ndarray, scale: float, times: list[Fraction]) -> None:
        self.array, self.scale, self.times = array, scale, times

    def at(self, time: Fraction) -> np.ndarray:
        after = bisect.bisect_left(self.times, time)
        near = [index for index in (after - 1, after) if 0 <= index < len(self.times)]
        return _scaled(self.array[min(near, key=lambda index: abs(self.times[index] - time))], self.scale)
