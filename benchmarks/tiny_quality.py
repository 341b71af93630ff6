"""Measure what the built-in model tiny_16k can do, on scenes of its world that it was never trained on.

    python benchmarks/tiny_quality.py                          # everything; writes docs/tiny_model.md
    python benchmarks/tiny_quality.py --only base --count 2    # a quick look at part of it
    python benchmarks/tiny_quality.py --only base --generator runs/mine/export/tiny_16k_ema.safetensors    # of your own

base        timing and class of single sounds, beside the ceiling (true sound through VAE and vocoder) and the floors
            (the same sounds judged by other videos' events; a generator with random weights)
selection   scenes with two objects: do onsets follow the one that the prompt names?
adaptation  a class it was not trained on, taught by train_lora.py: recognised before and after, timing, what it knew
guidance    the strength of guidance, and negative prompts
finetuning  only if asked for: the same class taught to the whole generator by train_base.py, beside an adapter

Figures go to a JSON file as soon as a part is done, and parts that are not measured again keep their figures. The
tables in the document are made from that file. A part that fails its goal is still written as it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tiny_tables import BEGIN_MARK, PARTS, TITLE, figures_text
from user_scripts import ROOT, run_script

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.checkpoint import load_adapter
from selva.flow import SamplingConfig
from selva.lora.merge import Adapter, merge_adapter
from selva.models.generator import Generator
from selva.models.random_weights import random_state_dict
from selva.models.zoo import build_generator
from selva.utils.device import resolve_device
from selva.utils.document import update_document
from selva.utils.files import atomic_write_text
from selva.utils.progress import Progress
from selva.utils.text import clock
from selva.weights.load import load_generator
from toyworld import CLASSES, UNSEEN
from toyworld.judging import Classifier, fit_classifier, timing
from toyworld.measure import (
    MEASURE_SEED,
    Case,
    ToyGenerator,
    mean,
    pair_cases,
    recognised,
    shuffled_events,
    single_cases,
    timing_f1,
)

log = logging.getLogger("selva.tiny_quality")

VARIANT, DURATION_SEC = "tiny_16k", 8.0
STRENGTHS = (0.0, 2.0, 4.5, 7.0)  # of guidance; 0 is none


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("measurement")
    group.add_argument("--only", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "finetuning"],
                       help="parts to measure")
    group.add_argument("--generator", type=Path, metavar="FILE",
                       help="a generator of your own in place of the one that is shipped; the document is not touched "
                       "then, unless --document is given")
    group.add_argument("--count", type=cli.positive_int, default=4, help="scenes per class and question")
    group.add_argument("--sounds", nargs="+", choices=list(UNSEEN), default=list(UNSEEN),
                       help="new classes of the adaptation")
    group.add_argument("--clips", type=cli.positive_int, default=20, help="clips that teach a new class")
    group.add_argument("--preset", type=Path, default=ROOT / "configs" / "tiny_new_sound.yaml",
                       help="settings of train_lora.py")
    group.add_argument("--finetune", type=Path, default=ROOT / "configs" / "finetune_tiny.yaml", metavar="FILE",
                       help="settings of train_base.py")
    group.add_argument("--new_weight", type=float, default=1.0, metavar="X",
                       help="how often an epoch of that visits the new clips")
    group.add_argument("--old_data", nargs="*", default=[], metavar="DIR[:WEIGHT]",
                       help="data sets beside the new clips while the whole generator is trained, so that it keeps "
                       "what it knew; such as make_demo_sets.py makes")
    group.add_argument("--clip_features", choices=("use", "empty"), default="empty",
                       help="what the generator is given without an adapter; empty is the default of infer.py. An "
                       "adapter is judged, before and after, with what it was trained with")
    group.add_argument("--num_steps", type=cli.positive_int, default=SamplingConfig.num_steps, help="sampling steps")
    group.add_argument("--threads", type=int, default=0, help="threads of PyTorch; 0 leaves them")
    group.add_argument("--output", type=Path, help="figures; added to if it exists: tiny_quality.json, with "
                       "--generator a file with its name")
    group.add_argument("--document", type=Path, help="the tables between its two marks are replaced: "
                       "docs/tiny_model.md, with --generator none")
    parser.add_common()
    return parser


# ---------------------------------------------------------------------------------------------------------------
# the parts; each returns what JSON can hold
# ---------------------------------------------------------------------------------------------------------------


class QualityBench:
    """The networks, the classifier and the progress bars that the parts share."""

    def __init__(self, args) -> None:
        self.args, self.device = args, resolve_device(args.device)
        sampling = SamplingConfig(num_steps=args.num_steps)
        self.maker = ToyGenerator(VARIANT, self.device, sampling, args.clip_features == "use")
        self.classifier: Classifier = fit_classifier()

    def generator(self) -> Generator:
        return load_generator(VARIANT, None, self.device, file=self.args.generator)

    def made(self, what: str, generator: Generator, encoded: Sequence, **options: Any) -> list[np.ndarray]:
        with Progress(len(encoded), what, "sounds") as progress:
            return self.maker.sounds(generator, encoded, DURATION_SEC, progress.update, self.args.seed, **options)

    def encoded(self, cases: Sequence[Case]) -> list:
        with Progress(len(cases), "encoding", "scenes") as progress:
            return self.maker.encode(cases, progress.update)

    def judged(self, sounds: Sequence[np.ndarray], cases: Sequence[Case]) -> dict[str, list]:
        """Return timing F1, whether the class is recognised, and the floor of timing, for every sound."""
        return {
            "timing_f1": timing_f1(sounds, [case.events() for case in cases]),
            "class_accuracy": recognised(sounds, [case.name for case in cases], self.classifier),
            "shuffled_f1": timing_f1(sounds, shuffled_events(cases)),
        }

    def scores(self, sounds: Sequence[np.ndarray], cases: Sequence[Case]) -> dict[str, float]:
        """Return the means of :meth:`judged`."""
        return {name: mean(values) for name, values in self.judged(sounds, cases).items()}


def measure_base(bench: QualityBench) -> dict[str, Any]:
    """Return scores of generated sounds, of the ceiling and of the floors, and of every class."""
    cases = single_cases(list(CLASSES), bench.args.count, MEASURE_SEED, DURATION_SEC)
    encoded = bench.encoded(cases)
    sounds = bench.made("generating", bench.generator(), encoded)
    true = [case.scene.sound() for case in cases]
    with Progress(len(true), "ceiling", "sounds") as progress:
        ceiling = []
        for sound in true:
            ceiling.append(bench.maker.through_codec(sound))
            progress.update(len(ceiling))
    unlearned = bench.made("random weights", random_generator(bench.generator()), encoded[: 2 * len(CLASSES)])
    judged, best = bench.judged(sounds, cases), timing_f1(ceiling, [case.events() for case in cases])
    per_class = {}
    for name in CLASSES:
        own = [i for i, case in enumerate(cases) if case.name == name]
        per_class[name] = {
            **{what: mean([values[i] for i in own]) for what, values in judged.items()},
            "ceiling_f1": mean([best[i] for i in own]),
            "taken_for": sorted({bench.classifier.classify(sounds[i]) for i in own} - {name}),
        }
    return {
        "scenes": len(cases),
        "generated": bench.scores(sounds, cases),
        "ceiling": bench.scores(ceiling, cases),
        "true_sound": bench.scores(true, cases),
        "random_weights": bench.scores(unlearned, cases[: len(unlearned)]),
        "classes": per_class,
    }


def random_generator(like: Generator) -> Generator:
    """Return a generator that never learned anything, on the scale of ``like``'s latents."""
    generator = build_generator(like.config)
    weights = random_state_dict(generator, seed=1)
    weights.update({name: value for name, value in like.state_dict().items() if name.startswith("latent_")})
    generator.load_published(weights)
    return generator.to(like.latent_mean.device).eval()


def measure_selection(bench: QualityBench) -> dict[str, Any]:
    """Return scores of onsets against the object that is named, and the one that is not, in scenes with two."""
    cases = pair_cases(3 * bench.args.count, MEASURE_SEED + 100_000, DURATION_SEC)
    sounds = bench.made("two objects", bench.generator(), bench.encoded(cases))
    named = timing_f1(sounds, [case.events() for case in cases])
    other = timing_f1(sounds, [case.other_events() for case in cases])
    return {
        "scenes": len(cases) // 2,
        "f1_named": mean(named),
        "f1_other": mean(other),
        "difference": mean(named) - mean(other),
        "class_accuracy": mean(recognised(sounds, [case.name for case in cases], bench.classifier)),
    }


def measure_guidance(bench: QualityBench) -> dict[str, Any]:
    """Return scores at several strengths of guidance, and those of negative prompts in scenes with two objects."""
    cases = single_cases(list(CLASSES), max(1, bench.args.count // 2), MEASURE_SEED + 200_000, DURATION_SEC)
    encoded, generator = bench.encoded(cases), bench.generator()
    strengths = {}
    for strength in STRENGTHS:
        sampling = SamplingConfig(num_steps=bench.args.num_steps, cfg_strength=strength)
        sounds = bench.made(f"guidance {strength:g}", generator, encoded, sampling=sampling)
        strengths[f"{strength:g}"] = {**bench.scores(sounds, cases), "margin": mean(margins(sounds, cases, bench))}
    pairs = pair_cases(2 * bench.args.count, MEASURE_SEED + 300_000, DURATION_SEC)
    both = [Case(case.scene, case.index, "") for case in pairs[::2]]
    encoded = bench.encoded(both)
    avoided = [case.scene.prompt(np.random.default_rng(case.scene.seed)) for case in both]
    plain = bench.made("no words", generator, encoded)
    negative = bench.made("negative prompts", generator, encoded, negatives=avoided)
    recall = {
        what: {
            "avoided": mean([timing(s, case.events()).recall for s, case in zip(sounds, both, strict=True)]),
            "other": mean([timing(s, case.other_events()).recall for s, case in zip(sounds, both, strict=True)]),
            "sounds_like_avoided": mean([bench.classifier.classify(s) == c.name
                                         for s, c in zip(sounds, both, strict=True)]),
        }
        for what, sounds in (("without", plain), ("with", negative))
    }
    return {"scenes": len(cases), "strengths": strengths, "negative_scenes": len(both), "negative": recall}


def margins(sounds: Sequence[np.ndarray], cases: Sequence[Case], bench: QualityBench) -> list[float]:
    """Return the log probability of the class that should be heard, less that of the best other one, of every sound."""
    result = []
    for sound, case in zip(sounds, cases, strict=True):
        scores = bench.classifier.scores(sound)
        own = bench.classifier.names.index(case.name)
        result.append(float(scores[own] - np.delete(scores, own).max()))
    return result


def measure_adaptation(bench: QualityBench) -> dict[str, Any]:
    """Return scores of every new class, and of the known ones, before and after teaching it to the model."""
    result = {}
    for number, name in enumerate(bench.args.sounds):
        with tempfile.TemporaryDirectory() as folder:
            taught = teach_adapter(name, Path(folder), bench)
        row = before_and_after(bench, number, name, taught)
        row["strength_0_is_the_base_model"] = taught.adapter is not None and is_nothing_at_0(bench, taught.adapter)
        result[name] = row
    return result


def measure_finetuning(bench: QualityBench) -> dict[str, Any]:
    """Return for every new class the scores of an adapter and of a whole generator that learned it."""
    result = {}
    for number, name in enumerate(bench.args.sounds):
        for what, teach in (("adapter", teach_adapter), ("whole generator", teach_generator)):
            with tempfile.TemporaryDirectory() as folder:
                taught = teach(name, Path(folder), bench)
            result[f"{name}, {what}"] = before_and_after(bench, number, name, taught)
    return result


@dataclass(frozen=True)
class Taught:
    """A generator that has learned a class: how long that took, also in CPU seconds, and what is kept of it on disk."""

    generator: Generator
    clip_features: bool
    seconds: float
    cpu_seconds: float
    size_bytes: int
    adapter: Adapter | None = None


def before_and_after(bench: QualityBench, number: int, name: str, taught: Taught) -> dict[str, Any]:
    """Return the scores of the class ``name``, the ``number``-th new one, and of the known ones."""
    maker = bench.maker
    before_use, maker.clip_features = maker.clip_features, taught.clip_features
    seed = MEASURE_SEED + 400_000
    new = single_cases([name], 3 * bench.args.count, seed + 10_000 * number, DURATION_SEC)
    known = single_cases(list(CLASSES), bench.args.count, seed + 100_000, DURATION_SEC)
    encoded_new, encoded_known, base = bench.encoded(new), bench.encoded(known), bench.generator()
    row = {
        "clips": bench.args.clips, "training_seconds": taught.seconds,
        "training_cpu_seconds": taught.cpu_seconds, "size_bytes": taught.size_bytes,
        "before": bench.scores(bench.made(f"{name} before", base, encoded_new), new),
        "after": bench.scores(bench.made(f"{name} after", taught.generator, encoded_new), new),
        "known_before": bench.scores(bench.made("known before", base, encoded_known), known),
        "known_after": bench.scores(bench.made("known after", taught.generator, encoded_known), known),
        "scenes": len(new), "known_scenes": len(known),
    }
    maker.clip_features = before_use
    return row


def is_nothing_at_0(bench: QualityBench, adapter: Adapter) -> bool:
    """Return True if an adapter of strength 0 leaves the base model, bit for bit."""
    off, maker = bench.generator(), bench.maker
    merge_adapter(off, adapter, 0.0)
    first = bench.encoded(single_cases(list(CLASSES), 1, MEASURE_SEED + 500_000, DURATION_SEC)[:2])
    return torch.equal(maker.latents(bench.generator(), first, DURATION_SEC), maker.latents(off, first, DURATION_SEC))


def make_clips(name: str, folder: Path, args: argparse.Namespace, *format_flags: str) -> Path:
    """Make clips of a new class and extract their features with the scripts that users have; return the features."""
    clips, features = folder / "clips", folder / "features"
    run_script("scripts/make_demo_clips.py", "--sound", name, "--count", args.clips, "--out", clips,
               "--seed", args.seed)
    run_script("extract_features.py", clips, "--output_dir", features, "--prompts", clips / "prompts.txt",
               "--variant", VARIANT, "--device", args.device, *format_flags)
    return features


def teach_adapter(name: str, folder: Path, bench: QualityBench) -> Taught:
    """Train an adapter on clips of a new class with the scripts that users have."""
    args = bench.args
    features, run = make_clips(name, folder, args), folder / "run"
    own = ["--generator", args.generator] if args.generator else []
    started = time.monotonic()
    cpu_seconds = run_script(
        "train_lora.py", "--config", args.preset, "--data_dir", features, "--output_dir", run, "--variant", VARIANT,
        "--device", args.device, "--seed", args.seed, *own)
    seconds, path = time.monotonic() - started, run / "adapter_final.pt"
    generator, adapter = bench.generator(), load_adapter(path)
    merge_adapter(generator, adapter, 1.0)
    uses_clip = adapter.meta.get("clip_features", "use") == "use"
    return Taught(generator, uses_clip, seconds, cpu_seconds, path.stat().st_size, adapter)


def teach_generator(name: str, folder: Path, bench: QualityBench) -> Taught:
    """Train the whole generator on clips of a new class, and on the old data that was given."""
    args = bench.args
    features, run = make_clips(name, folder, args, "--format", "memmap"), folder / "run"
    started = time.monotonic()
    cpu_seconds = run_script(
        "scripts/train_base.py", "--config", args.finetune, "--variant", VARIANT, "--device", args.device, "--seed",
        args.seed, "--init", args.generator or "published", "--output_dir", run, "--data",
        f"{features}:{args.new_weight:g}", *args.old_data)
    seconds, path = time.monotonic() - started, run / "export" / f"{VARIANT}_ema.safetensors"
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    generator = load_generator(VARIANT, None, bench.device, file=path)
    return Taught(generator, settings["clip_features"] == "use", seconds, cpu_seconds, path.stat().st_size)


MEASURES: dict[str, Callable[[QualityBench], dict[str, Any]]] = {
    "base": measure_base,
    "selection": measure_selection,
    "adaptation": measure_adaptation,
    "guidance": measure_guidance,
    "finetuning": measure_finetuning,
}


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    own = args.generator
    if args.output is None:
        args.output = Path(f"tiny_quality_{own.stem}.json" if own else "tiny_quality.json")
    if args.document is None and own is None:
        args.document = ROOT / "docs" / "tiny_model.md"
    if own is not None and not own.is_file():
        raise cli.UsageError(f"--generator {own}: no such file")
    figures = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    started, bench = time.monotonic(), QualityBench(args)
    log.info("classifier fitted in %s", clock(time.monotonic() - started))
    for name in args.only:
        started = time.monotonic()
        figures[name] = MEASURES[name](bench)
        log.info("%s measured in %s", name, clock(time.monotonic() - started))
        atomic_write_text(args.output, json.dumps(figures, indent=2) + "\n")
    print(figures_text(figures))
    print(args.output)
    if args.document is not None:
        update_document(args.document, BEGIN_MARK, figures_text(figures), TITLE)
        print(args.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
