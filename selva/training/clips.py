"""Clips of a run: data sets read and encoded, their prompts, what is held out of them, and how often each is used.

    --data_dir --load_clips--> sets --prompts of the run--> --held out--> clips to train on, as often as they weigh
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from selva.checkpoint import TrainingState
from selva.data.dataset import ClipDataset, ConcatDataset, NamedDataset, Subset
from selva.data.folder_dataset import FolderDataset, open_clip_dataset
from selva.data.memmap.reader import MemmapDataset
from selva.data.mixture import repeats_of, visits_of_sets
from selva.data.prompted import with_prompts
from selva.data.source import short_names
from selva.data.split import FEWEST, join_sets, origin_groups, share_of, split_sets, split_validation
from selva.data.summary import memmap_lines, summarise
from selva.models.variants import get_variant
from selva.training.config import RunConfig
from selva.training.shared import SharedParts
from selva.training.ways import SPLITS_BY_SET, WAYS, ways_of
from selva.utils.distributed import World
from selva.utils.errors import UserError
from selva.utils.files import real_path
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)

NAMED = 5  # clips in a message
TOLD = 50  # on the page of the run


def load_clips(
    config: RunConfig, data_dir: Path, device: torch.device, world: World, told: list[str] | None = None,
    shared: SharedParts | None = None,
) -> ClipDataset:
    """Return the clips of a data folder, encoded; every clip that cannot be used is named.

    Args:
        told: gets the lines about the data that the log gets; not those of clips that are shared.
        shared: of earlier runs, whose clips are taken if they are the same.

    Raises:
        ValueError: no clip can be used, or some cannot and ``--skip_invalid`` is not given.
    """
    key = (real_path(data_dir), config.model, config.duration, config.normalize_audio, config.skip_invalid)
    if shared is not None:
        return shared.clips(key, lambda: load_clips(config, data_dir, device, world, told))
    with world.main_first(f"reading {data_dir}"):  # rank 0 has noted all hashes when the others look
        clips, problems = open_clip_dataset(
            data_dir, get_variant(config.model.variant), config.model.selva_dir,
            max_duration_sec=config.duration, normalize_audio=config.normalize_audio, use_cache=not config.dry_run,
        )
    if isinstance(clips, FolderDataset):
        if world.size > 1:
            with world.at_once(f"encoding {data_dir}"):
                clips.encode_share(world.rank, world.size, device)
        with world.main_first(f"encoding {data_dir}"):  # what is left: texts, and what cannot be encoded
            problems += clips.prepare(device)
    reasons = [reason if str(path) in reason else f"{path}: {reason}" for path, reason in problems]
    for reason in reasons:
        if config.skip_invalid:
            log.warning("skipped: %s", reason)
        else:
            log.error("%s", reason)
    if world.is_main and isinstance(clips, FolderDataset) and len(clips):
        summary = summarise(clips, problems)
        for line in summary.lines():
            log.info("%s", line)
        for line in summary.warnings():
            log.warning("%s", line)
        if told is not None:
            told += [str(data_dir), *summary.lines(), *(f"warning: {line}" for line in summary.warnings())]
    if world.is_main and isinstance(clips, MemmapDataset) and len(clips):
        lines = memmap_lines(clips)
        for line in lines:
            log.info("%s", line)
        if told is not None:
            told += [str(data_dir), *lines]
    if told is not None and reasons:
        told += [f"skipped, as {'it' if len(reasons) == 1 else 'they'} cannot be used:",
                 *(f"  {reason}" for reason in reasons[:TOLD]),
                 *([f"  and {len(reasons) - TOLD} more, see the log"] if len(reasons) > TOLD else [])]
    if not len(clips):
        raise UserError(f"{data_dir}: no clip can be trained on; extract_features.py makes .npz + sound pairs")
    if problems and not config.skip_invalid:
        raise UserError(f"{data_dir}: {counted(len(problems), 'file')} cannot be used, see above; repair or remove "
                        "what is named there, or give --skip_invalid to train without it")
    return clips


def load_split(
    config: RunConfig, device: torch.device, world: World, saved: TrainingState | None = None,
    told: list[str] | None = None,
    shared: SharedParts | None = None,
) -> tuple[ClipDataset, ClipDataset]:
    """Return (training, held-out) clips, as ``--val_dir`` or ``--val_fraction`` divides them.

    Of several sets each has its own held-out clips. Of more than ``--val_clips`` held-out clips a seeded choice is
    returned, the same in every run on the same data.

    Args:
        saved: the state that is continued; the clips of a run that an earlier version began are divided as it did.
        told: gets the lines about the data that the log gets.
        shared: see :func:`load_clips`.
    """
    ways = WAYS if saved is None else ways_of(saved)
    several, by_set = ways["prompts"] == WAYS["prompts"], ways["split"] in SPLITS_BY_SET
    paths = [source.path for source in config.sources]
    sets = _load_sets(config, paths, device, world, told, shared, several)
    joined = join_sets(sets)
    if config.val_dir:
        train, held_out = range(len(joined)), []
        val_sets = _load_sets(config, config.val_dir, device, world, told, shared, several)
        val_clips = join_sets(val_sets)
    elif by_set:
        train, held_out = split_sets(sets, config.val_fraction, config.training.seed,
                                     spare_last=ways["split"] == WAYS["split"])
        val_clips = joined.subset(held_out)
    else:  # all sets as one
        by_origin = ways["split"] != "by clip"
        parts = split_validation(joined, config.val_fraction, config.training.seed, by_origin=by_origin)
        train, held_out = (_numbers(part) for part in parts)
        val_clips = parts[1]
    clips = joined.subset(train)
    log.info("%s to train on, %d held out: %s", counted(len(clips), "clip"), len(val_clips),
             listed(val_clips.ids, NAMED) if len(val_clips) else "overfitting will not be seen")
    if told is not None:
        told += ["held out for validation, not trained on: " + (listed(val_clips.ids, TOLD) or "nothing")]
    _report_origins(config, clips, val_clips)
    most = config.val_clips
    if most and len(val_clips) > most and ways["split"] != "by clip":
        log.info("validation is on %d of the %s, always the same; --val_clips 0 takes all",
                 most, counted(len(val_clips), "held-out clip"))
        val_clips = _fewer(val_clips, most, config.training.seed, by_set=by_set)
    uses = _uses(config, sets, train, held_out)
    lines = _lines(config, uses)
    for line in lines:
        log.info("%s", line)
    if told is not None and lines:
        told += ["use of the sets", *lines]
    if max(use.times for use in uses) == 1:
        return clips, val_clips
    times = [use.times for use in uses for _ in range(use.num_train)]
    if not by_set:  # as it was before
        return clips.subset(place for place, count in enumerate(times) for _ in range(count)), val_clips
    # In rounds, so that what takes the first clips of a set, as the sounds to preserve do, takes different ones.
    return clips.subset(place for turn in range(max(times)) for place, count in enumerate(times) if turn < count
                        ), val_clips


def num_distinct(clips: ClipDataset) -> int:
    """Return the number of clips of a set from :func:`load_split`, each counted once however often it is used."""
    return len(set(_numbers(clips)))


def _load_sets(
    config: RunConfig, paths: Sequence[Path], device: torch.device, world: World, told: list[str] | None,
    shared: SharedParts | None, several: bool,
) -> list[ClipDataset]:
    """Return the sets of these folders with the prompts of the run; of more than one, each has a name.

    Args:
        several: clips keep all of their prompts, not only their own.
    """
    sets: list[ClipDataset] = []
    for path, prefix in zip(paths, config.prefixes(len(paths)), strict=True):
        clips = load_clips(config, path, device, world, told, shared)
        assert isinstance(clips, FolderDataset | MemmapDataset)
        with world.main_first(f"encoding prompts of {path}"):
            sets.append(with_prompts(clips, get_variant(config.model.variant), config.model.selva_dir, device, prefix,
                                     several=several, use_cache=not config.dry_run))
    names = short_names(paths)  # the same name may be in several
    return sets if len(sets) == 1 else [NamedDataset(one, name) for one, name in zip(sets, names, strict=True)]


def _numbers(clips: ClipDataset) -> Sequence[int]:
    return clips.indices if isinstance(clips, Subset) else range(len(clips))


def _fewer(clips: ClipDataset, most: int, seed: int, *, by_set: bool) -> ClipDataset:
    """Return a seeded choice of clips, ``by_set`` equally many of every set, where there are so many."""
    order: list[int] = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed)).tolist()
    names = [clips.source(index) if by_set else "" for index in range(len(clips))]
    sizes = [names.count(name) for name in dict.fromkeys(names)]
    left = dict(zip(dict.fromkeys(names), share_of(sizes, most), strict=True))
    chosen = []
    for index in order:
        if left[names[index]] > 0:
            left[names[index]] -= 1
            chosen.append(index)
    return clips.subset(sorted(chosen))


# -- how often each set is used ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetUse:
    """Share of a data set in a run.

    Attributes:
        num_train, num_held_out: its clips. times: each is used in an epoch.
        weight: as given. prefix: of its prompts. prompts: of all its clips, the number of prompts.
    """

    path: Path
    num_train: int
    num_held_out: int
    times: int
    weight: float
    prefix: str
    prompts: tuple[int, ...]

    @property
    def draws(self) -> int:
        """The uses of its clips in an epoch."""
        return self.num_train * self.times


def _uses(
    config: RunConfig, sets: Sequence[ClipDataset], train: Sequence[int], held_out: Sequence[int]
) -> list[SetUse]:
    """Return the use of every set.

    Args:
        train, held_out: numbers of clips, counted through all sets.
    """
    set_of = [number for number, one in enumerate(sets) for _ in range(len(one))]
    counts, held = ([0] * len(sets) for _ in range(2))
    for indices, numbers in ((train, counts), (held_out, held)):
        for index in indices:
            numbers[set_of[index]] += 1
    weights = [source.weight for source in config.sources]
    times = visits_of_sets(counts, weights) if config.balance == "sets" else repeats_of(weights)
    return [
        SetUse(source.path, counts[number], held[number], times[number], source.weight, prefix.strip(),
               tuple(one.num_prompts(index) for index in range(len(one))))
        for number, (source, one, prefix) in enumerate(zip(
            config.sources, sets, config.prefixes(len(sets)), strict=True))
    ]


def _lines(config: RunConfig, uses: Sequence[SetUse]) -> list[str]:
    """Return a line for every set about its clips, weight, share, prefix and prompts; none for one plain set."""
    total, lines = sum(use.draws for use in uses), []
    for use in uses:
        parts = []
        if len(uses) > 1:
            held_out = "" if config.val_dir else f", {use.num_held_out} held out"
            parts.append(f"{counted(use.num_train, 'clip')} to train on{held_out}")
            parts.append(f"weight {use.weight:g}: each {counted(use.times, 'time')} in an epoch, "
                         f"{100 * use.draws / total:.0f} % of it")
        if use.prefix:
            parts.append(f"prompts begin with {use.prefix!r}")
        if any(count > 1 for count in use.prompts):
            several = [count for count in use.prompts if count > 1]
            parts.append(f"{counted(len(several), 'clip has', 'clips have')} several prompts (up to {max(several)}), "
                         "of which each use draws one")
        if parts:
            lines.append(f"{use.path}: {'; '.join(parts)}")
    shares = [use.draws / use.weight for use in uses]
    if config.balance == "clips" and max(shares) > 1.5 * min(shares):
        lines.append("the sets differ in size, and so do their shares: weights are those of single clips; to use the "
                     "sets equally often (or as they weigh), give --balance sets")
    without = [str(use.path) for use in uses if not use.num_held_out]
    if without and len(without) < len(uses) and not config.val_dir:
        lines.append(f"nothing is held out of {listed(without)} (fewer than {FEWEST} clips, or all of one video or of "
                     "one that is in another set): validation does not see it")
    return lines


def _report_origins(config: RunConfig, clips: ClipDataset, val_clips: ClipDataset) -> None:
    """Say which clips stay together in a split, and name held-out ones whose video or sound is trained on."""
    count = len(clips)
    groups = origin_groups(ConcatDataset(clips, val_clips))
    if not config.val_dir and config.val_fraction > 0 and len(groups) > len(set(groups)):
        log.info("%s of %s; clips of one video, or with the same sound, are held out together",
                 counted(len(groups), "clip is", "clips are"),
                 counted(len(set(groups)), "video or sound", "videos or sounds"))
        if not len(val_clips) and count >= 5:
            log.warning("nothing is held out: every video or sound has more than half of the clips, or all of a set; "
                        "give clips of another one with --val_dir")
    nameless = sum(not any(origin.startswith("source ") for origin in clips.origins(i)) for i in range(count))
    if not config.val_dir and len(val_clips) and nameless:
        log.info("%d of %s to train on: their video is not known, so a held-out clip may come from the same one",
                 nameless,
                 counted(count, "clip"))
    trained = set(groups[:count])
    leaked = [name for name, group in zip(val_clips.ids, groups[count:], strict=True) if group in trained]
    if leaked:
        log.warning("%s of a video or a sound that is trained on too, so the validation loss looks better than it is: "
                    "%s", counted(len(leaked), "held-out clip is", "held-out clips are"), listed(leaked, NAMED))
