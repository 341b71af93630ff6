"""Features of pictures that a program holds, instead of a video file: encoded once, kept as a feature file."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selva.extraction.extractor import FeatureExtractor, clip_settings
from selva.extraction.pairs import same_samples
from selva.features import FeatureBundle, load_features, save_features
from selva.inputs.names import numbered_names
from selva.media import MaskSettings, write_audio
from selva.models.prompt_length import warn_of_cut_prompts
from selva.sequence import DEFAULT_DURATION_SEC
from selva.utils.errors import UserError
from selva.utils.files import source_hash
from selva.weights.find import encoders_identity, weights_identity

log = logging.getLogger(__name__)

PARTS = ("clip_text", "clip_image", "t5", "video_encoder")


@dataclass(frozen=True)
class PictureClip:
    """A clip in memory.

    Attributes:
        pictures: (T, H, W, 3) RGB, uint8 or floats from 0 to 1. fps: pictures per second.
        prompt: what is to be heard. duration_sec: seconds to use; None is 8, or what there is if that is less.
        mask: (T, h, w) or (1, h, w) from 0 to 1; what is 1 is kept. None: all is seen.
        mask_strength, mask_clip, mask_sync: as in :class:`selva.media.mask_settings.MaskSettings`.
        sound: (channels, samples) full scale 1, from the time of the first picture; None if there is none to train on.
        rate: its samples per second.
    """

    pictures: Tensor
    fps: float
    prompt: str = ""
    duration_sec: float | None = None
    mask: Tensor | None = None
    mask_strength: float = 1.0
    mask_clip: bool = True
    mask_sync: bool = True
    sound: Tensor | None = None
    rate: int = 0

    def __post_init__(self) -> None:
        shape = tuple(self.pictures.shape)
        if len(shape) != 4 or shape[3] < 3 or 0 in shape:
            raise UserError(f"the pictures are {shape}, expected (pictures, height, width, 3)")

    def picture(self, index: int) -> Tensor:
        """Return one picture as (3, H, W) uint8."""
        return _bytes_of(self.pictures[index, :, :, :3]).permute(2, 0, 1)

    def sha256(self) -> str:
        """Return a hash of the pictures in 8 bits, and of their rate."""
        digest = hashlib.sha256(f"{tuple(self.pictures.shape)} {self.fps!r}".encode())
        for picture in self.pictures:
            digest.update(_bytes_of(picture[:, :, :3]).numpy().tobytes())
        return digest.hexdigest()


def extract_pictures(
    extractor: FeatureExtractor, clip: PictureClip, folder: Path, name: str = ""
) -> tuple[FeatureBundle, Path]:
    """Return the features of a clip and their file; a file that was made of the same clip is read instead.

    The sound, up to the duration that was asked for, is written beside it as ``.flac``: a training reads a folder of
    such pairs. A sound of that name which was not written here is never replaced.

    Args:
        name: clips are called ``name_001``, ``name_002`` ...; the same pictures and sound keep their number. "" names
            the file by a hash of the clip and all settings.

    Raises:
        ValueError: pictures, mask, sound or duration cannot be used; a sound is in the way.
        OSError: the folder cannot be written to.
    """
    settings = _settings(extractor, clip)
    if name:
        stem = numbered_names(name, [(settings["source"], 0.0)], folder, keep_sounds=True)[0]
    else:
        stem = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    path, sound = folder / f"{stem}.npz", folder / f"{stem}.flac"
    old = load_features(path) if path.is_file() else None
    is_current = old is not None and old.settings == settings
    if old is not None and is_current and (clip.sound is None or sound.is_file()):
        log.info("%s: is current", path)
        return old, path
    if clip.sound is not None:
        _check_place(sound, clip, old)
    bundle = old if old is not None and is_current else _extracted(extractor, clip, settings)
    folder.mkdir(parents=True, exist_ok=True)
    if clip.sound is not None:
        _write_sound(sound, clip)
        # Without its name: training still takes a recording of another kind that the user puts beside it.
        bundle = replace(bundle, origin={"sound_sha256": source_hash(sound)})
    save_features(path, bundle)  # last: features of a clip mean that its sound is there
    return bundle, path


def _settings(extractor: FeatureExtractor, clip: PictureClip) -> dict[str, Any]:
    variant, sha256 = extractor.variant, clip.sha256()
    mask = None
    if clip.mask is not None:
        mask = {"sha256": _hash_of(clip.mask), "strength": clip.mask_strength, "clip": clip.mask_clip,
                "sync": clip.mask_sync}
    sound = None if clip.sound is None else f"{_hash_of(clip.sound)} {clip.rate}"
    content = sha256 if sound is None else hashlib.sha256(f"{sha256} {sound}".encode()).hexdigest()
    settings = clip_settings(
        Path(f"clip_{content[:16]}"), sha256, clip.prompt, 0.0, clip.duration_sec or DEFAULT_DURATION_SEC,
        encoders_identity(variant), str(extractor.precision).removeprefix("torch."), mask,
    )
    settings["weights"] = weights_identity(variant, extractor.selva_dir, PARTS)
    if sound is not None:
        settings["sound_sha256"] = sound
    return settings


def _extracted(extractor: FeatureExtractor, clip: PictureClip, settings: dict[str, Any]) -> FeatureBundle:
    warn_of_cut_prompts([("the clip", clip.prompt)], extractor.variant.clip)
    use = keep = None
    if clip.mask is not None:
        use = MaskSettings(Path("mask"), clip.mask_strength, clip.mask_clip, clip.mask_sync)
        keep = clip.mask.detach().float().cpu().numpy()
    frames = extractor.sample(
        clip.picture, len(clip.pictures), clip.fps, clip.duration_sec or DEFAULT_DURATION_SEC, use, keep
    )
    return extractor.extract(frames, clip.prompt, settings)


def _check_place(path: Path, clip: PictureClip, old: FeatureBundle | None) -> None:
    """Return if the sound of a clip may be written to ``path``: there is none, or one that was written here.

    Args:
        old: earlier features of the clip, which note the hash of their sound; those of earlier versions do not.

    Raises:
        ValueError: another sound lies there, such as a better recording of the user's own.
    """
    if not path.exists():
        return
    origin, settings = (old.origin or {}, old.settings or {}) if old is not None else ({}, {})
    if origin.get("sound_sha256") == source_hash(path):
        return
    asked = clip.duration_sec or DEFAULT_DURATION_SEC
    with tempfile.TemporaryDirectory() as folder:  # not noted: by an earlier version, or a run that was interrupted
        for duration_sec in {asked, settings.get("duration_sec", asked)}:
            again = Path(folder) / path.name
            _write_sound(again, replace(clip, duration_sec=duration_sec))
            if same_samples(again, path):
                return
    raise UserError(f"{path}: is in the way, it is not the sound that was written for this clip; move it, to put it "
                    "back afterwards, or choose another name or folder")


def _write_sound(path: Path, clip: PictureClip) -> None:
    assert clip.sound is not None
    duration_sec = clip.duration_sec or DEFAULT_DURATION_SEC
    sound = clip.sound.detach().float().cpu()[:, : round(duration_sec * clip.rate)]
    peak = sound.abs().max().item() if sound.numel() else 0.0
    write_audio(path, sound / peak if peak > 1 else sound, clip.rate)


def _bytes_of(picture: Tensor) -> Tensor:
    """Return values as uint8 on the CPU; floats from 0 to 1 become the bytes that they were made of."""
    if picture.dtype == torch.uint8:
        return picture.cpu()
    return (picture.float().cpu() * 255).round_().clamp_(0, 255).to(torch.uint8)


def _hash_of(values: Tensor) -> str:
    values = values.detach().float().cpu().contiguous()
    return hashlib.sha256(str(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()
