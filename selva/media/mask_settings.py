"""Settings of a mask; needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selva.utils.errors import UserError
from selva.utils.settings import setting

MASKS = "masks"

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".npy", *IMAGE_SUFFIXES)  # beside those of videos


@dataclass(frozen=True)
class MaskSettings:
    """A mask, its strength, and the encoders it is for.

    Attributes:
        path: image, video or .npy.
        strength: 1 makes the background grey, 0 leaves it, between blends.
        clip, sync: it is applied to the frames of CLIP, of the video encoder.

    Raises:
        ValueError: a strength outside 0 ... 1, or a mask for neither encoder.
    """

    path: Path
    strength: float = 1.0
    clip: bool = True
    sync: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength of the mask is {self.strength}, expected 0 to 1")
        if not (self.clip or self.sync):
            raise UserError(f"{self.path}: the mask is used for neither the CLIP nor the sync frames; leave it out")


@dataclass(frozen=True)
class MaskOptions:
    """Masks of all clips of a run."""

    mask: Path | None = setting(
        None, "what of the picture counts: an image, a video or .npy for all clips, white keeps; or a folder of them "
        "named like the clips. The rest becomes grey. A table's column mask wins", group=MASKS, metavar="PATH")
    mask_strength: float = setting(MaskSettings.strength, "1 makes the rest of the picture grey, 0 leaves it, between "
                                   "blends", group=MASKS)
    mask_clip: bool = setting(MaskSettings.clip, "apply the mask to the pictures for CLIP", group=MASKS)
    mask_sync: bool = setting(MaskSettings.sync, "apply the mask to the pictures for the video encoder", group=MASKS)

    def of_clip(self, path: Path | None) -> MaskSettings | None:
        """Return the mask of one clip, None if it has none.

        Raises:
            ValueError: the options make no sense.
        """
        return None if path is None else MaskSettings(path, self.mask_strength, self.mask_clip, self.mask_sync)
