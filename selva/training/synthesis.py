"""Averages of any width after the training, synthesised from the snapshots of a run; behind ``scripts/make_ema.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selva.checkpoint import load_adapter, save_adapter
from selva.training.base.mmaudio_files import write_weights
from selva.training.ema_snapshots import EXTRA_KEY, choose, find_snapshots, read_mmaudio_track, weighted_sum
from selva.training.power_ema import exponent, synthesis_error, synthesis_weights
from selva.utils.errors import UsageError, UserError
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
        UsageError: a step that is too late, a width that no power function has, or an ``output`` that exists or is of
            no format.
        FileNotFoundError, UserError: no snapshots, damaged files, or files of different runs.
    """
    if output.exists():
        raise UsageError(f"--output {output}: is there already; move it or choose another name")
    try:
        exponent(sigma_rel)
    except UserError as error:
        raise UsageError(f"--sigma_rel: {error}") from error
    snapshots = find_snapshots(folder)
    step = max(one.step for one in snapshots) if step is None else step
    chosen = choose(snapshots, sigma_rel, step)
    places = [(one.step, one.sigma_rel) for one in snapshots]
    error = synthesis_error(places, synthesis_weights(places, step, sigma_rel), step, sigma_rel)
    first = chosen[0][0].path
    is_adapter = EXTRA_KEY not in read_torch(first, mmap=True)
    endings = (".pt", ".pth", ".safetensors") if is_adapter else (".pth", ".safetensors")
    if output.suffix not in endings:  # before the work
        raise UsageError(f"--output {output}: {'an adapter' if is_adapter else 'a generator'} is written as "
                         f"{' or '.join(endings)}, not {output.suffix or 'without suffix'}")
    if is_adapter:
        adapters = [(one.path, load_adapter(one.path), factor) for one, factor in chosen]
        tensors = weighted_sum([(path, adapter.tensors, factor) for path, adapter, factor in adapters])
        newest = adapters[-1][1]
        save_adapter(output, tensors, {**newest.meta, "step": step, "sigma_rel": sigma_rel})
    else:
        write_weights(output, weighted_sum([(one.path, read_mmaudio_track(one.path), f) for one, f in chosen]))
    return MadeAverage(output, step, len(chosen), len(snapshots), error, is_adapter)
