"""The pictures of a video, sampled at the two frame rates of the image encoders and resized for them."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selva.media.container import (
    PathLike,
    check_not_truncated,
    check_range,
    decode_frames,
    exact_seconds,
    open_media,
    video_stream,
)
from selva.media.mask_settings import MaskSettings
from selva.media.masks import Masker
from selva.media.pictures import frame_duration, steady, upright
from selva.sequence import CLIP_FPS, DEFAULT_DURATION_SEC, SYNC_FPS, SYNC_SEGMENT_FRAMES
from selva.utils.errors import UserError

log = logging.getLogger(__name__)

SELVA_FILL_SEC = 0.125  # SelVA's training data repeats the last frame for at most 1 CLIP and 3 sync frames


# -- frame selection --------------------------------------------------------------------------------------------------


class _FrameClock:
    """Counter of how often each frame, in presentation order, is sampled at ``fps`` frames per second."""

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
        raise UserError(f"frame rate is {fps}, expected a positive number")
    clock = _FrameClock(fps)
    selected: list[int] = []
    for index, time in enumerate(times):
        if not math.isfinite(time):
            raise UserError(f"time of frame {index} is {time}, expected a finite number of seconds")
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


# -- reading pictures -------------------------------------------------------------------------------------------------


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
    mask: MaskSettings | None = None,
) -> VideoFrames:
    """Return the pictures of ``duration_sec`` seconds from ``start_sec``, sampled at 8 and at 25 frames per second.

    The frames are those of :func:`select_frames` with times relative to ``start_sec``, turned and mirrored as the file
    says. Frames are resized as they are decoded, so memory does not depend on the size of the video.

    A video that ends early makes a shorter clip: its duration becomes what the sampled frames cover (191 frames at
    23.976 fps give 7.96 s). So does one whose last frame is held for long, with a warning. A file that ends before the
    end in its own header is damaged and an error, as is one whose time stamps jump.

    Args:
        fill_sec: if not more than this is missing between the last samples and the end (of the request, or of a
            shorter video), repeat the last frame, so that 50 frames at 25 fps are 2 s and not 1.96. 0.0 is what the
            published inference does; ``SELVA_FILL_SEC`` is what SelVA's training data do.
        mask: what to keep of the pictures; the rest becomes grey before they are resized. See
            :mod:`selva.media.masks`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video, damaged, nothing to see in the range, less than 0.64 s (one sync segment), or a mask
            that does not fit.
    """
    check_range(path, start_sec, duration_sec)
    sampler, wanted_sec = FrameSampler(duration_sec, clip_size, sync_size, sync_crop), duration_sec
    with ExitStack() as stack:
        container = stack.enter_context(open_media(path))
        if mask is not None:
            sampler.masker = stack.enter_context(Masker.of_file(mask, path, exact_seconds(start_sec)))
        stream = video_stream(container, path)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = torch.get_num_threads()  # one in a worker that reads ahead, else all
        start, end_sec = exact_seconds(start_sec), 0.0
        for exact_time, frame in steady(path, decode_frames(path, container, stream, start), start):
            end_sec = float(exact_time) + frame_duration(frame, stream)
            if not sampler.add(exact_time, functools.partial(_upright_rgb, frame)):
                break
        else:
            check_not_truncated(path, container, stream, start_sec, duration_sec, end_sec)
            if fill_sec:  # not beyond the end of the video itself
                wanted_sec = max(0.0, min(duration_sec, end_sec))
        fps = float(stream.average_rate or 0)
    return sampler.frames(path, wanted_sec, start_sec, end_sec, fill_sec, fps)


def sample_pictures(
    picture: Callable[[int], Tensor],
    num_pictures: int,
    fps: float,
    duration_sec: float = DEFAULT_DURATION_SEC,
    clip_size: int = 384,
    sync_size: int = 224,
    sync_crop: bool = False,
    fill_sec: float = 0.0,
    mask: MaskSettings | None = None,
    keep: np.ndarray | None = None,
) -> VideoFrames:
    """Return the frames of pictures that a program holds; those of :func:`read_video` for a file of the same pictures.

    Args:
        picture: index -> (3, H, W) uint8 RGB; called for those that are sampled only.
        num_pictures, fps: there are so many, at so many per second; a rate like 29.97 means 30000/1001.
        duration_sec, clip_size, sync_size, sync_crop, fill_sec: as in :func:`read_video`.
        mask, keep: how to use a mask, its path a name for messages; and the mask itself, (h, w), or
            (num_pictures, h, w) with one for each picture.

    Raises:
        ValueError: no pictures, a rate that is none, less than 0.64 s, or a mask that does not fit.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"frame rate of the pictures is {fps}, expected a positive number of frames per second")
    check_range("pictures", 0.0, duration_sec)
    interval = 1 / exact_rate(fps)
    sampler, wanted_sec = FrameSampler(duration_sec, clip_size, sync_size, sync_crop), duration_sec
    end_sec = float((num_pictures - 1) * interval) + float(interval)  # rounded as it is for a file
    with ExitStack() as stack:
        if mask is not None and keep is not None:
            times = [index * interval for index in range(num_pictures)]
            sampler.masker = stack.enter_context(Masker.of_array(mask, keep, "pictures", times))
        for index in range(num_pictures):
            if not sampler.add(index * interval, functools.partial(picture, index)):
                break
        else:
            if fill_sec:
                wanted_sec = min(duration_sec, end_sec)
    return sampler.frames("pictures", wanted_sec, 0.0, end_sec, fill_sec, fps)


def exact_rate(fps: float) -> Fraction:
    """Return a frame rate as video standards define it, 30000/1001 for 29.97; another one as it is written."""
    for base in (24, 30, 48, 60, 120):
        if abs(fps - base * 1000 / 1001) < 0.005:
            return Fraction(base * 1000, 1001)
    return exact_seconds(fps)


class FrameSampler:
    """Pictures of a clip at the two frame rates, resized; from pictures that come in the order of their times."""

    def __init__(self, duration_sec: float, clip_size: int, sync_size: int, sync_crop: bool) -> None:
        self.duration_sec, self.clip_size, self.sync_size = duration_sec, clip_size, sync_size
        self.sync_crop = sync_crop
        self.masker: Masker | None = None
        self.size = (0, 0)
        self._clip: list[Tensor] = []
        self._sync: list[Tensor] = []
        self._clip_clock, self._sync_clock = _FrameClock(CLIP_FPS), _FrameClock(SYNC_FPS)

    def add(self, exact_time: Fraction, picture_of: Callable[[], Tensor]) -> bool:
        """Take the picture shown ``exact_time`` seconds after the start; return False if no later one is needed.

        Args:
            picture_of: returns (3, H, W) uint8; called only if the picture is sampled.
        """
        time = float(exact_time)
        if time > self.duration_sec:
            return False
        num_clip, num_sync = self._clip_clock.uses(time), self._sync_clock.uses(time)  # none before time 0
        if num_clip or num_sync:
            picture = picture_of()  # (3, H, W)
            self.size = (picture.shape[1], picture.shape[2])
            masker = self.masker
            masked = picture if masker is None else masker.apply(picture, exact_time)
            if num_clip:
                seen = masked if masker is None or masker.settings.clip else picture
                self._clip += [resize_frame(seen, self.clip_size)] * num_clip
            if num_sync:
                seen = masked if masker is None or masker.settings.sync else picture
                self._sync += [resize_frame(seen, self.sync_size, self.sync_crop)] * num_sync
        return shortened_duration(self.duration_sec, len(self._clip), len(self._sync)) != self.duration_sec

    def frames(
        self, path: PathLike, wanted_sec: float, start_sec: float, end_sec: float, fill_sec: float, fps: float
    ) -> VideoFrames:
        """Return the sampled pictures; see :func:`read_video`.

        Args:
            wanted_sec: what the last pictures may be held for. end_sec: where the pictures end.
        """
        duration_sec = self.duration_sec
        num_filled = _fill_end(self._clip, self._sync, wanted_sec, fill_sec)
        covered_sec = shortened_duration(wanted_sec, len(self._clip), len(self._sync))
        _check_enough(path, covered_sec, start_sec, duration_sec, end_sec)
        shown_sec = min(duration_sec, end_sec)
        if covered_sec < shown_sec - SELVA_FILL_SEC:  # a screen recording, say: no new frame while nothing moves
            log.warning("%s: no frame begins in the %.2f s before %.2f s, so the clip is that much shorter; convert "
                        "the video to a constant frame rate to use all of it",
                        path, shown_sec - covered_sec, start_sec + shown_sec)
        return VideoFrames(
            clip_frames=torch.stack(self._clip[: int(covered_sec * CLIP_FPS)]),  # (T, 3, clip_size, clip_size)
            sync_frames=torch.stack(self._sync[: int(covered_sec * SYNC_FPS)]),  # (F, 3, sync_size, sync_size)
            duration_sec=covered_sec,
            requested_sec=duration_sec,
            start_sec=start_sec,
            source_fps=fps,
            source_size=self.size,
            num_filled=num_filled,
        )


def _upright_rgb(frame: Any) -> Tensor:
    """Return a decoded frame as (3, H, W) uint8 RGB, turned the way a player shows it."""
    picture = upright(frame.to_ndarray(format="rgb24"), frame)  # (H, W, 3)
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)  # (3, H, W)


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


def _check_enough(path: PathLike, covered_sec: float, start_sec: float, duration_sec: float, end_sec: float) -> None:
    """Raise if a clip is shorter than the sync encoder needs."""
    shortest_sec = SYNC_SEGMENT_FRAMES / SYNC_FPS
    if covered_sec < shortest_sec:
        raise UserError(
            f"{path}: has {covered_sec:.2f} s of pictures from {start_sec:.2f} s to {start_sec + duration_sec:.2f} s, "
            f"expected at least {shortest_sec} s; its pictures end after {start_sec + end_sec:.2f} s"
        )
