"""A picture of what the two image encoders saw of a clip, to be checked before hours of extraction or training.

A mask that is inverted, a video that lies on its side, a crop that cuts off the subject: all visible at a glance.
"""

from __future__ import annotations

import logging
import os
import re
import textwrap
from pathlib import Path

from torch import Tensor

from selva.media import VideoFrames
from selva.sequence import CLIP_FPS, SYNC_FPS
from selva.utils.errors import UserError
from selva.utils.plots import new_figure, save_figure
from selva.utils.text import counted

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

_HEADER_BYTES = 4096  # of a PNG; comments come before the pixels
_DIGEST = re.compile(rb"tEXtComment\0([0-9a-f]{64})")
_PICTURE_IN = 1.75  # width and height of one picture, in inches of 100 pixels


def write_contact_sheet(
    path: PathLike, frames: VideoFrames, title: str = "", columns: int = 8, digest: str = ""
) -> None:
    """Write a PNG with evenly spaced frames of a clip, above as CLIP and below as the video encoder got them.

    Both rows show the same moments. The times are those in the video file, so a clip of a later part begins later.

    Args:
        path: ends in .png; its folder is created, the file appears whole or not at all.
        frames: as read, i.e. resized and masked.
        title: e.g. the id and the prompt of the clip; long ones are wrapped.
        columns: frames per row; fewer if the clip has fewer.
        digest: SHA-256 of what decides the picture, for :func:`sheet_digest`.

    Raises:
        ValueError: another suffix, or less than one column.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: cannot write {path.suffix or 'a file without suffix'}, expected .png")
    if columns < 1:
        raise UserError(f"columns is {columns}, expected at least 1")
    columns = min(columns, len(frames.clip_frames))
    moments = [frames.duration_sec * column / columns for column in range(columns)]
    heading = textwrap.fill(f"{title}\n{_source(frames)}" if title else _source(frames), width=columns * 22,
                            replace_whitespace=False)
    figure = new_figure(columns * _PICTURE_IN, 2 * (_PICTURE_IN + 0.45) + 0.25 * (heading.count("\n") + 1))
    figure.suptitle(heading, fontsize=9, parse_math=False)  # a prompt may hold dollar signs
    rows = (
        ("what CLIP sees, for what is shown", frames.clip_frames, CLIP_FPS),
        ("what the video encoder sees, for when it moves", frames.sync_frames, SYNC_FPS),
    )
    axes = figure.subplots(2, columns, squeeze=False)
    for row_axes, (name, pictures, fps) in zip(axes, rows, strict=True):
        for column, (axis, moment) in enumerate(zip(row_axes, moments, strict=True)):
            index = min(int(moment * fps), len(pictures) - 1)
            axis.imshow(_as_image(pictures[index]))
            axis.set_xlabel(f"{frames.start_sec + index / fps:.2f} s", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                size = f"{pictures.shape[-1]} x {pictures.shape[-2]}"
                axis.set_title(f"{name}: {counted(len(pictures), 'picture')} of {size}, {fps:g} per second", fontsize=8,
                               loc="left")
    save_figure(figure, path, digest)


def sheet_digest(path: Path) -> str:
    """Return the digest that a sheet was written with; "" if there is no file, or any other picture."""
    try:
        with open(path, "rb") as file:
            found = _DIGEST.search(file.read(_HEADER_BYTES))
    except FileNotFoundError:
        return ""
    return found[1].decode() if found else ""


def check_place(path: Path, overwrite: bool) -> None:
    """Return if a sheet may be written to ``path``: there is no file, or another sheet, or it may be replaced.

    Raises:
        ValueError: a picture lies there that no extraction has written: a mask of that name, say.
    """
    if not path.exists() or sheet_digest(path):
        return
    if not overwrite:
        raise UserError(f"{path}: is in the way of the preview, extract_features.py did not write it; move it, choose "
                        "another folder for --preview, or replace it with --overwrite")
    log.warning("%s: was not written by extract_features.py and is replaced (--overwrite)", path)


def _source(frames: VideoFrames) -> str:
    height, width = frames.source_size
    text = (f"{frames.start_sec:g} to {frames.start_sec + frames.duration_sec:g} s of a video of {width} x {height} at "
            f"{frames.source_fps:.4g} frames per second")
    if frames.num_filled:
        text += f"; the last frame is held {frames.num_filled / SYNC_FPS:g} s longer"
    return text


def _as_image(picture: Tensor):
    return picture.permute(1, 2, 0).numpy()  # (H, W, 3)
