"""The ``.npz`` feature bundle: the inputs of the generator for one video clip, in the published file format.

    clip_features  float32 (1, Tc, Dc)   CLIP frame features, 8 per second
    sync_features  float32 (1, S, Ds)    sync tokens, conditioned on the prompt for SelVA; eight per segment
    duration       float64 ()            seconds
    prompt         text ()               the prompt that the sync features were extracted with
    variant        text ()               generator variant chosen when extracting; informational
    text_features  float32 (1, 77, Dt)   ours, optional: CLIP text tokens of the prompt
    latent_mean    float32 (1, N, C)     ours, optional: VAE posterior of the sound of the clip, before normalisation
    latent_std     float32 (1, N, C)
    fps            float64 ()            ours, optional: average frame rate of the video
    source_sha256  text ()               ours, optional: of the whole content of the video file
    settings       text ()               ours, optional: JSON object, how the features were made; "pictures" is "none"
                                         where they stand for no pictures
    origin         text ()               ours, optional: JSON object, the sound that was placed with the features, its
                                         hash, and an identity of the weights

The first five are what ComfyUI-SelVA writes and reads; it ignores other keys, and so does this reader.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selva.sequence import CLIP_FPS, SYNC_TOKENS_PER_SEGMENT
from selva.utils.errors import UserError
from selva.utils.files import atomic_path
from selva.utils.text import counted

TEXT_TOKENS = 77
OPTIONAL_TENSORS = ("text_features", "latent_mean", "latent_std")

NO_PICTURES = {"pictures": "none"}  # in the settings of features that stand for no pictures

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class FeatureBundle:
    """The content of one feature file; arrays and tensors of any float type are kept as float32 tensors on the CPU.

    Attributes:
        clip_features: (1, Tc, Dc), Tc = int(8 * duration).
        sync_features: (1, S, Ds), S a multiple of 8.
        duration: seconds.
        prompt: "" if unknown.
        variant: "" if unknown.
        text_features: (1, 77, Dt) or None.
        latent_mean, latent_std: (1, N, C), both or neither.
        fps: of the video file; None if unknown.
        source_sha256: of the video file; "" if unknown.
        settings: anything that JSON can hold, or None.
        origin: "sound" and "sound_sha256", the file that was placed with the features; "weights", see
            :func:`selva.weights.find.weights_identity`. None in files of other programs and of earlier versions.

    Raises:
        ValueError: a shape, a duration or a value that such a file cannot have; names the field.
    """

    clip_features: Tensor
    sync_features: Tensor
    duration: float
    prompt: str = ""
    variant: str = ""
    text_features: Tensor | None = None
    latent_mean: Tensor | None = None
    latent_std: Tensor | None = None
    fps: float | None = None
    source_sha256: str = ""
    settings: dict[str, Any] | None = None
    origin: dict[str, Any] | None = None

    @property
    def other_prompts(self) -> tuple[str, ...]:
        """Further prompts that the clip was extracted with, which other programs do not see; () if there are none."""
        found = (self.settings or {}).get("other_prompts")
        return tuple(one for one in found if isinstance(one, str)) if isinstance(found, list) else ()

    @property
    def has_video(self) -> bool:
        """False where the features stand for no pictures; they are then what the published model takes for that."""
        return (self.settings or {}).get("pictures") != NO_PICTURES["pictures"]

    def __post_init__(self) -> None:
        for name in ("clip_features", "sync_features", *OPTIONAL_TENSORS):
            value = getattr(self, name)
            if value is not None:
                value = torch.as_tensor(value).detach().to("cpu", torch.float32)
                object.__setattr__(self, name, value)
                _check_tensor(name, value)
        if not (math.isfinite(self.duration) and self.duration > 0):
            raise UserError(f"duration is {self.duration}, expected a positive number of seconds")
        shapes = [None if x is None else tuple(x.shape) for x in (self.latent_mean, self.latent_std)]
        if shapes[0] != shapes[1]:
            raise UserError(f"latent_mean is {shapes[0]} and latent_std is {shapes[1]}, expected the same shape")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise UserError(f"fps is {self.fps}, expected a positive number")


def _check_tensor(name: str, value: Tensor) -> None:
    expected = {
        "clip_features": "(1, frames, channels)",
        "sync_features": f"(1, tokens, channels) with a multiple of {SYNC_TOKENS_PER_SEGMENT} tokens",
        "text_features": f"(1, {TEXT_TOKENS}, channels)",
        "latent_mean": "(1, frames, channels)",
        "latent_std": "(1, frames, channels)",
    }[name]
    shape = tuple(value.shape)
    fits = len(shape) == 3 and shape[0] == 1 and 0 not in shape
    if fits and name == "sync_features":
        fits = shape[1] % SYNC_TOKENS_PER_SEGMENT == 0
    if fits and name == "text_features":
        fits = shape[1] == TEXT_TOKENS
    if not fits:
        raise UserError(f"{name} is {shape}, expected {expected}")
    num_bad = int((~torch.isfinite(value)).sum())
    if num_bad:
        raise UserError(f"{name} has {counted(num_bad, 'value')} that are not finite (NaN or infinite), expected none")


def save_features(path: PathLike, bundle: FeatureBundle) -> None:
    """Write ``bundle`` to ``path`` (.npz), uncompressed, whole or not at all; the published keys come first.

    Raises:
        ValueError: ``path`` has another suffix; it would not be found again.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: feature files end in .npz")
    arrays = {
        "clip_features": bundle.clip_features.numpy(),
        "sync_features": bundle.sync_features.numpy(),
        "duration": np.float64(bundle.duration),
        "prompt": np.str_(bundle.prompt),
        "variant": np.str_(bundle.variant),
    }
    optional = {name: getattr(bundle, name) for name in OPTIONAL_TENSORS}
    arrays |= {name: value.numpy() for name, value in optional.items() if value is not None}
    if bundle.fps is not None:
        arrays["fps"] = np.float64(bundle.fps)
    if bundle.source_sha256:
        arrays["source_sha256"] = np.str_(bundle.source_sha256)
    if bundle.settings is not None:
        arrays["settings"] = np.str_(json.dumps(bundle.settings, sort_keys=True, ensure_ascii=False))
    if bundle.origin is not None:
        arrays["origin"] = np.str_(json.dumps(bundle.origin, sort_keys=True, ensure_ascii=False))
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_features(path: PathLike) -> FeatureBundle:
    """Return the bundle in ``path``, every array checked; nothing in the file is executed.

    Only the two features of the video are required. A missing duration follows from the CLIP frames.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or a key that is missing or has another type, shape or values than the format says.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    arrays = _read_arrays(path)
    missing = [key for key in ("clip_features", "sync_features") if key not in arrays]
    if missing:
        found = ", ".join(arrays) or "nothing that belongs to one"
        raise UserError(f"{path}: not a feature file, {' and '.join(missing)} missing (found: {found})")
    try:
        return FeatureBundle(
            clip_features=_floats(arrays, "clip_features"),
            sync_features=_floats(arrays, "sync_features"),
            duration=_duration(arrays),
            prompt=_text(arrays, "prompt"),
            variant=_text(arrays, "variant"),
            **{name: _floats(arrays, name) for name in OPTIONAL_TENSORS if name in arrays},
            fps=_number(arrays, "fps") if "fps" in arrays else None,
            source_sha256=_text(arrays, "source_sha256"),
            settings=_settings(arrays),
            origin=_settings(arrays, "origin"),
        )
    except (ValueError, RuntimeError) as error:  # PyTorch cannot take every array that NumPy can describe
        raise UserError(f"{path}: {error}") from error


_KEYS = ("clip_features", "sync_features", "duration", "prompt", "variant", *OPTIONAL_TENSORS, "fps", "source_sha256",
         "settings", "origin")


def load_settings(path: PathLike) -> dict[str, Any] | None:
    """Return the settings that the features in ``path`` were made with, reading nothing else; None if it has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or settings that are no JSON object.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return _settings(_read_arrays(path, ("settings",)))
    except ValueError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def load_duration(path: PathLike) -> float:
    """Return the seconds of the features in ``path``, reading nothing else if the file says them.

    Raises:
        ValueError: no such file, unreadable, or no feature file.
    """
    path = Path(path)
    arrays = _read_arrays(path, ("duration",)) or _read_arrays(path, ("clip_features",))
    if not arrays:
        raise UserError(f"{path}: not a feature file, clip_features missing")
    try:
        return _duration(arrays)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


# What NumPy and zipfile raise on damaged files: bad headers, encrypted or unknown compression, cut or foreign content.
ARRAY_ERRORS = (
    ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    RuntimeError, tokenize.TokenError, SyntaxError, LookupError, TypeError, AttributeError, OverflowError,
)
MAX_ARRAY_BYTES = 1 << 30  # hours of features; a file of a few KiB can promise more


def _check_sizes(file: zipfile.ZipFile, keys: Sequence[str]) -> None:
    for info in file.infolist():
        if info.filename.removesuffix(".npy") in keys and info.file_size > MAX_ARRAY_BYTES:
            raise UserError(f"{info.filename} has {counted(info.file_size, 'byte')}, expected at most "
                            f"{MAX_ARRAY_BYTES}")


def _read_arrays(path: Path, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise UserError("it holds a single array")
        with file:
            wanted = [key for key in (_KEYS if keys is None else keys) if key in file.files]
            _check_sizes(file.zip, wanted)
            arrays = {key: file[key] for key in wanted}
        if foreign := [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise UserError(f"{', '.join(foreign)} does not begin as an array does")
        return arrays
    except ARRAY_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "allow_pickle" in reason:  # NumPy's own words advise to load the file unsafely
            reason = "it holds Python objects, which are never loaded"
        raise UserError(f"{path}: cannot be read as a feature file ({reason}); extract it again") from error


def _floats(arrays: dict[str, np.ndarray], key: str) -> Tensor:
    array = arrays[key]
    if array.dtype != np.float32:
        raise UserError(f"{key} is {array.dtype}, expected float32")
    return torch.from_numpy(array)


def _duration(arrays: dict[str, np.ndarray]) -> float:
    if "duration" not in arrays:
        clip = arrays["clip_features"]
        return clip.shape[1] / CLIP_FPS if clip.ndim == 3 else math.nan  # a wrong shape is reported before this
    return _number(arrays, "duration")


def _number(arrays: dict[str, np.ndarray], key: str) -> float:
    array = arrays[key]
    if array.shape != () or array.dtype.kind not in "fiu":
        raise UserError(f"{key} is {array.dtype} {array.shape}, expected a single number")
    return float(array)


def _text(arrays: dict[str, np.ndarray], key: str) -> str:
    if key not in arrays:
        return ""
    array = arrays[key]
    if array.shape != () or array.dtype.kind != "U":
        raise UserError(f"{key} is {array.dtype} {array.shape}, expected a single text")
    return str(array)


def _settings(arrays: dict[str, np.ndarray], key: str = "settings") -> dict[str, Any] | None:
    text = _text(arrays, key)
    if not text:
        return None
    try:
        settings = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{key} is not JSON ({error}), expected an object") from error
    if not isinstance(settings, dict):
        raise UserError(f"{key} is a JSON {type(settings).__name__}, expected an object")
    return settings
