"""Search for weight files, check that all are there, and identities of packaged ones; needs no PyTorch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selva.models.variants import PARTS, Variant, WeightFile, get_variant
from selva.utils.files import native_path, source_hash

LAYOUTS = ("comfyui", "selva")
SUBFOLDERS = ("", "ext", "weights", "ext_weights")
PARENTS_OF_ROOT = ("", "selva", "models/selva")  # a ComfyUI installation may be given from further up
NEIGHBOUR = "prismaudio"  # beside models/selva: another ComfyUI extension that brings the same Synchformer file
ASSETS = Path(__file__).parent / "assets"
CHECKOUT = Path(__file__).resolve().parents[2]  # or the folder that the package was installed into
DOWNLOAD_SCRIPT = "download_weights.py"
CLIP_FEATURES_KEY = "clip_features"  # in the header of a generator with adapters baked in


def weight_folders(selva_dir: Path) -> list[Path]:
    """Return the existing folders in which weights may lie, in the order of search.

    ``selva_dir`` may be the root of a layout, one of its subfolders, or a folder above ``models/selva``.
    """
    roots = [selva_dir / above for above in PARENTS_OF_ROOT]
    if selva_dir.resolve().name in SUBFOLDERS:
        roots.append(selva_dir.resolve().parent)
    folders = [root / sub for root in roots for sub in SUBFOLDERS]
    folders += [root.resolve().parent / NEIGHBOUR for root in roots]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def find_file(file: WeightFile, selva_dir: Path | None) -> Path | None:
    """Return the path of ``file``, None if it is missing; ``selva_dir`` goes before the Hugging Face cache."""
    names = (file.name, *file.alternatives)
    for folder in weight_folders(Path(selva_dir)) if selva_dir is not None else ():
        place = folder / file.folder_name if file.hub_folder else folder
        for name in names:
            if (place / name).is_file():
                return place / name
    if not file.hub_folder:
        return None
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        cached = try_to_load_from_cache(file.repo, name)
        if isinstance(cached, str):  # neither None nor the sentinel for "known not to exist"
            return Path(cached)
    return None


def default_layout(selva_dir: Path) -> str:
    """Return the layout that a folder has already, "comfyui" for a new or an empty one."""
    return "selva" if any((selva_dir / sub).is_dir() for sub in ("weights", "ext_weights")) else "comfyui"


def local_path(file: WeightFile, selva_dir: Path, layout: str) -> Path:
    """Return the path for a new copy of ``file`` in one of the LAYOUTS."""
    assert layout in LAYOUTS, layout
    if layout == "selva":
        folder = selva_dir / ("ext_weights" if file.external else "weights")
    else:
        # ComfyUI keeps the Synchformer beside the generators, the rest of the external files below.
        folder = selva_dir / "ext" if file.external and file.name != "synchformer_state_dict.pth" else selva_dir
    return (folder / file.folder_name if file.hub_folder else folder) / file.name


def download_command(variant: str, selva_dir: Path | None) -> str:
    """Return the command that fetches everything ``variant`` needs, as it works in the current folder.

    In a checkout the script is a file; where the package was installed, ``pip`` has put it on the PATH.
    """
    folder = "DIR" if selva_dir is None else shlex.quote(str(selva_dir))
    script = CHECKOUT / "scripts" / DOWNLOAD_SCRIPT
    if not script.is_file():
        command = DOWNLOAD_SCRIPT
    elif Path.cwd() == CHECKOUT:
        command = f"python scripts/{DOWNLOAD_SCRIPT}"
    else:
        command = f"python {shlex.quote(str(script))}"
    return f"{command} --variant {variant} --selva_dir {folder}"


def find_weights(variant: Variant, selva_dir: Path | None, needs: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Return the files of the parts in ``needs``; parts that the variant does not have, or brings along, have none.

    Raises:
        FileNotFoundError: names every missing file, what it is for, and the command that fetches them.
    """
    wanted = {part: variant.weight_files(part) for part in needs}
    found = {file: find_file(file, selva_dir) for files in wanted.values() for file in files}
    missing = [f"{file.name} ({file.purpose})" for file, path in found.items() if path is None]
    if missing:
        where = "no --selva_dir was given" if selva_dir is None else f"looked in {selva_dir}"
        if selva_dir is not None and not Path(selva_dir).is_dir():
            where += ", which is not a folder"
        raise FileNotFoundError(
            f"variant {variant.name} lacks {', '.join(missing)}; {where}; "
            f"fetch with: {download_command(variant.name, selva_dir)}"
        )
    paths = {file: path for file, path in found.items() if path is not None}
    return {part: tuple(paths[file] for file in files) for part, files in wanted.items()}


def check_weights(variant: str, selva_dir: Path | None, needs: Sequence[str] = PARTS) -> None:
    """Check that every file of the parts in ``needs`` exists. Cheap: no file is read.

    Raises:
        ValueError: unknown variant.
        FileNotFoundError: names every missing file, what it is for, and the command that fetches them.
    """
    find_weights(get_variant(variant), selva_dir, needs)


# -- the weights in the package ----------------------------------------------------------------------------------------


def asset_name(variant: str, part: str) -> str:
    """Return the file name of one part of a packaged variant in the package's folder of assets."""
    return f"{variant}_{part}.safetensors"


@functools.cache
def packaged_identity(variant: str) -> str:
    """Return 12 hexadecimal digits that change with any packaged weight of ``variant``."""
    digest = hashlib.sha256()
    for path in sorted(ASSETS.glob(asset_name(variant, "*"))):
        digest.update(f"{path.name} {source_hash(path)}".encode())
    return digest.hexdigest()[:12]


def encoders_identity(variant: Variant) -> str:
    """Return a name for a variant's encoders that changes with their features, to be stored beside features.

    Those of a packaged variant may change with the package. Whether files that were found are the published ones, only
    their content says, see :func:`weights_identity`.
    """
    return f"{variant.encoders} {packaged_identity(variant.name)}" if variant.packaged else variant.encoders


# -- weights that were found ------------------------------------------------------------------------------------------

_BLOCK_BYTES, _NUM_BLOCKS = 1 << 16, 32


def weights_identity(variant: Variant, selva_dir: Path | None, needs: Sequence[str]) -> str:
    """Return 16 hexadecimal digits that other weights do not share, even of the same names and sizes; "" for packaged.

    Raises:
        FileNotFoundError: as :func:`find_weights`.
    """
    if variant.packaged:
        return ""  # :func:`packaged_identity` knows them
    found = find_weights(variant, selva_dir, needs)
    marks = {part: [[path.name, content_mark(path)] for path in files] for part, files in found.items()}
    return hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()[:16]


def generator_mark(file: Path | None) -> dict[str, str] | None:
    """Return the name and the mark of a user's own generator, as adapters store it; None for that of the variant."""
    return None if file is None else {"name": Path(file).name, "mark": content_mark(Path(file))[:16]}


def baked_clip_features(file: Path | None) -> str | None:
    """Return the ``--clip_features``, "use" or "empty", of the adapters in a generator; None if it does not say.

    The header of a ``.safetensors`` that ``adapter.py bake`` wrote does; a ``.pth`` has no place for it.
    """
    if file is None or file.suffix != ".safetensors" or not file.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with native_path(file) as readable, safe_open(readable, framework="numpy") as opened:
            said = (opened.metadata() or {}).get(CLIP_FEATURES_KEY)
    except SafetensorError:  # it is told where its tensors are read
        return None
    return said if said in ("use", "empty") else None


def generator_change(meta: Mapping[str, Any], file: Path | None) -> tuple[str, str] | None:
    """Return the generator an adapter was trained on and the one in use, in words; None if they are the same.

    Args:
        meta: of the adapter. file: the user's own generator; None for that of the variant.
    """
    marks = meta.get("generator"), generator_mark(file)
    if len({(mark or {}).get("mark") for mark in marks}) == 1:
        return None
    before, now = ("the generator of the variant" if mark is None else f"{mark['name']} ({mark['mark']})"
                   for mark in marks)
    return before, now


def content_mark(path: Path) -> str:
    """Return a hash of a file's size and of 2 MB of it, beginning and end among them: weights differ everywhere."""
    status = path.stat()
    return _mark_of(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@functools.lru_cache(maxsize=256)
def _mark_of(path: Path, size: int, *_status: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - _BLOCK_BYTES)
    with open(path, "rb") as file:
        for position in sorted({last * number // (_NUM_BLOCKS - 1) for number in range(_NUM_BLOCKS)}):
            file.seek(position, os.SEEK_SET)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
