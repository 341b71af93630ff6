"""Prompts of a run: those of a data set, with the prefix of the run, and all of a clip that has several.

    the set's own prompt, other prompts --prefix--> prompts of a clip; the first is validated with, training draws one

A data set has the features of one prompt per clip. Those of all others are made by the text encoder before the training
and kept in the set's cache. The video features stay those of the prompt that they were extracted with.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from selva.data.cache import CACHE_FOLDER, DataCache
from selva.data.dataset import ClipDataset, Subset, TrainingClip
from selva.data.folder_dataset import FolderDataset
from selva.data.memmap.reader import MemmapDataset, row_prompts_path
from selva.data.texts import TextFeatures
from selva.inputs.file_names import same_name
from selva.inputs.prompts import read_all_prompts
from selva.models.prompt_length import warn_of_cut_prompts
from selva.models.variants import Variant
from selva.utils.errors import UserError
from selva.utils.files import real_path
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)

NAMED = 5  # clips in a message


class PromptedDataset(Subset):
    """All clips of another set with the prompts of this run.

    Args:
        prompts: of every clip, at least one each. texts: holds the features of those that the set itself does not have.
    """

    def __init__(self, base: ClipDataset, prompts: Sequence[tuple[str, ...]], texts: TextFeatures) -> None:
        super().__init__(base, range(len(base)))
        self.prompts, self.texts = prompts, texts

    def clip(self, index: int, window: int = 0) -> TrainingClip:
        clip, prompt = self.base.clip(index, window), self.prompts[index][0]
        return clip if clip.prompt == prompt else replace(clip, prompt=prompt, text_f=self._features(prompt))

    def num_prompts(self, index: int) -> int:
        return len(self.prompts[index])

    def prompt(self, index: int, number: int) -> tuple[str, Tensor]:
        if number == 0:
            clip = self.clip(index)
            return clip.prompt, clip.text_f
        prompt = self.prompts[index][number]
        return prompt, self._features(prompt)

    def key(self, index: int) -> tuple[int, int]:
        return id(self), index

    def content(self, index: int) -> dict[str, str]:
        """Return the hashes of the set itself, with those of the prompts of this run in their order."""
        prompts = self.prompts[index]
        return {**self.base.content(index), "prompt": repr(prompts[0]) if len(prompts) == 1 else repr(prompts)}

    def _features(self, prompt: str) -> Tensor:
        try:
            return self.texts[prompt]
        except KeyError as error:
            raise UserError(f"{self.texts.cache.folder}: was changed since the start, the features of the prompt "
                            f"{prompt!r} are gone; leave it alone while training, and start again") from error


def with_prefix(prefix: str, prompt: str) -> str:
    """Return a prompt that begins with a prefix and a space; one that does already stays as it is."""
    prefix = prefix.strip()
    if not prefix or prompt == prefix or prompt.startswith(f"{prefix} "):
        return prompt
    return f"{prefix} {prompt}".rstrip()


def with_prompts(
    clips: FolderDataset | MemmapDataset, variant: Variant, selva_dir: Path | None, device: torch.device,
    prefix: str = "", *, several: bool = True, use_cache: bool = True,
) -> ClipDataset:
    """Return the clips of a data set with the prompts of a run; the set itself where they have these already.

    Args:
        device: where prompts are encoded that the cache lacks.
        prefix: put before every prompt, see :func:`with_prefix`. several: False takes one prompt per clip, its own.
        use_cache: False leaves a memmap without a cache beside it.
    """
    found = _listed_prompts(clips)
    own = clips.encoded_prompts if isinstance(clips, MemmapDataset) else [clip.files.prompt for clip in clips.clips]
    prompts = [tuple(dict.fromkeys(with_prefix(prefix, one) for one in (texts if several else texts[:1])))
               for texts in found]
    if all(texts == (one,) for texts, one in zip(prompts, own, strict=True)):
        return clips
    added = [(name, text) for name, texts, one in zip(clips.ids, prompts, own, strict=True)
             for number, text in enumerate(texts) if number or text != one]
    warn_of_cut_prompts(added, variant.clip)
    of_video = {name for name, _ in added} & _with_video(clips)
    if variant.family == "selva" and of_video:
        log.info("%s other prompts than at the extraction (a prefix, several prompts, or edited labels): the text "
                 "features follow them, the video features do not", counted(len(of_video), "clip has", "clips have"))
    if isinstance(clips, MemmapDataset):  # nothing may lie in its folder but what its readers expect there
        folder = real_path(clips.folder)
        cache = DataCache(folder.parent, use_cache, f"{folder.name}{CACHE_FOLDER}")
    else:
        cache = clips.cache
    features = TextFeatures(cache, variant, selva_dir)
    features.encode({text for _, text in added}, device)
    return PromptedDataset(clips, prompts, features)


def _with_video(clips: FolderDataset | MemmapDataset) -> set[str]:
    """Return the names of the clips that have pictures."""
    if isinstance(clips, FolderDataset):
        return {clip.files.id for clip in clips.clips if clip.files.has_video}
    return set(clips.ids) if clips.has_video else set()


def _listed_prompts(clips: FolderDataset | MemmapDataset) -> list[tuple[str, ...]]:
    """Return the prompts of every clip of a set, its own one first."""
    if isinstance(clips, FolderDataset):
        return [(clip.files.prompt, *clip.files.other_prompts) for clip in clips.clips]
    path = row_prompts_path(clips.folder)
    listed_there = read_all_prompts(path, clips.ids) if path.is_file() else {}
    keys = [f"{same_name(name)}.npz" for name in clips.ids]
    if unknown := sorted(name.removesuffix(".npz") for name in listed_there.keys() - set(keys)):
        log.warning("%s: of no row of %s: %s", path, clips.folder, listed(unknown, NAMED))
    found = [listed_there.get(key, (own,)) for key, own in zip(keys, clips.prompts, strict=True)]
    return [(texts[-1], *texts[:-1]) for texts in found]
