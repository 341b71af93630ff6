"""Plan of `soundbench.py`: questions, methods and runs, in the order in which they are worth most.

    soundbench.yaml --read_plan--> questions, methods --runs_of--> runs, the most valuable first

A run is one training: a method, and a cell of the table, which is a sound, a number of clips, a seed and the scenes
that judge it. Needs no PyTorch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selva.utils.errors import UserError
from selva.utils.text import listed
from selva.utils.yaml_file import read_yaml

ROOT = Path(__file__).resolve().parents[1]
PLAN_FILE = ROOT / "benchmarks" / "soundbench.yaml"
OWN_SETTINGS = ("data_dir", "output_dir", "seed", "resume", "val_fraction", "val_dir", "save_every")  # see Bench.train
# Scenes that settings are chosen by, and those that judge what was chosen; neither is trained on. Seeds of trainings
# are apart too: seed 1 of one is not seed 1 of the other.
SCENE_SETS = {"select": 8_600_000, "judge": 8_800_000}
SEED_OFFSETS = {"select": 0, "judge": 1000}
CHECKPOINTS = 3  # of a training, unless a method has more
# Settings that older rows do not write out, as they were the defaults then: at these values they are no part of a key.
IMPLIED = {"timestep_mode": "logit_normal", "preserve_near": 0.0}
# Settings that older rows write out and that are gone: every key counts them, at these values where a method has none.
FORMER = {"keep_unconditional": 0.0}


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        changes: of the settings of its question's base. settings: all of them, by the names of the flags of
            ``train_lora.py``.
        soup: how its adapter is averaged from others, see :func:`read_plan`; None if it is what a training leaves.
        wordings: prompts of every clip, of which each use of it draws one.
        pictures: False for clips of sound alone, as of ``extract_features.py --sound_only``.
        checkpoints: of its training, at even distances, the last step included; those of seed 1 are judged.
        rank: 0 is worth most; a method of rank 1 has its first run when those of rank 0 have their second.
    """

    name: str
    changes: Mapping[str, Any]
    settings: Mapping[str, Any]
    rank: int
    soup: Mapping[str, int] | None = None
    wordings: int = 1
    pictures: bool = True
    checkpoints: int = CHECKPOINTS

    @property
    def all_settings(self) -> dict[str, Any]:
        """The settings with what is no flag and not as usual: soup, wordings, pictures, checkpoints."""
        found = {**self.settings, **({"soup": dict(self.soup)} if self.soup else {})}
        usual = {"wordings": 1, "pictures": True, "checkpoints": CHECKPOINTS}
        return {**found, **{name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}}

    @property
    def identity(self) -> str:
        """A hash of the settings: methods of the same settings share their runs."""
        counted = {key: value for key, value in (FORMER | self.all_settings).items() if IMPLIED.get(key) != value}
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Question:
    """One question that a part of the table answers.

    Attributes:
        claim: what is said elsewhere, or was our default. source: where.
        verdict: what follows from our figures, in words; "" as long as there are too few.
        reference: name of the method that the others are compared with.
        base: name of the settings that its methods change.
    """

    name: str
    base: str
    title: str
    claim: str
    source: str
    reference: str
    methods: tuple[str, ...]
    verdict: str = ""


@dataclass(frozen=True)
class Cell:
    """A place of the table: ``seed`` decides which clips are trained on, and everything random in the training."""

    scenes: str
    sound: str
    clips: int
    seed: int


@dataclass(frozen=True)
class Run:
    """One training and its judgement."""

    method: Method
    cell: Cell

    @property
    def key(self) -> str:
        """The name of its folder and of its row."""
        cell = self.cell
        return f"{cell.scenes}-{cell.sound}-{cell.clips}-{cell.seed}-{self.method.identity}"


@dataclass(frozen=True)
class Plan:
    """The content of ``soundbench.yaml``; ``suites`` have sounds, seeds and the highest rank of methods."""

    bases: Mapping[str, Mapping[str, Any]]
    questions: tuple[Question, ...]
    methods: Mapping[str, Method]
    suites: Mapping[str, Mapping[str, Any]]


def read_plan(path: Path = PLAN_FILE) -> Plan:
    """Return the plan of a file.

    The adapter of a method with ``soup: {seeds: N}`` is the average of N trainings on the same clips by other seeds;
    that of one with ``soup: {last: N, every: M}`` is the average of the last N step files of one training, M steps
    apart. Either is cut back to the rank. With ``wordings: N`` every clip has N prompts of its sound; with
    ``pictures: false`` it is sound alone; with ``checkpoints: N`` a training leaves so many.

    Raises:
        UserError: a base is not there; a method is there twice, or changes what the benchmark sets itself; a reference
            is no method; or a soup is none of the two.
        FileNotFoundError: it, or the file that it takes the preserved prompts from, is not there.
    """
    content = read_yaml(path)
    preset = read_yaml(ROOT / content["preserve_from"])
    questions, methods = [], {}
    for name, asked in content["questions"].items():
        if (base_name := asked["base"]) not in content["bases"]:
            known = listed(list(content["bases"]))
            raise UserError(f"{path}: question {name}: base is {base_name!r}, expected one of {known}")
        base, own = {**content["bases"][base_name], "preserve": preset["preserve"]}, []
        for method, changes in asked["methods"].items():
            changes = dict(changes or {})
            rank = changes.pop("rank_of_worth", asked.get("rank_of_worth", 0))
            soup, wordings = changes.pop("soup", None), changes.pop("wordings", 1)
            pictures, checkpoints = changes.pop("pictures", True), changes.pop("checkpoints", CHECKPOINTS)
            if soup is not None and set(soup) not in ({"seeds"}, {"last", "every"}):
                raise UserError(f"{path}: {method}: soup is {soup}, expected seeds, or last and every")
            if taken := [key for key in changes if key in OWN_SETTINGS]:
                raise UserError(f"{path}: {method}: {listed(taken)} cannot be changed, the benchmark sets that itself")
            made = Method(method, changes, {**base, **changes}, rank, soup, wordings, pictures, checkpoints)
            if method in methods and methods[method].all_settings != made.all_settings:
                raise UserError(f"{path}: the method {method} is there twice, with other settings")
            methods.setdefault(method, made)
            own.append(method)
        words = {key: asked[key] for key in ("base", "title", "claim", "source", "reference")}
        questions.append(Question(name=name, methods=tuple(own), verdict=asked.get("verdict", ""), **words))
    if lost := [one.reference for one in questions if one.reference not in methods]:
        raise UserError(f"{path}: references that are no methods: {listed(lost)}")
    return Plan(content["bases"], tuple(questions), methods, content["suites"])


def runs_of(methods: Sequence[Method], cells: Sequence[Cell]) -> list[Run]:
    """Return every run once, the most valuable first.

    The first cell comes for all methods of rank 0; then their second one, and the first of those of rank 1; and so on:
    however early one stops, methods of a rank have been compared on the same cells but for the last round.
    """
    placed = [
        (method.rank + number, method.rank, place, Run(method, cell))
        for number, cell in enumerate(cells) for place, method in enumerate(methods)
    ]
    runs: dict[str, Run] = {}
    for *_, run in sorted(placed, key=lambda one: one[:3]):
        runs.setdefault(run.key, run)  # methods of the same settings share it
    return list(runs.values())


def cells_of(scenes: str, sounds: Sequence[str], clips: int, seeds: Sequence[int]) -> list[Cell]:
    """Return the cells, all sounds with the first seed, then all with the second."""
    return [Cell(scenes, sound, clips, seed) for seed in seeds for sound in sounds]
