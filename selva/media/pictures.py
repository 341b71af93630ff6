"""Decoded pictures: which way up a player shows them, how long, and whether their time stamps make sense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from selva.media.container import PathLike, check_step

# -- orientation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Orientation:
    """Turning of the stored picture by a player: transpose it (rows become columns), then mirror it.

    Attributes:
        transposed: columns of the stored picture are rows of the shown one.
        mirrored: left and right are exchanged, after that. flipped: top and bottom are.
    """

    transposed: bool = False
    mirrored: bool = False
    flipped: bool = False

    def applied(self, picture: np.ndarray) -> np.ndarray:
        """Return ``picture`` (H, W, ...) as it is shown, a view."""
        if self.transposed:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.flipped else 1, :: -1 if self.mirrored else 1]

    @property
    def filters(self) -> list[tuple[str, str]]:
        """Names and arguments of the FFmpeg filters that do the same."""
        steps = [("transpose", "cclock_flip")] if self.transposed else []
        steps += [("hflip", "")] if self.mirrored else []
        return steps + ([("vflip", "")] if self.flipped else [])


def orientation(frame: Any) -> Orientation:
    """Return the turning with which a decoded frame is shown, from its display matrix.

    Angles between quarter turns are rounded, as is a matrix that also scales or shears: only the signs count.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None or len(data := bytes(data)) < 36:
        return Orientation()
    # ISO 14496-12: x' = a x + c y, y' = b x + d y, with y downwards
    a, b, _, c, d = (int(value) for value in np.frombuffer(data, dtype="=i4")[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, mirrored=c < 0, flipped=b < 0)
    return Orientation(False, mirrored=a < 0, flipped=d < 0)


def upright(picture: np.ndarray, frame: Any) -> np.ndarray:
    """Return ``picture`` (H, W, ...), made from ``frame``, turned and mirrored the way a player shows it."""
    return orientation(frame).applied(picture)


# -- time -------------------------------------------------------------------------------------------------------------


def frame_duration(frame: Any, stream: Any) -> float:
    """Return the seconds that a decoded frame is shown; 0.0 if the file does not say."""
    if frame.duration:
        return float(frame.duration * frame.time_base)
    return float(1 / stream.average_rate) if stream.average_rate else 0.0


def steady(
    path: PathLike, frames: Iterable[tuple[Fraction, Any]], start: Fraction
) -> Iterator[tuple[Fraction, Any]]:
    """Yield the (time, frame) of :func:`selva.media.container.decode_frames` as long as time runs as in one recording.

    Raises:
        ValueError: as :func:`selva.media.container.check_step`, where time jumps.
    """
    last: Fraction | None = None
    for time, frame in frames:
        check_step(path, last, time, start)
        last = time
        yield time, frame
