"""Averages of any width after the training, synthesised from the snapshots of a run; behind ``scripts/make_ema.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selva.checkpoint import load_adapter, save_adapter
from selva.training.base.mmaudio_files import write_weights
from selva.training.ema_snapshots import EXTRA_KEY, choose, find_snapshots, read_mmaudio_track, weighted_sum
from selva.training.power_ema import synthesis_error, synthesis_weights
from selva.utils.errors import UserError
from selva.utils.torch_files import read_torch


@dataclass(frozen=True)
class MadeAverage:
    """A file that was made.

    Attributes:
        step: after which the average was taken.
        used, found: snapshots it is the sum of, and all there were.
        error: share of the noise of single steps by which it differs from one that was tracked, from 0 to 1.
        adapter: True for an adapter, False for a generator.
    """

    path: Path
    step: int
    used: int
    found: int
    error: float
    adapter: bool


def make_average(folder: Path, sigma_rel: float, output: Path, step: int | None = None) -> MadeAverage:
    """Write the average of width ``sigma_rel`` at ``step`` (default: the newest): an adapter, or a generator.

    Args:
        folder: output folder of a run of ours or of MMAudio, or its ``ema_ckpts``.
        output: for an adapter ``.pt`` or ``.safetensors``, for a generator ``.pth`` or ``.safetensors``.

    Raises:
        FileNotFoundError, UserError: no snapshots, a step that is too late, a width that no power function has, damaged
            files, files of different runs, or ``output`` exists.
    """
    if output.exists():
        raise UserError(f"--output {output}: is there already; move it or choose another name")
    snapshots = find_snapshots(folder)
    step = max(one.step for one in snapshots) if step is None else step
    chosen = choose(snapshots, sigma_rel, step)
    places = [(one.step, one.sigma_rel) for one in snapshots]
    error = synthesis_error(places, synthesis_weights(places, step, sigma_rel), step, sigma_rel)
    first = chosen[0][0].path
    is_adapter = EXTRA_KEY not in read_torch(first, mmap=True)
    if is_adapter:
        adapters = [(one.path, load_adapter(one.path), factor) for one, factor in chosen]
        tensors = weighted_sum([(path, adapter.tensors, factor) for path, adapter, factor in adapters])
        newest = adapters[-1][1]
        save_adapter(output, tensors, {**newest.meta, "step": step, "sigma_rel": sigma_rel})
    else:
        write_weights(output, weighted_sum([(one.path, read_mmaudio_track(one.path), f) for one, f in chosen]))
    return MadeAverage(output, step, len(chosen), len(snapshots), error, is_adapter)
