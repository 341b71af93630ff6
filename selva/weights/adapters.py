"""Adapter files of any program, and what base models say about them: opened, written, checked, baked.

The formats are those of :mod:`selva.lora.formats`; here are their files, and the layers of the base models.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selva.checkpoint import Adapter, load_adapter, save_adapter, why_native
from selva.lora.config import MAX_PROBLEMS
from selva.lora.formats import from_foreign, to_kohya, to_peft
from selva.lora.merge import RESIDUAL_SUFFIXES, clip_features_of, merge_adapters, update_weight
from selva.models.generator import COMPUTED_KEYS, Generator
from selva.models.variants import VARIANTS, get_variant
from selva.models.zoo import build_generator
from selva.utils.errors import UsageError, UserError
from selva.utils.files import atomic_path, atomic_write_text
from selva.utils.text import counted, listed, number_in
from selva.utils.torch_files import read_safetensors, read_torch, write_safetensors, write_torch
from selva.weights.find import (
    CLIP_FEATURES_KEY,
    asset_name,
    baked_clip_features,
    default_layout,
    find_weights,
    generator_change,
    generator_mark,
    local_path,
)
from selva.weights.load import load_generator, read_checkpoint

log = logging.getLogger(__name__)

FORMATS = ("selva", "comfyui", "peft", "kohya")
GENERATOR_SUFFIXES = (".pth", ".safetensors")
PEFT_TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"


# -- base models -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def layer_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Return the weight's shape of every linear layer and convolution of a variant's generator; reads no file."""
    with torch.device("meta"):
        generator = build_generator(variant)
    layers = ((name, module) for name, module in generator.named_modules()
              if isinstance(module, nn.Linear | nn.Conv1d))
    return {name: tuple(module.weight.shape) for name, module in layers}


def generator_file(source: Path, variant: str) -> Path:
    """Return the file of a generator, given itself or by a folder of weights as ``--selva_dir`` and bake name them.

    Raises:
        FileNotFoundError: it is not there.
    """
    known, path = get_variant(variant), source
    if source.is_dir() and known.packaged:
        path = source / asset_name(variant, "generator")
        if not path.is_file():
            raise FileNotFoundError(f"{source}: holds no {path.name}, expected a generator of {variant} as bake "
                                    "writes it; name the file itself, or nothing for the one inside the package")
    elif source.is_dir():
        (path,) = find_weights(known, source, ("generator",))["generator"]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def extracted_meta(tuned: Path, base: Path | None, variant: str) -> dict[str, Any]:
    """Return the settings of an adapter that is the difference of two generators, each as in :func:`generator_file`.

    They are the CLIP features that were baked into ``tuned``, if it says so, and a ``base`` of the user's own: a file
    under another name than the published one.
    """
    files = get_variant(variant).weight_files("generator")
    usual = files[0].name if files else asset_name(variant, "generator")
    own = base is not None and generator_file(base, variant).name != usual
    meta = {"variant": variant, CLIP_FEATURES_KEY: baked_clip_features(generator_file(tuned, variant)),
            "generator": generator_mark(base) if own else None}
    return {key: value for key, value in meta.items() if value is not None}


def generator_tensors(source: Path | None, variant: str) -> dict[str, Tensor]:
    """Return the tensors of a generator by their published names, mapped into memory where the format allows it.

    Args:
        source: a file or a folder, see :func:`generator_file`; None: the one inside the package.

    Raises:
        UserError: it is not a generator of this variant, or holds NaN or infinite values; names the tensors.
        FileNotFoundError: it is not there.
    """
    path = None if source is None else generator_file(source, variant)
    tensors = dict(load_generator(variant).state_dict()) if path is None else read_checkpoint(path)
    tensors = {key: value for key, value in tensors.items() if key not in COMPUTED_KEYS}
    with torch.device("meta"):
        expected = build_generator(variant).state_dict()
    wrong = [f"{key} is missing" for key in expected if key not in tensors and key not in COMPUTED_KEYS]
    wrong += [f"{key} is {tuple(value.shape)}" for key, value in tensors.items()
              if key not in expected or value.shape != expected[key].shape]
    if wrong:
        raise UserError(f"{path}: not a generator of {variant}: {listed(wrong, MAX_PROBLEMS)}")
    _check_finite(tensors, f"{path}: not a usable generator: there are")
    return tensors


def _check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise if a value is NaN or infinite; ``what`` begins the message."""
    broken = [key for key, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{what} NaN or infinite values in {listed(broken, MAX_PROBLEMS)}")


def bake(
    variant: str, selva_dir: Path | None, adapters: Iterable[tuple[Adapter, float]], output: Path,
    base: Path | None = None,
) -> tuple[Path, Generator]:
    """Write the generator with (adapter, strength) pairs merged, with its published keys.

    Adapters that were trained on another generator are named in the log. A ``.safetensors`` says in its header which
    CLIP features the adapters were trained with, and the engine follows it.

    Args:
        output: a folder, in which it gets its published name; or a file, ``.pth`` or ``.safetensors``.
        base: file of a generator of the user's own, in place of that of the variant.

    Returns:
        The path, and the generator itself.

    Raises:
        UserError: an adapter does not fit, adapters were trained with different CLIP features, values became infinite,
            or the output is the folder of the base model.
    """
    known, files = get_variant(variant), get_variant(variant).weight_files("generator")
    source = base = None if base is None else generator_file(base, variant)
    adapters = list(adapters)
    clip_features = baked_with(adapters, base)
    path = output
    if output.suffix not in GENERATOR_SUFFIXES:
        path = local_path(files[0], output, default_layout(output)) if files else output / asset_name(
            variant, "generator")
    if source is None and files:
        if selva_dir is None:
            raise UserError(f"the weights of {variant} are needed: give --selva_dir")
        (source,) = find_weights(known, selva_dir, ("generator",))["generator"]
    if source is not None and path.exists() and path.samefile(source):
        raise UserError(f"{path}: is the base model itself; name another --output")
    for adapter, _ in adapters:
        if change := generator_change(adapter.meta, base):
            log.warning("%s was trained on %s and is baked into %s (--base)", adapter.source, *change)
    original = {} if source is None else read_checkpoint(source)
    generator = load_generator(variant, selva_dir, file=base)
    merge_adapters(generator, adapters)
    state = generator.state_dict()
    _check_finite(state, f"{path}: not written: with {listed([a.source for a, _ in adapters])} it would hold")
    names = original or state
    tensors = {key: state[key].to(value.dtype) if key in state else value for key, value in names.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            header = {"format": "pt"} | ({CLIP_FEATURES_KEY: clip_features} if clip_features else {})
            write_safetensors({key: value.contiguous() for key, value in tensors.items()}, temporary, header)
        else:
            write_torch(tensors, temporary)
    return path, generator


def baked_with(adapters: Iterable[tuple[Adapter, float]], base: Path | None = None) -> str | None:
    """Return the ``--clip_features`` that base weights with (adapter, strength) pairs in them take; None if unsaid.

    Raises:
        UserError: the adapters were trained with different ones.
    """
    remedy = "one model can follow only one of them, so bake adapters that agree"
    return clip_features_of(adapters, remedy) or baked_clip_features(base)


# -- opening -----------------------------------------------------------------------------------------------------------


def open_adapter(path: Path, variant: str | None = None, fold: bool = False, *, any_variant: bool = False) -> Adapter:
    """Return the adapter in a file, or in a folder of PEFT.

    Args:
        variant: the base model, for formats that do not name it; it is then written into the adapter's meta.
        any_variant: allow an adapter that says it is for another variant; it goes on saying so.
        fold: see :func:`selva.lora.formats.with_one_scale`.

    Raises:
        UserError, FileNotFoundError: it is in no format known here, damaged, or of another variant.
    """
    adapter = _open(path, variant, fold)
    named = adapter.meta.get("variant")
    if named is not None and variant is not None and named != variant and not any_variant:
        raise UserError(f"{path}: was trained for variant {named}, not {variant}")
    if named is None and variant is not None:
        adapter = Adapter(adapter.tensors, {**adapter.meta, "variant": variant}, adapter.source)
    return adapter


def parse_strength(text: str) -> tuple[Path, float]:
    """Return the path and the strength of ``FILE`` or ``FILE:STRENGTH``, 1 by default.

    Raises:
        UserError: what stands after the last colon is no number, and there is no file of the whole name.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    strength = number_in(number)
    if not math.isfinite(strength):
        raise UserError(f"{text}: the strength is {number!r}, expected a number such as 0.8")
    return Path(name), strength


def _open(path: Path, variant: str | None, fold: bool) -> Adapter:
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        found = next((path / name for name in PEFT_TENSORS if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: a folder without {' or '.join(PEFT_TENSORS)}; expected "
                                    "the file of an adapter, or a folder of PEFT")
        path = found
    content: Mapping[str, Any]
    content, meta = read_safetensors(path) if path.suffix == ".safetensors" else (read_torch(path), {})
    inner: Any = content.get("state_dict")
    if isinstance(inner, Mapping):
        content, meta = inner, content.get("meta") or {}
    config = _read_peft_config(folder / PEFT_CONFIG)
    own = meta if isinstance(meta, Mapping) else {}
    kept = {key: value for key, value in own.items() if key not in ("format", "native_target")}
    known = variant or kept.get("variant")
    names = list(layer_shapes(known)) if isinstance(known, str) and known in VARIANTS else None
    foreign = from_foreign(content, str(path), peft_config=config, layer_names=names, meta=kept, fold=fold)
    if foreign is None:
        return load_adapter(path)
    broken = [key for key, value in foreign.tensors.items() if not value.isfinite().all()]
    if problems := foreign.problems() + [f"{key} holds NaN or infinite values" for key in broken]:
        raise UserError(f"{path}: {listed(problems, MAX_PROBLEMS)}")
    return Adapter(foreign.tensors, foreign.meta, str(path))


def _read_peft_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds a {type(config).__name__}, expected the settings of PEFT")
    return config


# -- writing -----------------------------------------------------------------------------------------------------------


def check_ending(path: Path, to: str) -> None:
    """Raise a UsageError if a path cannot be that of an adapter in one of :data:`FORMATS`."""
    assert to in FORMATS, to
    endings = {"selva": (".pt", ".pth", ".safetensors"), "comfyui": (".pt",), "kohya": (".safetensors",)}
    if to == "peft" and (path.is_file() or path.suffix in (".pt", ".safetensors")):
        raise UsageError(f"{path}: an adapter of PEFT is a folder; name one")
    if to != "peft" and path.suffix not in endings[to]:
        raise UsageError(f"{path}: the format {to} is written as {' or '.join(endings[to])}")


def write_adapter(adapter: Adapter, path: Path, to: str) -> Path:
    """Write an adapter in one of :data:`FORMATS`, read it back, and compare the update of every weight, bit for bit.

    Args:
        path: a .pt or .safetensors for "selva", a .pt for "comfyui", a .safetensors for "kohya", a folder for "peft".

    Raises:
        UserError: the format cannot hold this adapter, or it holds NaN or infinite values; names what.
    """
    check_ending(path, to)
    _check_finite(adapter.tensors, f"{path}: not written: there are")
    header = {"format": "pt", "meta": json.dumps(adapter.meta, allow_nan=False)}
    if to == "peft":
        tensors, config = to_peft(adapter)
        path.mkdir(parents=True, exist_ok=True)
        with atomic_path(path / PEFT_TENSORS[0]) as temporary:
            write_safetensors({key: value.contiguous() for key, value in tensors.items()}, temporary, header)
            # If it ends here, no settings are left, which is an error, instead of the old alpha for new tensors.
            (path / PEFT_CONFIG).unlink(missing_ok=True)
        atomic_write_text(path / PEFT_CONFIG, json.dumps(config, indent=2) + "\n")
    elif to == "kohya":
        tensors = to_kohya(adapter)
        rank, alpha = str(adapter.meta.get("rank", "")), str(adapter.meta.get("alpha", ""))
        extra = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha}
        with atomic_path(path) as temporary:
            write_safetensors({key: value.contiguous() for key, value in tensors.items()}, temporary, header | extra)
    else:
        if to == "comfyui" and (reason := why_native(adapter.tensors)):
            raise UserError(f"{adapter.source}: {reason}")
        save_adapter(path, adapter.tensors, adapter.meta, keep_scale=True)
    written = _open(path, None, False) if to != "kohya" else from_foreign(
        read_safetensors(path)[0], str(path), layer_names=adapter.layer_names())
    assert written is not None
    _check_same(adapter, written, path)
    return path


def _check_same(adapter: Adapter, written: Adapter, path: Path) -> None:
    """Raise unless a written adapter changes every weight by the same bits."""
    changed = [name for name in adapter.layer_names()
               if f"{name}.lora_A" not in written.tensors or not _is_same(adapter, written, name)]
    if changed or set(written.layer_names()) != set(adapter.layer_names()):
        raise UserError(f"{path}: written, but its update is not that of {adapter.source} to the last bit in "
                        f"{listed(changed, MAX_PROBLEMS)}")


def _is_same(adapter: Adapter, written: Adapter, name: str) -> bool:
    magnitude = f"{name}.lora_magnitude"
    if magnitude in adapter.tensors and not torch.equal(adapter.tensors[magnitude], written.tensors[magnitude]):
        return False
    first, second = (one.scale(name) * update_weight(*one.factors(name)) for one in (adapter, written))
    return torch.equal(first, second)


# -- checking ----------------------------------------------------------------------------------------------------------


def adapter_problems(adapter: Adapter, variant: str) -> list[str]:
    """Return the obstacles to using an adapter with a variant: layers it does not have, other sizes, its meta."""
    shapes, problems = layer_shapes(variant), adapter.problems()
    named = adapter.meta.get("variant")
    if named is not None and named != variant:
        problems.append(f"was trained for variant {named}")
    for name in adapter.layer_names() if not adapter.problems() else ():
        a, b = adapter.factors(name)
        if name not in shapes:
            problems.append(f"{variant} has no layer {name}")
        elif (len(b), *a.shape[1:]) != shapes[name]:
            problems.append(f"{name} is for a weight of {(len(b), *a.shape[1:])}, that of {variant} is {shapes[name]}")
    return problems


def loads_here(path: Path) -> bool:
    """Return True if ``infer.py`` takes a file that :func:`open_adapter` has opened as it is, without converting it."""
    try:
        load_adapter(path)
    except (OSError, ValueError):  # a folder of PEFT, or another program's names
        return False
    return True


def where_it_loads(adapter: Adapter, as_it_is: bool = True) -> list[str]:
    """Return one line for every program, whether it can use the adapter or why not.

    Args:
        as_it_is: False for a file in another program's format, which has to be converted for us and ComfyUI-SelVA.
    """
    relative = "changed base weights (PiSSA as published)" if adapter.is_pissa else ""
    dora = any(key.endswith(".lora_magnitude") for key in adapter.tensors)
    native = why_native(adapter.tensors)
    residual = sum(key.endswith(RESIDUAL_SUFFIXES) for key in adapter.tensors)
    here = "yes" if as_it_is else "yes, after convert --to selva"
    there = "yes, as .pt" if as_it_is else "yes, after convert --to comfyui"
    return [
        f"selva (infer.py): {here}" + (f", with {counted(residual, 'changed base tensor')}" if residual else ""),
        f"ComfyUI-SelVA: {f'no: {native}' if native else there}" + (
            ", by itself at strength 1 only" if relative and not native else ""),
        f"PEFT: {f'no: {relative}' if relative else 'yes, after convert --to peft'}",
        "kohya: " + (f"no: {relative}" if relative else "no: DoRA magnitudes" if dora else
                     "yes, after convert --to kohya"),
    ]
