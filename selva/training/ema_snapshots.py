"""Snapshots of averages by power functions: files in MMAudio's layout, thinning, synthesis of other widths.

    ema_ckpts/0.5000.pt     track 0 after 5000 updates, 1.5000.pt: track 1 ...
    ema_ckpts/tracks.json   {"sigma_rels": [0.05, 0.1]}; without it the widths are MMAudio's

A snapshot of a base model is MMAudio's: {"_extra_state": {"initted", "step"}, "ema_model.<name>": tensor}, all
parameters. One of an adapter is an adapter file, which can be used as it is.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selva.training.power_ema import SIGMA_RELS, UNUSED, PowerEMA, synthesis_weights
from selva.utils.errors import UsageError, UserError
from selva.utils.files import atomic_path, atomic_write_text, why_not_written
from selva.utils.text import counted, listed
from selva.utils.torch_files import read_torch, write_torch

log = logging.getLogger(__name__)

FOLDER, TRACKS_FILE = "ema_ckpts", "tracks.json"
SNAPSHOT_FILE = re.compile(r"(\d+)\.(\d+)\.pt")
EXTRA_KEY, PREFIX = "_extra_state", "ema_model."
KEPT = 40  # snapshots of a run, after which other widths are right to 3e-5 to 7e-4; see docs/base_training.md


@dataclass(frozen=True)
class Snapshot:
    """One file: an average of width ``sigma_rel`` after ``step`` updates."""

    path: Path
    track: int
    step: int
    sigma_rel: float


# -- writing -----------------------------------------------------------------------------------------------------------


def snapshot_path(folder: Path, track: int, step: int) -> Path:
    """Return the name of a snapshot in ``folder``."""
    return folder / f"{track}.{step}.pt"


def write_tracks(folder: Path, sigma_rels: Sequence[float]) -> None:
    """Write down the widths of the tracks whose snapshots lie in ``folder``."""
    atomic_write_text(folder / TRACKS_FILE, json.dumps({"sigma_rels": list(sigma_rels)}) + "\n")


def mmaudio_track(values: Mapping[str, Tensor], step: int) -> dict[str, object]:
    """Return one track in the form in which MMAudio stores it: every parameter in float32 on the CPU."""
    tensors = {PREFIX + name: value.detach().to("cpu", torch.float32).contiguous() for name, value in values.items()}
    return {EXTRA_KEY: {"initted": True, "step": step}, **tensors}


def write_snapshot(folder: Path, track: int, step: int, values: Mapping[str, Tensor]) -> Path:
    """Write one track of a base model's averages, all parameters by name, whole or not at all; return the path."""
    path = snapshot_path(folder, track, step)
    with atomic_path(path) as temporary:
        write_torch(mmaudio_track(values, step), temporary)
    return path


def write_snapshots(folder: Path, average: PowerEMA) -> list[Path]:
    """Write the snapshots of a base model's averages, one file for every track."""
    write_tracks(folder, average.sigma_rels)
    return [write_snapshot(folder, track, average.step, average.values(track)) for track in range(len(average.tracks))]


def snapshot_interval(steps: int, kept: int = KEPT) -> int:
    """Return the steps between snapshots of a run of ``steps``, such that there are at most ``kept``, evenly spaced."""
    return -(-steps // kept)


def interval_of(folder: Path) -> int:
    """Return the steps between the snapshots in ``folder``, which must have some.

    The newest need not be one of them: a run writes one at its end, whatever the step. A run that goes on has to keep
    this distance, as snapshots at multiples of another one would be thinned away.
    """
    steps = sorted({one.step for one in find_snapshots(folder)})
    return math.gcd(*(steps[:-1] or steps))


def thin_snapshots(folder: Path, every: int, kept: int = KEPT) -> list[Path]:
    """Delete snapshots until at most ``kept`` steps are left, evenly spaced, and the newest; return what was deleted.

    The distance doubles as often as that takes. What stays depends on the newest step alone, so a run that was stopped
    and resumed ends with the same files. (At equal numbers, even spacing is closer to a directly tracked average than
    spacing by ratios.)

    Args:
        every: steps between the snapshots that are written.
    """
    found = find_snapshots(folder)
    newest = max(snapshot.step for snapshot in found)
    spacing = every
    while newest // spacing > kept:
        spacing *= 2
    deleted = []
    for path in (one.path for one in found if one.step % spacing and one.step != newest):
        try:
            path.unlink()
        except OSError as error:  # on Windows, while another program reads it
            log.warning("%s: not deleted, %s; it is tried again at the next snapshot", path, why_not_written(error))
        else:
            deleted.append(path)
    return deleted


# -- reading -----------------------------------------------------------------------------------------------------------


def find_snapshots(folder: Path) -> list[Snapshot]:
    """Return the snapshots in ``folder``, or in ``folder/ema_ckpts``, by step and track.

    Raises:
        UserError: there are none, or their widths cannot be told.
    """
    place = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    files = [(int(m[1]), int(m[2]), path) for path in place.glob("*.pt") if (m := SNAPSHOT_FILE.fullmatch(path.name))]
    if not files:
        raise UserError(f"{folder}: no snapshots of averages there, expected {FOLDER}/0.<step>.pt; --ema power of "
                        "train_lora.py, and the training of a base model, write them")
    widths: Sequence[float] = SIGMA_RELS
    tracks = place / TRACKS_FILE
    if tracks.is_file():
        try:
            widths = [float(width) for width in json.loads(tracks.read_text(encoding="utf-8"))["sigma_rels"]]
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"{tracks}: damaged ({error}), expected {{\"sigma_rels\": [0.05, 0.1]}}") from error
    if (most := max(track for track, _, _ in files)) >= len(widths):
        raise UserError(f"{place}: has snapshots of track {most} but {counted(len(widths), 'width')}; expected "
                        f"{TRACKS_FILE} to name the width of every track")
    found = [Snapshot(path, track, step, widths[track]) for track, step, path in files]
    return sorted(found, key=lambda one: (one.step, one.track))


def choose(snapshots: Sequence[Snapshot], sigma_rel: float, step: int | None = None) -> list[tuple[Snapshot, float]]:
    """Return the snapshots that the average of width ``sigma_rel`` at ``step`` (default: the newest) is the sum of.

    Each with its factor; those whose factor is 0 are left out, so an average that was tracked is one snapshot.

    Raises:
        UsageError: ``step`` is later than the newest snapshot, or below 1.
    """
    newest = max(snapshot.step for snapshot in snapshots)
    step = newest if step is None else step
    if not 1 <= step <= newest:
        raise UsageError(f"--step {step}: the snapshots go up to step {newest}")
    weights = synthesis_weights([(one.step, one.sigma_rel) for one in snapshots], step, sigma_rel)
    return [(one, float(w)) for one, w in zip(snapshots, weights, strict=True) if abs(w) > UNUSED]


def read_mmaudio_track(path: Path) -> dict[str, Tensor]:
    """Return the parameters in a snapshot of a base model, by their names in the model.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, or no such snapshot.
    """
    content = read_torch(path, mmap=True)
    tensors = {name.removeprefix(PREFIX): x for name, x in content.items() if name.startswith(PREFIX)}
    state = content.get(EXTRA_KEY)
    if not isinstance(state, Mapping) or not tensors or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise UserError(f"{path}: not a snapshot of a base model's average, expected {EXTRA_KEY} and {PREFIX}<name>")
    return tensors


def weighted_sum(parts: Sequence[tuple[Path, Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """Return the sum of tensors by name times factors; what the factors lack to 1 goes to the part with the largest.

    So constants (latent statistics, the empty text, frozen layers) stay exactly what they are, in single elements too.
    MMAudio's program multiplies everything by the sum of the factors, 1.005 or 0.979 with five snapshots; where
    weights have a value of their own beside the noise of training, that is 10 times further from a tracked average.
    (With the 60 snapshots of a full run the sum is 1 to 4e-6, and the two agree.)

    Of tensors that are mapped from files, one name at a time is in memory.

    Args:
        parts: (file, its tensors, factor) of each.

    Raises:
        UserError: names or shapes of the tensors are not the same in all parts.
    """
    chief = max(range(len(parts)), key=lambda number: abs(parts[number][2]))
    name_of_chief, reference, _ = parts[chief]
    others = [part for number, part in enumerate(parts) if number != chief]
    for path, tensors, _ in others:
        other = reference.keys() ^ tensors.keys()
        other |= {name for name in reference.keys() & tensors.keys() if tensors[name].shape != reference[name].shape}
        if other:
            raise UserError(f"{path}: is of another run than {name_of_chief.name}: {listed(sorted(other), 5)} differ "
                            "in name or shape")
    result = {}
    for name, x in reference.items():
        base = x.double()
        total = base.clone()
        for _, tensors, factor in others:
            total.add_(tensors[name].double() - base, alpha=factor)
        result[name] = total.to(x.dtype)
    return result
