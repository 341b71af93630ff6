"""Measure how few evaluations of the network suffice: error, class and timing of sounds of tiny_16k, with intervals.

    python benchmarks/few_steps.py --work bench                  # half an hour on one core; writes docs/inference.md
    python benchmarks/few_steps.py --work bench --count 1 --evaluations 8 --document ""      # a quick look
    python benchmarks/few_steps.py --work bench --solvers euler ab2 --keys select-gong-20-1-e284445f3a     # new sounds

The scenes are those of the ten known classes that soundbench.py chooses settings by, encoded once in the work folder;
with --keys those of the new sounds of its runs, made with their adapters. Every setting starts from the same noise. The
error is that of the normalised latents against Euler with --reference_steps, in dB of their power, over the first
--reference_scenes scenes. Settings that are in --output already are not measured again, unless --keys are others than
then; the document gets all of them.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import circumstances
from solvers import error_db
from sound_data import KNOWN, NEW_SCENES, Inputs
from sound_judge import uses_clip_features
from sound_rows import Interval, interval
from torch import Tensor

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli, flow
from selva.checkpoint import load_adapter
from selva.flow import WHOLE_INTERVAL, SamplingConfig
from selva.lora.merge import Adapter, merged_adapters
from selva.utils.device import resolve_device
from selva.utils.document import begin_mark, marked_block, update_document
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text
from selva.utils.progress import Progress
from selva.utils.text import counted, listed
from selva.weights.load import load_generator
from toyworld.classes import CLASSES
from toyworld.judging import fit_classifier
from toyworld.measure import Case, EncodedCases, ToyGenerator, mean, recognised, timing_f1

log = logging.getLogger("selva.few_steps")

ROOT = Path(__file__).resolve().parents[1]
VARIANT = "tiny_16k"
DEFAULT = SamplingConfig()
EVALUATIONS = (8, 12, 16, 25)
INTERVALS = ((0.0, 0.8), (0.2, 1.0), (0.2, 0.8))


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("measurement")
    group.add_argument("--evaluations", type=cli.positive_int, nargs="+", default=list(EVALUATIONS),
                       help="network evaluations per sound; solvers with two per step get one less of an odd number")
    group.add_argument("--count", type=cli.positive_int, default=6, help="scenes of each of the ten known classes")
    group.add_argument("--solvers", nargs="+", choices=flow.SOLVERS, default=list(flow.SOLVERS), help="these only")
    group.add_argument("--keys", nargs="+", default=[], metavar="KEY", help="runs of soundbench.py, whose adapters are "
                       "in the work folder")
    group.add_argument("--unguided", action="store_true", help="without guidance, as the sounds of --preserve are made")
    group.add_argument("--duration", type=float, default=8.0, help="seconds of a scene")
    group.add_argument("--reference_steps", type=cli.positive_int, default=400, help="Euler steps of the reference")
    group.add_argument("--reference_scenes", type=cli.positive_int, default=12, help="scenes whose error is measured")
    group.add_argument("--work", type=Path, default=Path("soundbench"), help="folder of encoded scenes")
    group.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "few_steps.json",
                       help="figures of all settings; added to")
    group.add_argument("--document", default=str(ROOT / "docs" / "inference.md"), help='gets the table; "" for none')
    group.add_argument("--measured_only", action="store_true", help="make the table of what --output has, measure "
                       "nothing")
    group.add_argument("--threads", type=cli.positive_int, default=1, help="threads of PyTorch")
    parser.add_common(seed=False)
    return parser


def settings_to_compare(
    evaluations: Sequence[int], solvers: Sequence[str] = flow.SOLVERS, guided: bool = True
) -> list[SamplingConfig]:
    """Return the settings, those of most evaluations first; intervals of guidance for the default and half its work."""
    configs = [DEFAULT]
    for count in sorted(evaluations, reverse=True):
        configs += [SamplingConfig(max(1, count // flow.EVALUATIONS_PER_STEP[solver]), solver=solver)
                    for solver in solvers]
    if guided:
        half = min(evaluations, key=lambda n: abs(n - 12))
        configs += [SamplingConfig(cfg_interval=times) for times in INTERVALS]
        configs += [SamplingConfig(half, solver="ab2", cfg_interval=INTERVALS[1])]
    return list(dict.fromkeys(configs))


@dataclass
class SceneSet:
    """Scenes that are made by one model.

    Attributes:
        adapter: of the model; None for the base model.
        reference: (scenes, N, C) latents of the first ones at many steps; None until they are made.
    """

    cases: list[Case]
    encoded: list[EncodedCases]
    adapter: Adapter | None = None
    reference: Tensor | None = None


class Bench:
    """The scenes, the networks and the classifier."""

    def __init__(self, args, adapters: Sequence[Path]) -> None:
        self.args = args
        self.maker = ToyGenerator(VARIANT, resolve_device(args.device))
        inputs = Inputs(args.work, self.maker, args.duration, known_scenes=args.count)
        self.sets = [SceneSet(*inputs.scenes(key.split("-")[0], key.split("-")[1]), load_adapter(path))
                     for key, path in zip(args.keys, adapters, strict=True)]
        self.sets = self.sets or [SceneSet(*inputs.scenes("select", KNOWN))]
        self.generator = load_generator(VARIANT, None).to(self.maker.device).eval()
        self.classifier = fit_classifier()

    def latents(self, scenes: SceneSet, config: SamplingConfig, count: int | None = None) -> Tensor:
        """Return (scenes, N, C) latents, of the first ``count`` scenes."""
        if self.args.unguided:
            config = replace(config, cfg_strength=0.0)
        self.maker.clip_features = scenes.adapter is None or uses_clip_features(scenes.adapter)
        with merged_adapters(self.generator, [] if scenes.adapter is None else [(scenes.adapter, 1.0)]):
            return self.maker.latents(self.generator, scenes.encoded[:count], self.args.duration, sampling=config)

    def row(self, config: SamplingConfig) -> dict[str, Any]:
        """Return the outcomes of every scene with a setting."""
        rows = [self._row(scenes, config) for scenes in self.sets]
        return {name: [one for row in rows for one in row[name]] for name in rows[0]}

    def _row(self, scenes: SceneSet, config: SamplingConfig) -> dict[str, Any]:
        if scenes.reference is None:
            count = max(1, self.args.reference_scenes // len(self.sets))
            scenes.reference = self.latents(scenes, SamplingConfig(self.args.reference_steps), count)
        found = self.latents(scenes, config)
        sounds = self.maker.decode(found, self.args.duration)
        normalize = self.generator.normalize
        errors = [error_db(normalize(one[None]), normalize(other[None]))
                  for one, other in zip(found, scenes.reference, strict=False)]
        hits = recognised(sounds, [case.name for case in scenes.cases], self.classifier)
        timing = timing_f1(sounds, [case.events() for case in scenes.cases])
        return {"hits": [int(hit) for hit in hits], "timing_f1": [round(f1, 4) for f1 in timing],
                "error_db": [round(error, 2) for error in errors]}


def adapter_paths(args) -> list[Path]:
    """Return the files of the adapters of ``--keys``.

    Raises:
        UserError: one is missing.
    """
    paths = [args.work / "adapters" / f"{key}.pt" for key in args.keys]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(f"no such adapters: {listed(missing)}; benchmarks/soundbench.py makes them")
    return paths


def scenes_of(args) -> str:
    """Return the words for the scenes, under which their figures are kept."""
    length = f"{args.duration:g} s each{', without guidance' if args.unguided else ''}"
    if not args.keys:
        return f"{counted(args.count * len(CLASSES), 'scene')} of the ten known classes, {length}"
    sounds = listed([key.split("-")[1] for key in args.keys], len(args.keys))
    adapters = f"{counted(len(args.keys), 'adapter')} for new sounds ({sounds})"
    return f"{counted(NEW_SCENES, 'scene')} for each of {adapters}, {length}"


def key_of(config: SamplingConfig, scenes: str) -> str:
    """Return the words under which the figures of a setting are kept."""
    times = "" if config.cfg_interval == WHOLE_INTERVAL else f", guidance {config.cfg_interval[0]:g} to " \
        f"{config.cfg_interval[1]:g}"
    return f"{config.solver} {config.num_steps}{times}; {scenes}"


def parts_of(figures: dict[str, Any], configs: Sequence[SamplingConfig]) -> Iterator[str]:
    """Yield the table of every kind of scenes that has figures of the default, and the words under it."""
    for scenes in dict.fromkeys(key.split("; ", 1)[1] for key in figures):
        rows = {config: figures[key] for config in configs if (key := key_of(config, scenes)) in figures}
        if DEFAULT in rows:
            yield f"{table(rows)}\n"
            count = len(rows[DEFAULT]["error_db"])
            yield f"{scenes[0].upper()}{scenes[1:]}; the error is over {count} of them.\n"


def in_percent(found: Interval, scale: float = 100, digits: int = 0) -> str:
    bounds = "" if found.low is None or found.high is None else \
        f" ({scale * found.low:+.{digits}f} to {scale * found.high:+.{digits}f})"
    return f"{scale * found.mean:+.{digits}f}{bounds}"


def network_passes(config: SamplingConfig) -> int:
    """Return the number of network passes of a sound: two for an evaluation with guidance."""
    calls: list[bool] = []

    def count(t: Tensor, x: Tensor) -> Tensor:
        calls.append(flow.within(t.item(), config.cfg_interval))
        return x

    flow.solve(count, torch.zeros(1), config)
    return len(calls) + sum(calls)


def table(rows: dict[SamplingConfig, dict[str, Any]]) -> str:
    """Return the figures as Markdown; differences are from the default, scene by scene."""
    lines = ["| solver | steps | guidance | evaluations | network work | error dB | recognised % | difference | "
             "timing F1 | difference |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    default = rows[DEFAULT]
    for config, row in rows.items():
        start, end = config.cfg_interval
        cells = [config.solver, config.num_steps, f"{start:g} to {end:g}", config.num_evaluations,
                 f"{100 * network_passes(config) / network_passes(DEFAULT):.0f} %", f"{mean(row['error_db']):.1f}"]
        for name, scale, digits in (("hits", 100, 0), ("timing_f1", 1, 3)):
            other = [one - two for one, two in zip(row[name], default[name], strict=True)]
            cells += [f"{scale * mean(row[name]):.{digits}f}",
                      "" if config == DEFAULT else in_percent(interval([other]), scale, digits)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    configs, scenes = settings_to_compare(args.evaluations, args.solvers, not args.unguided), scenes_of(args)
    figures = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    others = [key for key, row in figures.items() if key.endswith(f"; {scenes}") and row["keys"] != args.keys]
    if others:
        log.warning("%s of other adapters, %s: measured anew with these", counted(len(others), "setting"),
                    listed(figures[others[0]]["keys"]))
    figures = {key: row for key, row in figures.items() if key not in others}
    missing = [config for config in configs if key_of(config, scenes) not in figures]
    if args.measured_only:
        if DEFAULT in missing:
            raise UserError(f"{args.output}: has no figures of the default, which the others are compared with")
        if missing:
            log.warning("not measured yet: %s", listed([key_of(config, scenes) for config in missing]))
        missing = []
    missing.sort(key=lambda config: flow.EVALUATIONS_PER_STEP[config.solver])  # what may become the default comes first
    paths = adapter_paths(args)
    bench = Bench(args, paths) if missing else None
    with Progress(len(missing), "settings", "settings") as progress:
        for number, config in enumerate(missing):
            assert bench is not None
            figures[key_of(config, scenes)] = {**asdict(config), "keys": args.keys, **bench.row(config),
                                               **circumstances(str(resolve_device(args.device)))}
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in figures.items())
            atomic_write_text(args.output, f"{{{lines}}}\n")
            progress.update(number + 1)
    everything = list(dict.fromkeys([*settings_to_compare(EVALUATIONS), *configs]))
    parts = list(parts_of(figures, sorted(everything, key=lambda one: (one.cfg_interval != WHOLE_INTERVAL,
                                                                       -one.num_evaluations))))
    print("\n".join(parts))
    print(args.output)
    if args.document:
        update_document(Path(args.document), begin_mark("benchmarks/few_steps.py"),
                        marked_block(begin_mark("benchmarks/few_steps.py"), parts))
        print(args.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
