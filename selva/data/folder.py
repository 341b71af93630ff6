"""A data folder: feature files with their sound beside them, in the order of their names.

data/dog_001.npz   features         data/dog_001.wav   sound, same stem        data/prompts.txt   optional
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from selva.features import FeatureBundle, load_features
from selva.inputs.file_names import same_name
from selva.inputs.media_files import by_name, say_not_searched, visible_files
from selva.inputs.prompts import (
    PROMPTS_FILE,
    PromptSource,
    choose_prompt,
    read_all_prompts,
    warn_of_other_spelling,
)
from selva.inputs.suffixes import AUDIO_SUFFIXES
from selva.utils.errors import UserError
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.jsonl"  # of the extraction, where there was one

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class FolderClip:
    """One feature file and its sound.

    Attributes:
        id: stem of both files; the name of this clip in every later message, metric and file name.
        prompt: the words that the clip is trained with.
        prompt_source: where the prompt is from: prompts.txt, the feature file, or the name of the folder.
        extracted_prompt: the prompt that the sync features were extracted with; "" if unknown.
        extracted_for: the variant whose encoders made the features; "" if unknown.
        duration_sec: of the features.
        clip_shape, sync_shape: (tokens, width) of the features.
        text_shape: (77, width) of the text features of ``extracted_prompt``; None if the file holds none.
        features_hash: of the values of both features; equal for two copies of a video.
        source_sha256: of the video file that the clip is a part of; "" if the feature file does not say.
        other_prompts: further prompts from the same place, of which training draws one at each use.
        has_video: False for sound without pictures.
    """

    id: str
    features_path: Path
    audio_path: Path
    prompt: str
    prompt_source: PromptSource
    extracted_prompt: str
    extracted_for: str
    duration_sec: float
    clip_shape: tuple[int, int]
    sync_shape: tuple[int, int]
    text_shape: tuple[int, int] | None
    features_hash: str
    source_sha256: str = ""
    other_prompts: tuple[str, ...] = ()
    has_video: bool = True


@dataclass(frozen=True)
class FolderScan:
    """The content of a data folder.

    Attributes:
        clips: usable clips in the order of their file names.
        skipped: (file, reason) of everything that looks like part of a clip and cannot be used.
    """

    clips: list[FolderClip]
    skipped: list[tuple[Path, str]]


def scan_folder(data_dir: PathLike) -> FolderScan:
    """Return the clips of ``data_dir`` (not of its subfolders) and the files that had to be left out.

    A clip is ``X.npz`` with ``X.wav``, or another of ``AUDIO_SUFFIXES``, beside it; of several, the one that was
    extracted with the features. Its prompt is that of ``prompts.txt`` (the last line of its name), else the one it was
    extracted with, else the name of the folder. Every feature file is read and checked; sounds are only looked for.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: ``data_dir`` is a file, or ``prompts.txt`` is not text.
    """
    data_dir = Path(data_dir)
    if not data_dir.exists():
        raise FileNotFoundError(f"{data_dir}: no such folder")
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: is a file, expected a folder with .npz files and their sound")
    # Hidden files are nobody's clips: macOS leaves "._dog.npz" on foreign disks.
    files = sorted((path for path in visible_files(data_dir) if path.is_file()), key=lambda path: path.name)
    features = [path for path in files if path.suffix == ".npz"]
    sounds = by_name(files, AUDIO_SUFFIXES)

    say_not_searched(data_dir, (".npz",))
    names = [path.name for path in features]
    warn_of_other_spelling(data_dir)
    prompts = read_all_prompts(data_dir / PROMPTS_FILE, names) if (data_dir / PROMPTS_FILE).is_file() else {}
    unused_keys = sorted(set(prompts) - set(map(same_name, names)))
    if unused_keys:
        log.warning("%s: no such feature file: %s", data_dir / PROMPTS_FILE, ", ".join(unused_keys))

    clips: list[FolderClip] = []
    skipped: list[tuple[Path, str]] = []
    for path in features:
        if same_name(path.stem) not in sounds:
            skipped.append((path, f"no sound beside it ({path.stem}.wav, .flac or another kind of sound)"))
            continue
        try:
            bundle = load_features(path)
        except (ValueError, OSError) as error:
            skipped.append((path, str(error).removeprefix(f"{path}: ")))
            continue
        sound = _choose_sound(sounds[same_name(path.stem)], (bundle.origin or {}).get("sound", ""))
        *others, listed_last = prompts.get(same_name(path.name)) or (None,)
        prompt, source = choose_prompt(listed_last, bundle.prompt, data_dir)
        others = others if source == "prompts.txt" else bundle.other_prompts if source == "features" else ()
        clips.append(replace(_describe(path, sound, prompt, source, bundle), other_prompts=tuple(others)))

    stems = {same_name(path.stem) for path in features}
    for stem, paths in sounds.items():
        if stem not in stems:
            skipped += [(path, f"no features beside it ({stem}.npz)") for path in paths]
    _warn_of_leftovers(data_dir, [clip.features_path.name for clip in clips])
    return FolderScan(clips, skipped)


def _warn_of_leftovers(data_dir: Path, names: Sequence[str]) -> None:
    """Say which clips are not of the last extraction: it was not asked for them, or could not make them any more."""
    done, failed = set(), set()
    try:
        for line in (data_dir / MANIFEST_FILE).read_text(encoding="utf-8").split("\n"):
            row = json.loads(line or "{}")
            if row.get("status") == "done":
                done.update(row["files"])
            elif "id" in row:
                failed.add(f"{row['id']}.npz")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none, or that of another program
        return
    if not any(name in done for name in names):
        return
    for others, why in (
        ([name for name in names if name not in done and name in failed], "failed in the last extraction"),
        ([name for name in names if name not in done and name not in failed], "are not of the last extraction"),
    ):
        if others:
            log.warning("%d of %s %s (%s), but still there from earlier runs, and used: %s; extract_features.py "
                        "--prune removes them", len(others), counted(len(names), "clip"), why, data_dir / MANIFEST_FILE,
                        listed(others))


def sound_beside(features: Path) -> Path | None:
    """Return the sound that training takes for a feature file, None if there is none; says which others there are."""
    paths = by_name(visible_files(features.parent), AUDIO_SUFFIXES).get(same_name(features.stem))
    if not paths:
        return None
    try:
        extracted = (load_features(features).origin or {}).get("sound", "")
    except (ValueError, OSError):
        extracted = ""  # what is wrong with the features is said where they are used
    return _choose_sound(paths, extracted)


def _describe(path: Path, sound: Path, prompt: str, source: PromptSource, bundle: FeatureBundle) -> FolderClip:
    digest = hashlib.sha256(bundle.clip_features.numpy().data)
    digest.update(bundle.sync_features.numpy().data)
    return FolderClip(
        id=path.stem, features_path=path, audio_path=sound, prompt=prompt, prompt_source=source,
        extracted_prompt=bundle.prompt, extracted_for=bundle.variant, duration_sec=bundle.duration,
        clip_shape=_token_shape(bundle.clip_features), sync_shape=_token_shape(bundle.sync_features),
        text_shape=None if bundle.text_features is None else _token_shape(bundle.text_features),
        features_hash=digest.hexdigest(), source_sha256=bundle.source_sha256, has_video=bundle.has_video,
    )


def _token_shape(features: Tensor) -> tuple[int, int]:
    _, tokens, width = features.shape
    return tokens, width


def _choose_sound(paths: list[Path], extracted: str) -> Path:
    """Return the sound that was extracted with the features, else the first kind; say which others there are."""
    def rank(path: Path) -> tuple[bool, int, str]:
        return path.name != extracted, AUDIO_SUFFIXES.index(path.suffix.lower()), path.name

    ranked = sorted(paths, key=rank)
    if len(ranked) > 1:
        others = ", ".join(path.name for path in ranked[1:])
        log.warning("%s is used as the sound of %s, not %s", ranked[0].name, ranked[0].stem, others)
    return ranked[0]
