"""Sweeps: several trainings that differ in a few settings, compared on the same held-out clips.

    sweep.yaml --read_sweep--> runs --run_sweep--> <output_dir>/<run>/ ... --> sweep.tsv, sweep.html

A run is a folder as ``train_lora.py`` writes it, with ``sweep_run.json`` in it: its settings, and in the end its
figures. So a sweep that was stopped goes on: finished runs are read, begun ones are resumed. Several processes share
the runs through the locks of the folders.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selva.checkpoint import TrainingState, load_newest_checkpoint
from selva.evaluation.page_sound import page_file
from selva.training.config import RunConfig
from selva.training.outcome import missing_outcome
from selva.training.setup import finished_adapter
from selva.training.shared import SharedParts
from selva.training.train import TrainingResult, train
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text
from selva.utils.html_report import Page
from selva.utils.lock import FolderInUse
from selva.utils.metrics_log import MetricsFile, smoothed
from selva.utils.text import counted, listed
from selva.utils.yaml_file import read_yaml

log = logging.getLogger(__name__)

NOT_YET = "not yet"
BASE = "base"  # the setup that changes nothing
RUN_FILE, TABLE_FILE, PAGE_FILE = "sweep_run.json", "sweep.tsv", "sweep.html"
KEYS = ("output_dir", "base", "seeds", "grid", "vary", "runs")
OWN_SETTINGS = ("output_dir", "resume", "seed")  # which a sweep gives to its runs itself
Configure = Callable[[Mapping[str, Any], Path], tuple[RunConfig, Mapping[str, Any]]]


# -- the file ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepRun:
    """One training.

    Attributes:
        setup: the settings that differ from the base, in words; shared by the seeds. seed: of everything random.
        settings: all settings by the names of the flags of ``train_lora.py``.
    """

    setup: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return re.sub(r"[^A-Za-z0-9.+=,-]+", "_", f"{self.setup},seed={self.seed}").strip("_")[:120]


def read_sweep(path: Path, output_dir: Path | None = None) -> tuple[Path, list[SweepRun]]:
    """Return the output folder and the runs of a sweep's file.

    Args:
        output_dir: of the runs; None for the one that the file names.

    Raises:
        UserError: it is no YAML of that form; says which key or value.
        FileNotFoundError: it, or the settings file that ``base`` names, is not there.
    """
    content = _read_yaml(path)
    if unknown := [str(key) for key in content if key not in KEYS]:
        raise UserError(f"{path}: unknown keys {listed(unknown)}; known are {', '.join(KEYS)}")
    given = [key for key in ("grid", "vary", "runs") if content.get(key)]
    if len(given) != 1 and not (not given and content.get("seeds")):
        raise UserError(f"{path}: give one of grid, vary and runs, found {' and '.join(given) or 'none'}")
    base = _base(path, content.get("base") or {})
    base = {key: value for key, value in base.items() if key not in OWN_SETTINGS and value is not None}
    seeds = content.get("seeds", 1)
    seeds = [42 + number for number in range(seeds)] if isinstance(seeds, int) else seeds
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"{path}: seeds is {content['seeds']!r}, expected a number of at least 1 or a list of seeds")
    setups = _setups(path, given[0] if given else "", content)
    taken = {key for changes in setups for key in changes if key in OWN_SETTINGS}
    if taken:
        raise UserError(f"{path}: {', '.join(sorted(taken))} cannot be varied, a sweep sets that itself (seeds: 3)")
    runs = [SweepRun(_words(changes), seed, {**base, **changes, "seed": seed}) for changes in setups for seed in seeds]
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: these runs are there twice: {listed(twice)}")
    if output_dir is None and not isinstance(content.get("output_dir"), str):
        raise UserError(f"{path}: output_dir is {content.get('output_dir')!r}, expected a folder for the runs; give it "
                        "there, or with --output_dir")
    return output_dir or Path(content["output_dir"]), runs


def _base(path: Path, base: Any) -> dict[str, Any]:
    """Return the settings that all runs share; those that stand beside ``config: FILE`` win over the file's."""
    if isinstance(base, str):
        base = {"config": base}
    if not isinstance(base, dict):
        raise UserError(f"{path}: base is {base!r}, expected settings of train_lora.py or the name of a file of them")
    name = base.get("config")
    if name is None:
        return base
    file = next((f for f in (Path(str(name)), path.parent / str(name)) if f.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: base {name}: no such file")
    return {**_read_yaml(file), **{key: value for key, value in base.items() if key != "config"}}


def _setups(path: Path, kind: str, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the changes of the base that each setup makes."""
    if not kind:
        return [{}]
    values = content[kind]
    if kind == "runs":
        if not isinstance(values, list) or not all(isinstance(one, dict) for one in values):
            raise UserError(f"{path}: runs is {values!r}, expected a list of settings")
        return [dict(one) for one in values]
    if not isinstance(values, dict) or not all(isinstance(v, list) and v for v in values.values()):
        raise UserError(f"{path}: {kind} is {values!r}, expected a list of values for every setting, such as "
                        "lr: [1e-4, 3e-4]")
    if kind == "grid":
        return [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]
    return [{}, *({key: value} for key, several in values.items() for value in several)]


def _words(changes: Mapping[str, Any]) -> str:
    def word(value: Any) -> str:
        return "+".join(map(str, value)) if isinstance(value, list) else str(value)

    return ",".join(f"{key}={word(value)}" for key, value in changes.items()) or BASE


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected lines like `output_dir: sweeps/dog`")
    return content


# -- running it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run.

    Attributes:
        problem: why it failed; "" if it has not. NOT_YET where it has not been made.
        figures: ``val_loss`` (the best one; absent without held-out clips), ``best_step``, ``train_loss`` (smoothed, at
            the end) and ``steps``.
        adapter: the best adapter, or the final one where it is the best.
    """

    run: SweepRun
    folder: Path
    problem: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    adapter: Path | None = None

    @property
    def score(self) -> float:
        """The figure that decides the rank, lower is better: held-out loss, or without such clips the training loss."""
        return self.figures.get("val_loss", self.figures.get("train_loss", math.inf)) if not self.problem else math.inf


def run_sweep(
    output_dir: Path, runs: Sequence[SweepRun], configure: Configure, first: int = 0
) -> tuple[list[RunResult], int | None]:
    """Do every run that is not done yet; return all results, and the signal that stopped the sweep, if one did.

    A run that fails is reported and does not end the sweep; it is tried again when the sweep is started again.

    Args:
        configure: returns the configuration of a run and its settings from its settings and its folder.
        first: where in the list this process begins, so that several meet seldom.
    """
    shared, failed, stopped = SharedParts(), {}, None
    try:
        for run in [*runs[first:], *runs[:first]]:
            folder = output_dir / run.name
            if _finished(run, folder) is not None:
                log.info("%s: done already", run.name)
                continue
            log.info("run %d of %d: %s", runs.index(run) + 1, len(runs), run.name)
            gc.collect()  # cycles of the run before, as libraries leave them, may hold all that it had on the device
            try:
                _begin(run, folder)
                config, settings = configure(run.settings, folder)
                saved = load_newest_checkpoint(folder)
                result = _whole(saved, config.training.steps, folder) or train(config, settings, shared=shared)
            except FolderInUse:
                log.info("%s: another process is at it", run.name)
                continue
            except Exception as error:  # whatever it is: the other runs are worth doing
                if _finished(run, folder) is not None:  # by another process, in this moment
                    continue
                log.debug("%s", run.name, exc_info=True)
                failed[run.name] = " ".join(str(error).split()) or type(error).__name__
                log.error("%s failed: %s", run.name, failed[run.name])
                if (noted := _noted(folder)) is not None and noted["settings"] == _plain(run.settings):
                    _note(run, folder, problem=failed[run.name])
                shared.clear()
                continue
            if result.signal is not None:
                stopped = result.signal
                break
            if result.adapter is not None:
                _finish(run, folder, result.adapter)
    finally:
        shared.clear()
    return [_result(run, output_dir / run.name, failed.get(run.name, NOT_YET)) for run in runs], stopped


def _whole(saved: TrainingState | None, steps: int, folder: Path) -> TrainingResult | None:
    """Return the result of a run that was done to its page, which comes last; None if something is left to do."""
    if saved is None or saved.step < steps:
        return None
    final = finished_adapter(saved, folder)
    return TrainingResult(final) if final and not missing_outcome(final, saved.step, verdict=False) else None


def _result(run: SweepRun, folder: Path, problem: str) -> RunResult:
    """Return the result of a run; one that failed in another process has left word of it."""
    noted = None if problem != NOT_YET else _noted(folder)
    return _finished(run, folder) or RunResult(run, folder, (noted or {}).get("problem", problem))


def _begin(run: SweepRun, folder: Path) -> None:
    """Note the settings of a run; raise if the folder is one of other settings."""
    noted = _noted(folder)
    if noted is not None and noted["settings"] != _plain(run.settings):
        before = noted["settings"]
        changed = [key for key in {**before, **run.settings}
                   if before.get(key) != _plain(run.settings).get(key)]
        raise UserError(f"{folder}: was begun with other settings ({listed(sorted(changed))}); name another "
                        "output_dir, or remove the folder")
    _note(run, folder)


def _note(run: SweepRun, folder: Path, **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / RUN_FILE, json.dumps({"settings": _plain(run.settings), **more}, indent=1) + "\n")


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


def _noted(folder: Path) -> dict[str, Any] | None:
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove it, and the run is resumed") from error


def _finish(run: SweepRun, folder: Path, final: Path) -> None:
    metrics = MetricsFile(folder / "metrics.jsonl")
    steps, losses = metrics.series("loss")
    figures: dict[str, float] = {"steps": steps[-1], "train_loss": smoothed(losses, 0.9)[-1]} if steps else {}
    adapter = final
    val_steps, val_losses = metrics.series("val_loss")
    if val_steps:
        best = min(range(len(val_steps)), key=val_losses.__getitem__)
        figures |= {"val_loss": val_losses[best], "best_step": val_steps[best]}
        best_file = final.with_name(f"adapter_best{final.suffix}")
        if figures["best_step"] != figures.get("steps") and best_file.is_file():
            adapter = best_file
    _note(run, folder, figures=figures, adapter=adapter.name)


def _finished(run: SweepRun, folder: Path) -> RunResult | None:
    """Return the result of a run that is done with these settings; None if it is not."""
    noted = _noted(folder)
    if noted is None or "figures" not in noted or noted["settings"] != _plain(run.settings):
        return None
    return RunResult(run, folder, "", noted["figures"], folder / noted["adapter"])


# -- what came out -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetupScore:
    """The runs of one setup, one per seed, and their mean score (over the runs that are done) with its spread."""

    setup: str
    results: tuple[RunResult, ...]
    mean: float
    spread: float  # nan of a single run

    @property
    def best(self) -> RunResult:
        return min(self.results, key=lambda result: result.score)


def ranked(results: Sequence[RunResult]) -> list[SetupScore]:
    """Return the setups from the best to the worst; one with a failed run comes after all that have none."""
    scores = []
    for setup in dict.fromkeys(result.run.setup for result in results):
        own = tuple(result for result in results if result.run.setup == setup)
        done = [result.score for result in own if math.isfinite(result.score)]
        mean = sum(done) / len(done) if done else math.inf
        spread = math.sqrt(sum((s - mean) ** 2 for s in done) / (len(done) - 1)) if len(done) > 1 else math.nan
        scores.append(SetupScore(setup, own, mean, spread))
    return sorted(scores, key=lambda one: (sum(bool(r.problem) for r in one.results), one.mean))


def table_rows(scores: Sequence[SetupScore]) -> list[list[str]]:
    """Return the lines of the table, its heading first; the same whenever the runs were made.

    Setups with the same mean, to the digits that are shown, share a rank.
    """
    rows = [["rank", "setup", "seeds", "mean loss", "spread", "best loss", "at step", "training loss", "problem"]]
    number = 0
    for place, one in enumerate(scores, 1):
        if place == 1 or not _tied(one, scores[place - 2]):
            number = place
        figures, problems = one.best.figures, [f"seed {r.run.seed}: {r.problem}" for r in one.results if r.problem]
        rows.append([
            str(number), one.setup, str(len(one.results)), _number(one.mean), _number(one.spread),
            _number(one.best.score), f"{figures.get('best_step', figures.get('steps', '-'))}",
            _number(figures.get("train_loss", math.inf)), "; ".join(problems),
        ])
    return rows


def _tied(one: SetupScore, other: SetupScore) -> bool:
    return _number(one.mean) == _number(other.mean) and not any(r.problem for r in (*one.results, *other.results))


def remarks(scores: Sequence[SetupScore]) -> list[str]:
    """Return sentences about a ranking: ties, no gain over the base, a lead that seeds could make."""
    done = [one for one in scores if not any(result.problem for result in one.results)]
    if not done:
        return []
    first, found = done[0], []
    if len(tied := [one.setup for one in done if _tied(one, first)]) > 1:
        found.append(f"a tie for the first place: {listed(tied)}")
    base = next((one for one in done if one.setup == BASE), None)
    if base is not None and len(done) > 1 and (first is base or _tied(first, base)):
        found.append("no setting is better than the base")
    rival = next((one for one in done if not _tied(one, first)), None)
    spread = max((one.spread for one in done if math.isfinite(one.spread)), default=None)
    if rival is not None and spread is not None and rival.mean - first.mean < spread:
        found.append(f"{first.setup} leads {rival.setup} by {_number(rival.mean - first.mean)}, less than the spread "
                     f"between seeds ({_number(spread)}): this is no difference")
    if all(result.figures.get("best_step") == 0 for one in done for result in one.results):
        found.append("no run came below the loss that the base model has before the first step: train longer, or "
                     "change more")
    return found


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def write_results(output_dir: Path, results: Sequence[RunResult]) -> list[Path]:
    """Write ``sweep.tsv`` and ``sweep.html``; return their paths."""
    rows, scores = table_rows(ranked(results)), ranked(results)
    atomic_write_text(output_dir / TABLE_FILE, "".join("\t".join(row) + "\n" for row in rows))
    held_out = all("val_loss" in result.figures for result in results if not result.problem)
    done = sum(not result.problem for result in results)
    page = Page(f"Sweep: {output_dir.name}", f"{done} of {counted(len(results), 'run')}, ranked by the loss "
                + ("on held-out clips" if held_out else "of training: nothing is held out"))
    page.section("Ranking", " ".join([
        "Lower is better. A difference smaller than the spread between seeds says nothing.",
        *(f"{one[0].upper()}{one[1:]}." for one in remarks(scores))]))
    page.table(rows[0], rows[1:])
    for seed in dict.fromkeys(result.run.seed for result in results):
        sounds = []
        for one in scores:
            for result in one.results:
                if result.run.seed == seed and (sample := _last_sample(result.folder)) is not None:
                    sounds.append(page_file(one.setup, f"loss {_number(result.score)}", sample))
        if sounds:
            page.section(f"Sounds, seed {seed}", "The last sample of every run: one clip, one noise.")
            page.sounds(f"seed {seed}", sounds)
    page.write(output_dir / PAGE_FILE)
    return [output_dir / TABLE_FILE, output_dir / PAGE_FILE]


def _last_sample(folder: Path) -> Path | None:
    return max(folder.glob("sample_step*.wav"), default=None)
