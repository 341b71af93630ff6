"""Preparation of a base training: the data sets, what is held out of them, and the generator to start from."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

import torch

from selva.data.dataset import ClipDataset, ConcatDataset
from selva.data.memmap.reader import MemmapDataset, is_memmap
from selva.data.mixture import MixedClips
from selva.models.generator import Generator
from selva.models.variants import Variant, get_variant
from selva.models.zoo import build_generator
from selva.training.base.config import AVERAGES, OPTIMISATION, PUBLISHED, BaseTrainConfig
from selva.training.base.mmaudio_files import read_checkpoint as read_mmaudio
from selva.training.base.mmaudio_files import read_weights
from selva.training.base.parallel import fill_
from selva.training.base.run import MOMENTS, BaseRun, described
from selva.training.base.statistics import latent_statistics
from selva.training.changed_settings import warn_of_changes
from selva.training.config import OBJECTIVE
from selva.training.power_ema import SIGMA_RELS
from selva.utils.distributed import World
from selva.utils.errors import UserError
from selva.utils.settings import settings_of, values_of
from selva.utils.text import counted, listed
from selva.weights.load import load_clip_text, load_generator, read_checkpoint

log = logging.getLogger(__name__)


# -- data --------------------------------------------------------------------------------------------------------------


def open_memmap(path: Path, variant: Variant) -> MemmapDataset:
    """Return the rows of a memmap.

    Raises:
        UserError: the folder is none, or one of another variant.
    """
    if not is_memmap(path):
        raise UserError(f"{path}: is no memmap; a base model is trained on those of extract_features.py --format "
                        "memmap or MMAudio's. scripts/convert_dataset.py makes one of a folder of .npz files")
    rows = MemmapDataset(path, variant)
    if edited := rows.edited:
        log.warning("%s: %s edited after the extraction, and text features are still those of before; extract again "
                    "with the new prompts: %s", path, counted(len(edited), "label was", "labels were"), listed(edited))
    return rows


def load_data(config: BaseTrainConfig) -> tuple[MixedClips, ClipDataset, list[MemmapDataset]]:
    """Return the rows to train on, those held out, and the whole sets.

    The last rows of every set are held out, unless ``--val_data`` names others: rows of one video follow each other in
    a set, so hardly any of these videos is trained on.
    """
    variant = get_variant(config.model.variant)
    sources = config.sources
    sets = [open_memmap(source.path, variant) for source in sources]
    held_out: list[ClipDataset] = [open_memmap(Path(path), variant) for path in config.val_data]
    trained: list[ClipDataset] = list(sets)
    if not config.val_data:
        counts = [min(config.hold_out, len(one) // 5) for one in sets]
        trained = [one.subset(range(len(one) - count)) for one, count in zip(sets, counts, strict=True)]
        held_out = [one.subset(range(len(one) - count, len(one))) for one, count in zip(sets, counts, strict=True)]
    val_clips = held_out[0]
    for more in held_out[1:]:
        val_clips = ConcatDataset(val_clips, more)
    if config.val_rows and len(val_clips) > config.val_rows:  # spread over all of them
        val_clips = val_clips.subset(i * len(val_clips) // config.val_rows for i in range(config.val_rows))
    clips = MixedClips(trained, sources, config.seed)
    for line in clips.lines():
        log.info("%s", line)
    log.info("%s rows in an epoch, %d held out%s", f"{clips.mixture.size:,}", len(val_clips),
             "" if len(val_clips) else ": overfitting will not be seen, and no samples are made")
    return clips, val_clips, sets


def data_state(clips: MixedClips) -> list[dict[str, Any]]:
    """Return a description of the data sets, by which a continued run knows that they are still the same."""
    return [
        {"path": str(source.path), "weight": source.weight, "rows": len(one),
         "ids": zlib.crc32("\n".join(one.ids).encode())}
        for source, one in zip(clips.sources, clips.sets, strict=True)
    ]


# Settings of the recipe that every resume may change: its length, how it is cut into passes, what is written when.
FREE_SETTINGS = ("steps", "micro_batch_size", "ema_every")


def check_resumable(path: Path, numbers: dict[str, Any], config: BaseTrainConfig, clips: MixedClips) -> None:
    """Raise a UserError if continuing would mix two trainings: other data, another objective, another model.

    Another rate, batch size and the like are allowed, and said.
    """
    if numbers["step"] > config.steps:
        raise UserError(f"{path}: is at step {numbers['step']} and --steps is {config.steps}; give a larger --steps")
    now = described(config)
    problems = [f"{name} was {was!r} and is {now.get(name)!r} now" for name, was in numbers["objective"].items()
                if now.get(name) != was]
    before, sets = numbers["data"], data_state(clips)
    if len(before) != len(sets):
        problems.append(f"there were {counted(len(before), 'data set')} and are {len(sets)} now")
    for was, one in zip(before, sets, strict=False):
        problems += [f"{one['path']}: {name} was {was[name]} and is {one[name]} now" for name in ("weight", "rows")
                     if was[name] != one[name]]
        if was["rows"] == one["rows"] and was["ids"] != one["ids"]:
            problems.append(f"{one['path']}: its rows have other ids than those of {was['path']}")
    if problems:
        raise UserError(f"{path}: continuing would mix two trainings: {'; '.join(problems)}. Use the same, or start a "
                        "new run from its weights: --init")
    recipe = [setting.name for setting in settings_of(BaseTrainConfig)
              if setting.info.group in (OPTIMISATION, OBJECTIVE, AVERAGES) or setting.name == "precision"]
    settings = values_of(config)
    warn_of_changes(path, numbers.get("settings", {}), {name: settings[name] for name in recipe}, BaseTrainConfig,
                    FREE_SETTINGS)


# -- model -------------------------------------------------------------------------------------------------------------


def start_generator(
    config: BaseTrainConfig, sets: list[MemmapDataset], device: torch.device, world: World
) -> Generator:
    """Return the generator to start from, float32, the same in every process.

    With ``--init`` everything comes from there. From scratch, weights are random by the seed, latents are normalised by
    the statistics of the video sets, and the empty text is that of the text encoder.

    Raises:
        UserError, FileNotFoundError: weights cannot be used.
    """
    variant, selva_dir = config.model.variant, config.model.selva_dir
    if config.init == PUBLISHED:
        return load_generator(variant, selva_dir).to(device)
    if config.init is not None:
        generator = build_generator(variant)
        try:
            path = Path(config.init)
            generator.load_published(read_checkpoint(path) if path.suffix == ".safetensors" else read_weights(path))
        except ValueError as error:
            raise UserError(f"--init {config.init}: {error}; expected a generator of {variant}") from error
        return generator.to(device)
    torch.manual_seed(config.seed)
    generator = build_generator(variant)
    with world.main_first("latent statistics"):  # the others find the files in memory already
        mean, std = latent_statistics(sets)
    with torch.no_grad():
        generator.latent_mean.copy_(mean)
        generator.latent_std.copy_(std)
        generator.empty_string_feat.copy_(load_clip_text(variant, selva_dir).encode([""])[0])
    return generator.to(device)


@torch.no_grad()
def go_on_from_mmaudio_(run: BaseRun, path: Path) -> None:
    """Go on from a training checkpoint of MMAudio's own trainer: weights, moments, averages, number of updates.

    It does not say which rows were seen; the run goes on where one with its own order of rows would be by now.

    Raises:
        UserError: the file is none, or of another variant, or this run trains other parameters or averages.
    """
    saved = read_mmaudio(path)
    widths = list(run.average.sigma_rels)
    problems = [f"{name} is {tuple(saved.weights[name].shape) if name in saved.weights else 'missing'}, expected "
                f"{tuple(p.shape)}" for name, p in run.parameters.items()
                if name not in saved.weights or saved.weights[name].shape != p.shape]
    if saved.tracks and widths != list(SIGMA_RELS):
        problems.append(f"its averages have the widths {list(SIGMA_RELS)} and --ema_sigma_rel is {widths}")
    if set(saved.moments["exp_avg"]) != set(run.trained) and saved.updates:
        problems.append("it trains other parameters; leave --trainable out")
    if problems:
        raise UserError(f"{path}: {problems[0]}" + (f", and {len(problems) - 1} more" if problems[1:] else ""))
    tensors = run.tensors()
    values = {f"model.{name}": value for name, value in saved.weights.items()}
    for moment in MOMENTS:
        values |= {f"{moment}.{name}": value for name, value in saved.moments[moment].items()}
    for number in range(len(widths)):
        track = saved.tracks[number] if saved.tracks else saved.weights
        values |= {f"ema{number}.{name}": track[name] for name in run.trained}
    for name, tensor in tensors.items():
        fill_(tensor, values[name])
    run.restore({
        **run.numbers(), "step": saved.updates, "updates": saved.updates,
        "place": saved.updates * run.config.batch_size, "ema": {"sigma_rels": widths, "step": saved.updates},
    })
    log.info("%s: going on from MMAudio's training after %s", path, counted(saved.updates, "update"))
