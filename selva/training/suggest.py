"""Settings that suit a data folder and a machine, each with its reason; behind ``scripts/suggest_config.py``.

Rules of thumb: those of the presets in configs/ by the number of clips, and the memory of a step as it is computed by
:mod:`selva.training.memory`. A start, not a measurement of this data.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selva.data.folder import FolderClip, scan_folder
from selva.data.memmap.reader import is_memmap
from selva.lora.config import LoRAConfig, expand_targets
from selva.models.variants import VARIANTS, features_problem
from selva.sequence import DEFAULT_DURATION_SEC
from selva.training.config import RunConfig, TrainConfig
from selva.training.memory import has_several_lengths, largest_batch, step_memory, usable_bytes
from selva.utils.errors import UserError
from selva.utils.settings import settings_text, values_of
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)

FEW, MANY = 20, 100  # clips, below and from which the presets few_clips and long_run are meant
# What teaches the built-in model a sound, as configs/tiny_new_sound.yaml has it; the rest is for the published models.
BUILT_IN = {"rank": 16, "target": ["all+text"], "lr": 1.5e-3, "lr_schedule": "cosine", "lora_plus_ratio": 8.0,
            "steps": 500, "warmup_steps": 20, "batch_size": 8, "precision": "fp32"}
PATIENCE = 5  # validations
HELD_OUT_FROM = 5  # clips; below, nothing is held out
GIB = 2**30


@dataclass(frozen=True)
class Suggestion:
    """One setting of ``train_lora.py`` and the reason for its value."""

    name: str
    value: Any
    reason: str


def suggest(data_dir: Path, variant: str | None, gpu_bytes: int | None) -> list[Suggestion]:
    """Return settings for the clips of a folder on a machine.

    Args:
        variant: None takes the one that the features were made for.
        gpu_bytes: free memory of the GPU; None for a training on the CPU.

    Raises:
        UserError: the folder has no usable clip, or its features do not say one variant.
    """
    scan = scan_folder(data_dir)
    clips, left_out = scan.clips, f", {counted(len(scan.skipped), 'file')} cannot be used" if scan.skipped else ""
    if not clips:
        raise UserError(f"{data_dir}: no clip can be trained on; extract_features.py makes .npz + sound pairs")
    extracted_for = sorted({clip.extracted_for for clip in clips if clip.extracted_for})
    if variant is None and len(extracted_for) != 1:
        found = listed(extracted_for) or "no variant that they name"
        raise UserError(f"{data_dir}: its features were made for {found}; give the --variant to train")
    chosen = variant or extracted_for[0]
    if chosen not in VARIANTS:
        raise UserError(f"{data_dir}: its features are for {chosen}, which is no variant here; give --variant")
    why = "as asked for" if variant else "the features were made for it"
    unfit = [problem for made_for in extracted_for if (problem := features_problem(made_for, VARIANTS[chosen]))]
    if unfit:  # settings can be planned before that, but not trained with
        log.warning("%s: these features cannot be trained on with %s: %s", data_dir, chosen, "; ".join(unfit))
        why += f"; but the features there are {unfit[0]}"
    seconds = sum(clip.duration_sec for clip in clips)
    found = [Suggestion("data_dir", [str(data_dir)], f"{counted(len(clips), 'usable clip')}, {seconds:.0f} s in "
                                                     f"all{left_out}"),
             Suggestion("variant", chosen, why)]
    if VARIANTS[chosen].packaged:
        return found + _for_built_in(len(clips))
    found += _by_number(len(clips))
    settings = {one.name: one.value for one in found}
    return found + _by_machine(chosen, settings, gpu_bytes, clips)


def _by_number(count: int) -> list[Suggestion]:
    """Return the settings that follow from the number of clips."""
    few, many = count < FEW, count >= MANY
    why = f"{counted(count, 'clip')}: " + (
        f"below {FEW} they are soon learned by heart (configs/few_clips.yaml)" if few
        else f"from {MANY} on there is more to learn (configs/long_run.yaml)" if many
        else f"between {FEW} and {MANY} the default suits")
    default = TrainConfig()
    steps = 1500 if few else 10_000 if many else default.steps
    found = [Suggestion("rank", 32 if many else LoRAConfig.rank, why if many else "a smaller one learns more slowly"),
             Suggestion("steps", steps, why),
             Suggestion("warmup_steps", steps // 20, "a twentieth of the steps"),
             Suggestion("save_every", max(1, steps // 4), "four checkpoints, each with a sample to listen to")]
    if many:
        found += [Suggestion("lr_schedule", "cosine", "a rate that falls to zero keeps more of what the model knows")]
    if count < HELD_OUT_FROM:
        return [*found, Suggestion("val_fraction", 0.0, f"fewer than {HELD_OUT_FROM} clips: all are needed to train, "
                                                        "and overfitting will not be seen; listen to the samples")]
    fraction = 0.15 if few else 0.1
    held_out = f"{max(1, round(fraction * count))} of {counted(count, 'clip')} held out"
    found += [Suggestion("val_fraction", fraction, held_out),
              Suggestion("val_every", 50 if few else 100, "often enough to see when it begins to learn by heart")]
    if few:
        found += [Suggestion("patience", PATIENCE, "ends the run after so many validations without a better one")]
    return found


def _for_built_in(count: int) -> list[Suggestion]:
    """Return the settings for the model that is built in, which fits into any memory."""
    why = "as configs/tiny_new_sound.yaml, which also lists the sounds that the model knows, to be preserved"
    settings = {**BUILT_IN, "batch_size": min(BUILT_IN["batch_size"], count)}
    return [Suggestion(name, value, "the same" if number else why)
            for number, (name, value) in enumerate(settings.items())]


def _by_machine(
    variant: str, settings: dict[str, Any], gpu_bytes: int | None, clips: list[FolderClip]
) -> list[Suggestion]:
    """Return batch, accumulation and checkpointing for the memory that is there; updates of 4 clips in any case."""
    wanted = min(TrainConfig.batch_size, len(clips))
    if gpu_bytes is None:
        return [Suggestion("batch_size", wanted, "no GPU here: the number of clips per update that suits most")]
    durations = [clip.duration_sec for clip in clips]
    longest = min(DEFAULT_DURATION_SEC, max(durations))
    several_lengths = has_several_lengths(durations, VARIANTS[variant], DEFAULT_DURATION_SEC)

    def most(checkpointing: bool) -> int:
        training = TrainConfig()
        peaks = {size: step_memory(
            variant, LoRAConfig(rank=settings["rank"]), dataclasses.replace(training, batch_size=size), torch.bfloat16,
            duration_sec=longest, num_clips=len(clips), checkpoint_blocks=checkpointing, graphs=True,
            several_lengths=several_lengths).peak for size in (1, 4)}
        return largest_batch(peaks, usable_bytes(gpu_bytes))

    return fitting(wanted, most, gpu_bytes, longest)


def fitting(wanted: int, most: Callable[[bool], int], gpu_bytes: int, longest: float) -> list[Suggestion]:
    """Return the settings with which updates of ``wanted`` clips fit into memory, the quickest first.

    Args:
        most: returns the largest batch, without and with checkpointing.

    Raises:
        UserError: not even one clip fits.
    """
    where = f"{gpu_bytes / GIB:.1f} GiB, clips of {longest:g} s"
    plain = most(False)
    if plain >= wanted:
        return [Suggestion("batch_size", wanted, f"fits into {where}, which has room for {plain}")]
    recomputed = most(True)
    if not recomputed:
        raise UserError(f"not even one clip fits into {where}; take a smaller --variant, or a CPU")
    batch = max(plain, min(recomputed, wanted))
    found = [Suggestion("batch_size", batch, f"more do not fit into {where}")]
    if batch < wanted:
        found.append(Suggestion("grad_accum", -(-wanted // batch), f"so an update is of {counted(wanted, 'clip')} or "
                                                                   "more"))
    if batch > plain:
        found.append(Suggestion("grad_checkpointing", True, f"without it {plain} per batch at most: less memory for "
                                                            "more time"))
    return found


def advice(config: RunConfig, gpu_bytes: int | None) -> list[str]:
    """Return a line for every setting of a run that is not the suggested one, for each of its data folders.

    Raises:
        UserError: a folder has no usable clip, or files that cannot be used while ``skip_invalid`` is not given.
    """
    values, lines = values_of(config), []
    for source in config.sources:
        if is_memmap(source.path):
            lines.append(f"{source.path}: a packed data set; no suggestions for its number of rows")
            continue
        skipped = scan_folder(source.path).skipped
        if skipped and not config.skip_invalid:
            raise UserError(f"{source.path}: {counted(len(skipped), 'file')} cannot be used: "
                            f"{listed([f'{path.name}: {reason}' for path, reason in skipped])}; repair or remove them, "
                            "or give --skip_invalid")
        for one in suggest(source.path, config.model.variant, gpu_bytes):
            wanted = list(expand_targets(one.value)) if one.name == "target" else one.value
            if one.name != "data_dir" and values[one.name] != wanted:
                lines.append(f"{one.name} is {values[one.name]}, suggested {one.value}: {one.reason}")
    return list(dict.fromkeys(lines))


def free_gpu_memory() -> int | None:
    """Return the free bytes of the GPU; None without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def as_yaml(suggestions: list[Suggestion]) -> str:
    """Return a settings file with the reason behind every line."""
    lines = []
    for one in suggestions:
        first, *rest = settings_text({one.name: one.value}).rstrip("\n").split("\n")
        lines += [f"{first}  # {one.reason}", *rest]
    return "\n".join(lines) + "\n"
