"""One run of `soundbench.py`: the training by the code of `train_lora.py`, its judgement, and the row of both."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import circumstances
from sound_judge import DETAILED_SEED, Judge, uses_clip_features
from sound_plan import Cell, Method, Run

from selva.checkpoint import load_adapter, save_adapter
from selva.data.dataset import ClipDataset
from selva.lora.tools import soup as average
from selva.models.generator import Generator
from selva.training.config import ObjectiveConfig, RunConfig
from selva.training.run_folder import step_file_name
from selva.training.shared import SharedParts
from selva.training.train import train
from selva.utils.device import peak_memory_bytes
from selva.utils.files import atomic_write_text
from selva.utils.settings import from_names

log = logging.getLogger("selva.soundbench")

COSTS = ("train_cpu_sec", "train_wall_sec", "preserve_cpu_sec")  # of a soup the sum over its trainings
TRAINED_FILE = "trained.json"
SOUP_FILE = "soup.pt"
SOUP_SEED = 10_000  # what is added to the seed of a cell for each further training of a soup
UNCOUNTED = {"verdict": False, "preview": False, "val_fraction": 0.0}  # what is for the user is left out of the cost


class Stopped(Exception):
    """A training was stopped by a signal."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class MeasuredParts(SharedParts):
    """Shared parts of the runs of a process, that know what their making has cost in CPU seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.making = 0.0  # of what the current run had to make itself
        self.preserving = 0.0  # of the sounds to preserve of the current run, whoever has made them
        self._costs: dict[Hashable, float] = {}

    def generator(self, key: Hashable, load: Callable[[], Generator]) -> Generator:
        return super().generator(key, lambda: self._timed(load))

    def clips(self, key: Hashable, load: Callable[[], ClipDataset]) -> ClipDataset:
        return super().clips(key, lambda: self._timed(load))

    def preserved(self, key: Hashable, make: Callable[[], ClipDataset]) -> ClipDataset:
        def timed() -> ClipDataset:
            before = self.making
            made = self._timed(make)
            self._costs[key] = self.making - before
            return made

        found = super().preserved(key, timed)
        self.preserving = self._costs[key]
        return found

    def _timed(self, make: Callable[[], Any]) -> Any:
        started = time.process_time()
        try:
            return make()
        finally:
            self.making += time.process_time() - started

    def begin(self) -> None:
        """Begin the account of another run."""
        self.making, self.preserving = 0.0, 0.0


def configured(
    method: Method, cell: Cell, data_dir: Path, output_dir: Path, device: str, number: int = 0
) -> RunConfig:
    """Return the configuration of a run.

    Args:
        number: of the training, from 0, where a soup is made of several.

    Raises:
        UserError: a setting of the method is unknown or out of range.
    """
    steps = method.settings["steps"]
    every = (method.soup or {}).get("every", -(-steps // method.checkpoints))
    return from_names(RunConfig, {
        **method.settings, **UNCOUNTED, "data_dir": str(data_dir), "output_dir": output_dir,
        "seed": cell.seed + number * SOUP_SEED, "save_every": every, "log_every": max(1, steps // 6), "device": device,
    })


class Trainer:
    """The training and judging of one run after the other, with all that they share.

    Args:
        work: the work folder. device: "cpu", "cuda" ...
    """

    def __init__(self, work: Path, judge: Judge, device: str) -> None:
        self.work, self.judge, self.device = work, judge, device
        self.shared = MeasuredParts()

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of a run: trained now, or before if only the judgement was missing, and judged now.

        The final adapter is kept in the work folder, everything else of the run is removed.

        Raises:
            Stopped: the training was stopped by a signal; it begins anew the next time.
        """
        folder = self.work / "runs" / run.key
        trained = self._trained(run, folder)
        started = time.process_time()
        steps = trained.pop("checkpoints")
        detailed = run.cell.seed == DETAILED_SEED
        judged = []
        adapter = None
        for step in steps if detailed else steps[-1:]:
            adapter = load_adapter(folder / "train" / (SOUP_FILE if run.method.soup else step_file_name(step)))
            latent = run.method.settings.get("latent", ObjectiveConfig.latent)
            figures = self.judge.checkpoint(adapter, run.cell, whole=step == steps[-1], latent=latent)
            judged.append({"step": step, **figures})
            log.info("%s, step %d: %s", run.method.name, step, in_words(judged[-1]))
        assert adapter is not None
        response = self.judge.response(adapter, run.cell) if detailed else []
        base = self.judge.base(run.cell, uses_clip_features(adapter))
        row = {
            "key": run.key, "method": run.method.name, "scenes": run.cell.scenes, "sound": run.cell.sound,
            "clips": run.cell.clips, "seed": run.cell.seed, **trained,
            "judge_cpu_sec": round(time.process_time() - started, 1), "base": base,
            "ceiling": self.judge.ceiling(run.cell), "checkpoints": judged, "response": response,
            "settings": run.method.all_settings, **circumstances(self.device),
        }
        final = self.work / "adapters" / f"{run.key}.pt"
        final.parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / (SOUP_FILE if run.method.soup else "adapter_final.pt")).replace(final)
        return row

    def _trained(self, run: Run, folder: Path) -> dict[str, Any]:
        """Return the cost of the training and the checkpoints that it left, from its file if it was done before."""
        file = folder / TRAINED_FILE
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        shutil.rmtree(folder, ignore_errors=True)  # a part of a run would cost less than a whole one
        soup = run.method.soup or {}
        parts = [self._one(run, folder / ("train" if number == 0 else f"train_{number}"), number)
                 for number in range(soup.get("seeds", 1))]
        trained = {**parts[0], **{name: round(sum(part[name] for part in parts), 1) for name in COSTS}}
        if soup:
            started = time.process_time()
            steps = trained.pop("checkpoints")
            files = [folder / "train" / step_file_name(step) for step in steps[-soup.get("last", 1):]]
            files += [folder / f"train_{number}" / step_file_name(steps[-1]) for number in range(1, len(parts))]
            made = average([load_adapter(path) for path in files], run.method.settings["rank"]).adapter
            save_adapter(folder / "train" / SOUP_FILE, made.tensors, made.meta)
            trained["checkpoints"] = steps[-1:]
            trained["train_cpu_sec"] = round(trained["train_cpu_sec"] + time.process_time() - started, 1)
            for number in range(1, len(parts)):
                shutil.rmtree(folder / f"train_{number}")
        atomic_write_text(file, json.dumps(trained) + "\n")
        return trained

    def _one(self, run: Run, folder: Path, number: int) -> dict[str, Any]:
        """Return the cost of one training, and the steps of the checkpoints that it left in ``folder``."""
        clips = self.judge.inputs.clips(run.cell, run.method.wordings, run.method.pictures)
        config = configured(run.method, run.cell, clips, folder, self.device, number)
        self.shared.begin()
        started, wall = time.process_time(), time.monotonic()
        with _memory(self.judge.maker.device) as memory:
            result = train(config, shared=self.shared)
        if result.signal is not None:
            raise Stopped(result.signal)
        assert result.adapter is not None and result.steps == config.training.steps
        saved = range(config.training.save_every, result.steps + 1, config.training.save_every)
        return {
            "train_cpu_sec": round(time.process_time() - started - self.shared.making, 1),
            "train_wall_sec": round(time.monotonic() - wall, 1),
            "preserve_cpu_sec": round(self.shared.preserving, 1),
            "steps": result.steps,
            "adapter_mb": round(result.adapter.stat().st_size / 2**20, 2),
            **memory,
            "checkpoints": sorted({*saved, result.steps}),
        }

    def forget(self, run: Run) -> None:
        """Remove the files that a run has left beside its row and its adapter."""
        shutil.rmtree(self.work / "runs" / run.key, ignore_errors=True)


@contextmanager
def _memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a dict that holds ``peak_mb`` of the block at its end, where the system can tell."""
    found: dict[str, Any] = {}
    reset = Path("/proc/self/clear_refs")
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    elif reset.exists():
        reset.write_text("5")  # of Linux: the peak of the resident set begins anew
    yield found
    if on_cuda:
        found["peak_mb"] = round(peak_memory_bytes(device) / 2**20)
    elif reset.exists():
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        found["peak_mb"] = round(int(lines["VmHWM"].split()[0]) / 1024)


def in_words(checkpoint: Mapping[str, Any]) -> str:
    """Return the figures of a checkpoint as a line of the log."""
    new, known = checkpoint["new"], checkpoint["known"]
    return (f"{100 * new['recognised']:.0f} % recognised (timing {new['timing_f1']:.2f}, margin {new['margin']:.0f}, "
            f"{new['distance_db']:.1f} dB), {100 * known['recognised']:.0f} % kept (timing {known['timing_f1']:.2f}), "
            f"held-out loss {checkpoint['val_loss']:.4f}, AUC {checkpoint['member_auc']:.2f}")
