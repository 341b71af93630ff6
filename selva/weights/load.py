"""Loaders: published weight files -> networks that are ready to use.

    check_weights(variant, selva_dir, needs)    are all files there?  one error names every missing one
    load_generator(variant, selva_dir) ...      a frozen network in eval mode

Files are found in the layouts of ComfyUI (``models/selva`` with ``ext/``) and of SelVA and MMAudio (``weights/`` with
``ext_weights/``), CLIP and FLAN-T5 and BigVGAN v2 also in the Hugging Face cache. Nothing is downloaded here; that is
``scripts/download_weights.py``. Nothing in a file is ever executed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from selva.models.clip_t5 import CLIP_IMAGE_PREFIX, CLIP_TEXT_PREFIXES, T5_PREFIXES, ClipImage, ClipText, T5Text
from selva.models.generator import Generator
from selva.models.mel_inversion import MelInversion
from selva.models.synchformer import Synchformer
from selva.models.textsynch import TextSynch
from selva.models.vae import DATA_BUFFERS, VAE
from selva.models.variants import Variant, get_variant
from selva.models.vocoder import Vocoder
from selva.models.zoo import build_generator, build_vae, build_video_encoder, build_vocoder
from selva.utils.errors import UserError
from selva.utils.files import native_path
from selva.utils.torch_files import READ_ERRORS
from selva.weights.find import ASSETS, asset_name, find_weights

VOCODER_KEY = "generator"  # the published vocoder files hold their tensors under this key
CLIP_PREFIXES = {"clip_text": CLIP_TEXT_PREFIXES, "clip_image": (CLIP_IMAGE_PREFIX,)}


AnyNetwork = Generator | TextSynch | Synchformer | VAE | Vocoder | MelInversion | ClipText | ClipImage | T5Text
Network = TypeVar("Network", bound=AnyNetwork)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path, key: str | None = None, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Return the tensors of a weight file on the CPU, memory-mapped where the format allows it.

    Args:
        path: ``.safetensors``, or a file written by ``torch.save``; unpickled with ``weights_only=True``.
        key: the entry of the file that holds the tensors, None if they are at the top.
        prefixes: only tensors whose names start with one of these.

    Raises:
        ValueError: not such a file, damaged, or holding anything but tensors and plain values.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".safetensors":
        try:
            with native_path(path) as readable, safe_open(readable, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); download it again") from error
    try:
        # Only the zip format can be mapped; best_netG.pt and other old files are plain pickles.
        with native_path(path) as readable:
            content = torch.load(readable, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except READ_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: not a readable weight file, truncated or holding code ({reason}); download it again"
        ) from error
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    is_dict = isinstance(content, dict)
    if not is_dict or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        inside = f" under the key {key!r}" if key is not None else ""
        raise UserError(f"{path}: expected named tensors{inside}, found something else; is it another file?")
    return {name: tensor for name, tensor in content.items() if name.startswith(prefixes)}


# -- loading -----------------------------------------------------------------------------------------------------------


def load_generator(
    variant: str, selva_dir: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    *, file: Path | None = None,
) -> Generator:
    """Return the generator. As all ``load_*``: frozen, in eval mode, read in float32 and then cast.

    Args:
        variant: a name from :data:`selva.models.variants.VARIANTS`.
        selva_dir: where the files lie; a packaged variant needs none and ignores it.
        file: a generator of the user's own, with the published names, instead.

    Raises:
        FileNotFoundError: a file is missing; says which, and how to get it.
        ValueError: unknown variant, or a file that is damaged or belongs to another variant.
    """
    return _load(variant, "generator", Generator, selva_dir, device, dtype, file=file)


def load_video_encoder(
    variant: str, selva_dir: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextSynch | Synchformer:
    """Return the encoder behind the sync features, TextSynch or Synchformer by family; see :func:`load_generator`."""
    return _load(variant, "video_encoder", (TextSynch, Synchformer), selva_dir, device, dtype)


def load_vae(
    variant: str, selva_dir: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    *, decoder_only: bool = False, encoder_only: bool = False,
) -> VAE:
    """Return the VAE, with ``decoder_only`` or ``encoder_only`` without ever reading the other half.

    See :func:`load_generator`.
    """
    assert not (decoder_only and encoder_only)
    reduce = VAE.drop_encoder if decoder_only else VAE.drop_decoder if encoder_only else None
    return _load(variant, "vae", VAE, selva_dir, device, dtype, reduce)


def load_vocoder(
    variant: str, selva_dir: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Vocoder | MelInversion:
    """Return the vocoder; see :func:`load_generator`."""
    return _load(variant, "vocoder", (Vocoder, MelInversion), selva_dir, device, dtype)


def load_clip_text(
    variant: str, selva_dir: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ClipText:
    """Return the CLIP text tower, without reading the image tower; see :func:`load_generator`."""
    return _load(variant, "clip_text", ClipText, selva_dir, device, dtype)


def load_clip_image(
    variant: str, selva_dir: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ClipImage:
    """Return the CLIP image tower, without reading the text tower; see :func:`load_generator`."""
    return _load(variant, "clip_image", ClipImage, selva_dir, device, dtype)


def load_t5(
    variant: str, selva_dir: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> T5Text:
    """Return the T5 encoder; see :func:`load_generator`.

    Raises:
        ValueError: also for float16, in which T5 overflows, and for a variant without T5 (the mmaudio family).
    """
    if get_variant(variant).t5 is None:
        raise UserError(f"variant {variant} has no T5 encoder: its video encoder reads no text")
    if dtype == torch.float16:
        raise UserError("T5 overflows in float16; load it in bfloat16 or float32")
    return _load(variant, "t5", T5Text, selva_dir, device, dtype)


def _load(
    name: str, part: str, kind: type[Network] | tuple[type[Network], ...], selva_dir: Path | None,
    device: torch.device | str, dtype: torch.dtype, reduce: Callable[[Any], object] | None = None,
    file: Path | None = None,
) -> Network:
    variant = get_variant(name)
    files = find_weights(variant, selva_dir, (part,))[part] if file is None else (file,)
    network = _without_weights(variant, part, files)
    assert isinstance(network, kind), part
    if reduce is not None:
        reduce(network)  # before its weights are read
    if not files:  # a packaged variant
        network.load_published(_packaged_weights(variant, part))
        return _finish(network, device, dtype)
    prefixes = CLIP_PREFIXES.get(part, T5_PREFIXES if part == "t5" else ("",))
    weights = read_checkpoint(files[0], VOCODER_KEY if part == "vocoder" else None, prefixes)
    try:
        if part == "vae":
            _check_band_statistics(weights)
        network.load_published(weights)
    except ValueError as error:
        purpose = variant.weight_files(part)[0].purpose if file is None else "generator"
        raise UserError(f"{files[0]}: {error}; expected the {purpose} of variant {name}") from error
    return _finish(network, device, dtype)


def _finish(network: Network, device: torch.device | str, dtype: torch.dtype) -> Network:
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _check_band_statistics(weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if the band statistics are missing, which the VAE's load_published would not notice."""
    missing = [name for name in DATA_BUFFERS if name not in weights]
    if missing:
        raise UserError(f"{' and '.join(missing)} are missing")


def _without_weights(variant: Variant, part: str, files: Sequence[Path]) -> AnyNetwork:
    """Return the network of one part with uninitialised weights, for a strict load to fill.

    Drawing hundreds of millions of initial values, only to overwrite them, would take seconds.
    """
    if part == "clip_text":
        return ClipText(variant.clip)
    if part == "clip_image":
        return ClipImage(variant.clip)
    if part == "t5":
        assert variant.t5 is not None, variant.name
        return T5Text(variant.t5, tokenizer_file=files[1] if files else None)
    with torch.device("meta"):
        network = _build(variant, part)
    return network.to_empty(device="cpu")


def _build(variant: Variant, part: str) -> Generator | TextSynch | Synchformer | VAE | Vocoder | MelInversion:
    if part == "generator":
        return build_generator(variant.generator)
    if part == "video_encoder":
        return build_video_encoder(variant.name)
    if part == "vae":
        return build_vae(variant.vae)
    assert part == "vocoder", part
    return build_vocoder(variant.vocoder)


def _packaged_weights(variant: Variant, part: str) -> dict[str, Tensor]:
    """Return the weights that the package brings, float16, as ``scripts/train_tiny.py --export`` writes them.

    Raises:
        FileNotFoundError: the installation lacks them.
    """
    path = ASSETS / asset_name(variant.name, part)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the weights of {variant.name} are part of the package; install it again")
    return read_checkpoint(path)
