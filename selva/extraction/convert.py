"""Conversion of data folders (clips with their sound) to memmaps (MMAudio's format, with latents instead) and back.

    folder of clip.npz + clip.wav --VAE, CLIP text--> memmap + table         (clips of 8 s)
    memmap + table --> folder of clip.npz with latents; on request, clip.flac decoded from them

Both ways do only what is missing or has changed, and name every clip that cannot be converted.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selva.audio.config import Normalize
from selva.data.dataset import TrainingClip
from selva.data.folder import scan_folder
from selva.data.latents import FRONT_END, SoundEncoder, load_waveform
from selva.data.memmap.labels import labels_or_fallback
from selva.data.memmap.reader import MemmapDataset
from selva.data.memmap.writer import MemmapWriter
from selva.data.padding import num_sound_frames
from selva.extraction.extractor import FeatureExtractor
from selva.extraction.pairs import same_samples
from selva.features import FeatureBundle, load_features, save_features
from selva.inputs.file_names import names_that_collide, same_name
from selva.inputs.prompts import PROMPTS_FILE, choose_prompt, read_prompts
from selva.inputs.suffixes import AUDIO_SUFFIXES
from selva.inputs.table import unsafe_id
from selva.media import audio_length, write_audio
from selva.models.prompt_length import warn_of_cut_prompts
from selva.models.vae import VAE
from selva.models.variants import Variant, features_problem
from selva.sampling import decode_latents
from selva.sequence import DEFAULT_DURATION_SEC, sequence_config
from selva.utils.errors import UserError
from selva.utils.files import PARTIAL_PREFIX, real_path, source_hash
from selva.utils.text import counted, listed
from selva.weights.find import encoders_identity, weights_identity
from selva.weights.load import load_vae, load_vocoder

log = logging.getLogger(__name__)

# Part of what decides whether a conversion is current; raise it when its result changes.
CONVERSION_VERSION = 1


@dataclass(frozen=True)
class Conversion:
    """Result of the conversion of one clip.

    Attributes:
        name: of the clip, or of the file that is none.
        made: files that were written; empty if it was current already, or could not be converted.
        problem: reason why it could not be converted; "" if it was.
    """

    name: str
    made: tuple[Path, ...] = ()
    problem: str = ""


Report = Callable[[Conversion], None]

# -- folder -> memmap --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConversionJob:
    """One clip of a data folder that is to be converted.

    Attributes:
        sound_path: None if there is none; the feature file holds its latents then.
        prompt: the words that the clip is trained with.
        has_text: the feature file holds the text features of that prompt.
    """

    id: str
    features_path: Path
    sound_path: Path | None
    prompt: str
    has_text: bool


def plan_folder(source: Path) -> tuple[list[ConversionJob], list[Conversion]]:
    """Return the clips of a data folder by name, and the files in it that belong to none.

    Raises:
        FileNotFoundError, ValueError: as :func:`selva.data.folder.scan_folder`, or there are no clips.
    """
    scan = scan_folder(source)
    clips = [
        ConversionJob(clip.id, clip.features_path, clip.audio_path, clip.prompt,
                   clip.text_shape is not None and clip.extracted_prompt == clip.prompt)
        for clip in scan.clips
    ]
    if several := [clip.id for clip in scan.clips if clip.other_prompts]:
        log.warning("%s: several prompts, of which a row of a memmap holds the last only; to train with all of them, "
                    "put a list of them beside the memmap, named as it with .prompts.txt behind", listed(several))
    if nameless := [clip.id for clip in scan.clips if clip.prompt_source == "folder"]:
        log.warning("%s without a prompt, so their prompt is the name of the folder, %r: %s",
                    counted(len(nameless), "clip"), real_path(source).name, listed(nameless))
    names = [path.name for path, _ in scan.skipped]
    prompts = read_prompts(source / PROMPTS_FILE, names) if (source / PROMPTS_FILE).is_file() else {}
    problems = []
    for path, reason in scan.skipped:
        bundle = _load_or_none(path)
        if bundle is not None and bundle.latent_mean is not None:  # needs no sound
            prompt, _ = choose_prompt(prompts.get(same_name(path.name)), bundle.prompt, source)
            has_text = bundle.text_features is not None and bundle.prompt == prompt
            clips.append(ConversionJob(path.stem, path, None, prompt, has_text))
        else:
            problems.append(Conversion(path.name, problem=f"{path}: {reason}"))
    if not clips:
        reason = f"; {problems[0].problem}" if problems else ""
        raise UserError(f"{source}: no clips in it, expected .npz files with their sound beside them{reason}")
    labels = labels_or_fallback(((clip.id, clip.prompt) for clip in clips), real_path(source).name)
    clips = [clip if clip.prompt == label else replace(clip, prompt=label, has_text=False)
             for clip, label in zip(clips, labels, strict=True)]
    return sorted(clips, key=lambda clip: clip.features_path.name), problems


def _load_or_none(path: Path) -> FeatureBundle | None:
    if path.suffix != ".npz":
        return None
    try:
        return load_features(path)
    except (ValueError, OSError):  # has been reported by the scan
        return None


def folder_to_memmap(
    clips: list[ConversionJob], target: Path, extractor: FeatureExtractor, normalize: Normalize, report: Report
) -> bool:
    """Write the clips of a data folder as a memmap; return True if it is there.

    Sound is encoded as for training, and texts where a feature file does not hold those of its prompt. Sound that is
    shorter than its features is padded with silence and named: the format has no lengths, so a row looks like 8 s of
    sound to everyone who trains on it.

    Args:
        target: folder of the memmap; its table comes to lie beside it.
        extractor: brings the variant, where its weights are, and the device.
        normalize: "peak" or "none", see :func:`selva.media.prepare_audio`.
        report: is told about every clip.

    Raises:
        ValueError: as :class:`selva.data.memmap.writer.MemmapWriter`, or no clip at all can be converted.
    """
    variant, sound = extractor.variant, SoundEncoder(extractor.variant, extractor.selva_dir, extractor.device)
    needs = {"vae": any(clip.sound_path for clip in clips), "clip_text": not all(clip.has_text for clip in clips)}
    weights = {part: _identity(variant, extractor.selva_dir, [part]) for part, needed in needs.items() if needed}
    settings = {"conversion_version": CONVERSION_VERSION, "variant": variant.name, "front_end": FRONT_END,
                "normalize": normalize}
    rows = [(clip.id, clip.prompt) for clip in clips]
    warn_of_cut_prompts(rows, variant.clip)
    with MemmapWriter(target, variant, rows, video=True, settings=settings) as writer:
        for index, clip in enumerate(clips):
            try:
                sound_hash = source_hash(clip.sound_path) if clip.sound_path else ""
                made_by = [*([weights["vae"]] if clip.sound_path else []),
                           *([] if clip.has_text else [weights["clip_text"]])]
                digest = _hash([source_hash(clip.features_path), sound_hash, clip.prompt, *made_by])
                if writer.is_current(index, digest):
                    report(Conversion(clip.id))
                    continue
                writer.write(index, _row(clip, sound_hash, extractor, sound, normalize), digest)
            except (ValueError, OSError) as error:
                writer.skip(index)
                report(Conversion(clip.id, problem=str(error)))
                continue
            report(Conversion(clip.id, made=(target,)))
        return writer.publish_if_complete()


def _row(
    clip: ConversionJob, sound_hash: str, extractor: FeatureExtractor, sound: SoundEncoder, normalize: Normalize
) -> dict[str, Tensor]:
    """Return one row of every tensor.

    Raises:
        ValueError, OSError: the clip cannot be used; names the file.
    """
    bundle, variant = load_features(clip.features_path), extractor.variant
    if problem := features_problem(bundle.variant, variant):
        raise UserError(f"{clip.features_path}: {problem}")
    if not bundle.has_video:
        raise UserError(f"{clip.features_path}: is sound without pictures, which is no row of a memmap with video; "
                        "extract_features.py --recordings makes a memmap of sound")
    if abs(bundle.duration - DEFAULT_DURATION_SEC) > 1e-6:
        advice = ("extract again with --windows" if bundle.duration > DEFAULT_DURATION_SEC
                  else "train on the folder, which takes clips of any length")
        raise UserError(f"{clip.features_path}: covers {bundle.duration:g} s, but a memmap holds clips of exactly "
                         f"{DEFAULT_DURATION_SEC:g} s; {advice}")
    if clip.sound_path is None or sound_hash == (bundle.settings or {}).get("decoded_sound_sha256"):
        mean, std = bundle.latent_mean, bundle.latent_std  # of the sound, not of what was decoded from them
        assert mean is not None and std is not None  # such files have latents
    else:
        mean, std = sound.encode(_waveform(clip.sound_path, variant, normalize))
    own_text = bundle.text_features if clip.has_text else None
    text = own_text if own_text is not None else extractor.text_features(clip.prompt)
    return {"mean": mean[0], "std": std[0], "text_features": text[0], "clip_features": bundle.clip_features[0],
            "sync_features": bundle.sync_features[0]}


def _waveform(path: Path, variant: Variant, normalize: Normalize) -> Tensor:
    try:
        waveform = load_waveform(path, sequence_config(variant.mode), normalize)
        sequence, (num_samples, rate) = sequence_config(variant.mode), audio_length(path)
        if num_sound_frames(num_samples / rate, 0.0, sequence) < sequence.latent_seq_len:
            log.warning("%s: only %.2f s of sound for features of %g s; the rest of its row is silence and is trained "
                        "on, as a memmap stores no lengths (a folder leaves the silence out of the loss)", path,
                        num_samples / rate, DEFAULT_DURATION_SEC)
        return waveform
    except ValueError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


# -- memmap -> folder --------------------------------------------------------------------------------------------------


class LatentDecoder:
    """Latents -> sound: VAE decoder and vocoder of a variant, in float32. ``identity`` changes with their weights."""

    def __init__(self, variant: Variant, selva_dir: Path | None, device: torch.device) -> None:
        self.identity = _identity(variant, selva_dir, ("vae", "vocoder"))
        self.device, self.rate = device, sequence_config(variant.mode).sampling_rate
        self.vae: VAE = load_vae(variant.name, selva_dir, device).drop_encoder()
        self.vocoder = load_vocoder(variant.name, selva_dir, device)

    def decode(self, latents: Tensor) -> Tensor:
        """Return (samples,) on the CPU from latents (N, C)."""
        (waveform,) = decode_latents(latents[None].to(self.device), self.vae, self.vocoder)
        return waveform.cpu()


def memmap_to_folder(
    rows: MemmapDataset, target: Path, variant: Variant, decoder: LatentDecoder | None, report: Report
) -> None:
    """Write the rows of a memmap as ``<id>.npz`` with latents, and text features unless the label was edited.

    Args:
        decoder: writes ``<id>.flac`` too, decoded from the latents: an approximation of the sound that was encoded.
        report: is told about every row.

    Raises:
        ValueError: a set of sound without pictures.
    """
    if not rows.has_video:
        raise UserError(f"{rows.folder}: is a set of sound without pictures; train on it as it is, or make .npz files "
                        "of its recordings (extract_features.py --sound_only)")
    target.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    replaced = dict((name, first) for first, name in names_that_collide(rows.ids, target))
    for index, clip_id in enumerate(rows.ids):
        problem = "the id comes more than once" if clip_id in seen else unsafe_id(clip_id)
        if problem is None and clip_id in replaced:
            problem = f"in {target} upper and lower case are the same, and it would replace {replaced[clip_id]!r}"
        seen.add(clip_id)
        if problem:
            report(Conversion(clip_id, problem=f"{rows.folder}, row {index} ({clip_id!r}): {problem}"))
            continue
        try:
            made = _write_clip(rows.clip(index), rows.prompts[index], rows.folder.name, target / f"{clip_id}.npz",
                               variant, decoder)
        except (ValueError, OSError) as error:
            report(Conversion(clip_id, problem=f"{rows.folder}, row {index} ({clip_id!r}): {error}"))
            continue
        report(Conversion(clip_id, made=made))
    _warn_of_leftovers(target, rows.folder.name, seen)
    if edited := rows.edited:
        video = "; the video features stay those of the label before" if variant.family == "selva" else ""
        log.warning("%s edited after the extraction, so no text features are written, which training makes of the new "
                    "words%s: %s", counted(len(edited), "label was", "labels were"), video, listed(edited))


def _warn_of_leftovers(target: Path, source: str, ids: Collection[str]) -> None:
    """Say which files are of rows that the memmap does not have any more: they would be trained on."""
    old = []
    for path in sorted(target.glob("*.npz")):
        if path.stem not in ids and not path.name.startswith("."):
            bundle = _load_or_none(path)
            if bundle is not None and (bundle.settings or {}).get("converted_from") == source:
                old.append(path.name)
    if old:
        log.warning("%s: %s: no longer in %s; delete them unless you want to train on them", target,
                    listed(old), source)


def _write_clip(
    clip: TrainingClip, label: str, source: str, path: Path, variant: Variant, decoder: LatentDecoder | None
) -> tuple[Path, ...]:
    """Write the files of one row; return those that were not current.

    Args:
        label: of the row in the table; text features that were made of another are left out.

    Raises:
        ValueError: values that are not finite, or a file of somebody else is in the way.
    """
    settings: dict[str, Any] = {"conversion_version": CONVERSION_VERSION, "converted_from": source,
                                "row_sha256": _row_hash(clip, label, variant)}
    found = _found_settings(path)
    is_current = found is not None and all(found.get(key) == value for key, value in settings.items())
    sound_path = path.with_suffix(".flac")
    sound = _beside(path, decoded=str((found or {}).get("decoded_sound_sha256", "")))
    bundle = FeatureBundle(
        clip_features=clip.clip_f[None], sync_features=clip.sync_f[None], duration=DEFAULT_DURATION_SEC,
        prompt=label, variant=variant.name, text_features=clip.text_f[None] if clip.prompt == label else None,
        latent_mean=clip.mean[None], latent_std=clip.std[None], settings=settings,
    )  # checked before a sound is decoded
    made: list[Path] = []
    if decoder is not None:
        settings["decoder"] = decoder.identity
        settings["decoded_from"] = _tensor_hash(clip.mean)
        if sound.is_decoded and all((found or {}).get(key) == settings[key] for key in ("decoder", "decoded_from")):
            settings["decoded_sound_sha256"] = sound.sha256
        else:
            settings["decoded_sound_sha256"], replaced = _decode(clip, sound, path, sound_path, decoder)
            made += [sound_path] if replaced else []
            is_current = False
    elif sound.is_decoded:
        assert found is not None  # it names the sound
        if found.get("decoded_from") == _tensor_hash(clip.mean) or is_current:
            settings |= {key: found[key] for key in ("decoder", "decoded_from", "decoded_sound_sha256") if key in found}
        else:
            log.warning("%s: removed: it was decoded from earlier latents of this row; --decode_audio makes it again",
                        sound_path)
            path.unlink()  # first, so that it never lies beside the sound of another row
            sound_path.unlink()
    if is_current:
        return ()
    save_features(path, bundle)
    return (path, *made)


def _decode(
    clip: TrainingClip, sound: _SoundBeside, path: Path, sound_path: Path, decoder: LatentDecoder
) -> tuple[str, bool]:
    """Write the decoded sound of a row; return its hash, and False where just that was there already.

    Raises:
        ValueError: a sound is there that no conversion has written.
    """
    if sound.of_others not in (None, sound_path):
        raise UserError(f"{sound.of_others}: is in the way, convert_dataset.py did not write it; move it, choose "
                        "another folder, or leave --decode_audio out to keep it as the sound of the clip")
    waveform = decoder.decode(clip.mean)
    with tempfile.TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=path.parent) as folder:
        fresh = Path(folder) / sound_path.name
        write_audio(fresh, waveform, decoder.rate)
        if sound_path.is_file() and same_samples(fresh, sound_path):  # as a run that was killed has left it
            return source_hash(sound_path), False
        if sound.of_others is not None:
            raise UserError(f"{sound_path}: is in the way, it is not, or no longer, what convert_dataset.py has "
                            "written; move it, choose another folder, or leave --decode_audio out to keep it as the "
                            "sound of the clip")
        path.unlink(missing_ok=True)  # first, so that a sound never lies beside the features of another row
        os.replace(fresh, sound_path)
    return source_hash(sound_path), True


@dataclass(frozen=True)
class _SoundBeside:
    """The sounds beside a feature file: ``of_others`` is one that no conversion has written, None without any.

    ``is_decoded``: the .flac is the one that the feature file says was decoded; ``sha256`` is its hash then.
    """

    is_decoded: bool = False
    sha256: str = ""
    of_others: Path | None = None


def _beside(path: Path, decoded: str) -> _SoundBeside:
    """Return the sounds beside a feature file; ``decoded`` is the hash that the file says of its .flac, or ""."""
    own, of_others = path.with_suffix(".flac"), None
    is_decoded = bool(decoded) and own.is_file() and source_hash(own) == decoded
    for other in sorted(path.parent.glob(f"{glob.escape(path.stem)}.*")):
        if other.suffix.lower() in AUDIO_SUFFIXES and other.stem == path.stem and not (is_decoded and other == own):
            of_others = other if of_others in (None, own) else of_others
    return _SoundBeside(is_decoded, decoded if is_decoded else "", of_others)


def _row_hash(clip: TrainingClip, label: str, variant: Variant) -> str:
    """Return a hash of everything that goes into a feature file, the label included."""
    texts = [clip.text_f] if clip.prompt == label else []
    tensors = (clip.mean, clip.std, *texts, clip.clip_f, clip.sync_f)
    return _hash([*map(_tensor_hash, tensors), label, variant.name])


def _tensor_hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _found_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings of a file that an earlier conversion has written; None if there is no file.

    Raises:
        ValueError: the file was not written by a conversion.
    """
    if not path.exists():
        return None
    settings = load_features(path).settings or {}
    if "converted_from" not in settings:
        raise UserError(f"{path} is in the way, it was not converted from a memmap; choose another folder")
    return settings


def _identity(variant: Variant, selva_dir: Path | None, parts: Sequence[str]) -> str:
    """Return a name that changes with the weights of the parts of a variant, packaged or found."""
    return f"{encoders_identity(variant)} {weights_identity(variant, selva_dir, parts)}".strip()


def _hash(values: list[str]) -> str:
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()
