"""Settings of a mask; needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".npy", *IMAGE_SUFFIXES)  # beside those of videos


@dataclass(frozen=True)
class MaskSettings:
    """A mask and how it is used.

    Attributes:
        path: image, video or .npy.
        strength: 1 makes the background grey, 0 leaves it, between blends.
        clip, sync: which encoder's frames it is laid on.

    Raises:
        ValueError: a strength outside 0 ... 1, or a mask for neither encoder.
    """

    path: Path
    strength: float = 1.0
    clip: bool = True
    sync: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength of the mask is {self.strength}, expected 0 to 1")
        if not (self.clip or self.sync):
            raise ValueError(f"{self.path}: the mask is used for neither the CLIP nor the sync frames; leave it out")
