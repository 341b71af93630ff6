"""Measure which figures of an evaluation tell the truth: rank correlations with what is wrong with a sound.

    python benchmarks/metric_trust.py                            # everything; writes the table in docs/evaluation.md
    python benchmarks/metric_trust.py --only timing --count 1    # a quick look at part of it

Sounds of the toy world, of which all is known, are spoilt by a known amount and measured against the true recording by
`selva.evaluation`, as scripts/evaluate.py does. A sound is another take of the scene (the same strokes, other details),
brought through the VAE and the vocoder of tiny_16k, so that it is as far from the recording as one of a perfect model.

timing    the whole sound comes 0 to 400 ms early or late
class     a share of the strokes, 0 to 1, is of another thing
noise     white noise, none to as loud as the sound
adapter   a sound that tiny_16k does not know, taught by the quickstart's preset: strength 1 down to 0

Everything lies in --work, where a stopped measurement goes on; remove that folder after a change of the code.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from spoilt_sounds import LEVELS, STRUCK, Item, correlation, make_sounds
from tiny_tables import table

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.evaluation.config import EvaluationConfig
from selva.evaluation.outputs import ROWS
from selva.evaluation.run import PAIRED, evaluate
from selva.media import read_audio
from selva.utils.document import begin_mark, marked_block, update_document
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text
from selva.utils.text import counted
from toyworld import UNSEEN
from toyworld.judging import fit_classifier
from toyworld.measure import MEASURE_SEED, ToyGenerator, single_cases

log = logging.getLogger("selva.metric_trust")

ROOT = Path(__file__).resolve().parents[1]
BEGIN_MARK = begin_mark("benchmarks/metric_trust.py")
VARIANT, DURATION_SEC, FIRST_SEED = "tiny_16k", 8.0, MEASURE_SEED + 600_000
# Without networks: no trained ones are at hand that this measurement could do without a download.
FIGURES = tuple(key for key in PAIRED if key not in ("desync_sec", "clap_score", "ast_kl"))
HEADINGS = {"timing": "time offset, 0 to 400 ms", "class": "share of strokes of a wrong class",
            "noise": "noise, none to 0 dB", "adapter": "adapter, strength 1 to 0"}
CLASSIFIER = functools.cache(fit_classifier)


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("measurement")
    group.add_argument("--only", nargs="+", choices=list(LEVELS), default=list(LEVELS), help="parts to measure")
    group.add_argument("--count", type=cli.positive_int, default=4, help="scenes per class; three times that with an "
                       "adapter")
    group.add_argument("--sound", choices=list(UNSEEN), default=next(iter(UNSEEN)), help="that the adapter is taught")
    group.add_argument("--clips", type=cli.positive_int, default=16, help="clips that teach it")
    group.add_argument("--preset", type=Path, default=ROOT / "configs" / "tiny_new_sound.yaml",
                       help="settings of train_lora.py")
    group.add_argument("--work", type=Path, default=Path("metric_trust"), help="folder of sounds and figures")
    group.add_argument("--document", type=Path, default=ROOT / "docs" / "evaluation.md",
                       help="the tables between its two marks are replaced")
    parser.add_common(seed=False, device=False)
    return parser


# -- the parts ---------------------------------------------------------------------------------------------------------


def make_adapter_sounds(args: argparse.Namespace, work: Path) -> list[str]:
    """Teach the sound, and generate it at every strength, with the scripts that users have; return the clips' names."""
    clips, features, run, new = (work / name for name in ("clips", "features", "run", "reference"))
    demo = ("scripts/make_demo_clips.py", "--sound", args.sound)
    if not (run / "report.html").is_file():  # the last file of a training
        _run(*demo, "--count", args.clips, "--out", clips)
        _run("extract_features.py", clips, "--output_dir", features, "--prompts", clips / "prompts.txt", "--variant",
             VARIANT, "--device", "cpu")
        _run("train_lora.py", "--config", args.preset, "--data_dir", features, "--output_dir", run, "--variant",
             VARIANT, "--device", "cpu", "--resume", "auto")
    names = [f"{args.sound}_{number:03d}" for number in range(1, 3 * args.count + 1)]
    if not all((new / file).is_file() for file in ("prompts.txt", *(f"{name}.flac" for name in names))):
        _run(*demo, "--count", len(names), "--out", new, "--seed", 7)
    for level in LEVELS["adapter"]:
        _run("infer.py", new, "--prompts", new / "prompts.txt", "--variant", VARIANT, "--device", "cpu",
             "--clip_features", "use", "--audio_only", "--adapter", run / "adapter_final.pt", "--strength", 1 - level,
             "--output", work / f"adapter_{level:g}")
    return names


def _run(script: str, *arguments: Any) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    log.info("%s", " ".join(command[1:]))
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise UserError(f"{script} ended with exit code {done.returncode}; its messages are above")


def measure(part: str, args: argparse.Namespace) -> list[Item]:
    """Return the figures of all sounds of a part."""
    if part == "adapter":
        work = args.work / args.sound
        truth = {(name, level): level for name in make_adapter_sounds(args, work) for level in LEVELS[part]}
    else:
        work = args.work
        cases = single_cases(STRUCK, args.count, FIRST_SEED, DURATION_SEC)
        truth = make_sounds(part, cases, ToyGenerator(VARIANT, torch.device("cpu")), work)
    items: list[Item] = []
    for level in LEVELS[part]:
        folder = work / f"{part}_{level:g}"
        found = evaluate(EvaluationConfig(
            folder, work / "reference", output_dir=work / f"{folder.name}_figures", device="cpu"))
        items += [(pair.name, truth[pair.name, level], {key: figures.get(key) for key in FIGURES})
                  for pair, figures in found.pairs if (pair.name, level) in truth]
    return items


def recognised_share(args: argparse.Namespace, names: Sequence[str], level: float) -> float:
    """Return the share of generated sounds that a classifier of true sounds takes for the taught one."""
    folder = args.work / args.sound / f"adapter_{level:g}"
    heard = [CLASSIFIER().classify(read_audio(folder / f"{name}.flac")[0][0].numpy()) for name in names]
    return float(np.mean([word == args.sound for word in heard]))


def summary(part: str, items: Sequence[Item], args: argparse.Namespace) -> dict[str, Any]:
    """Return a part as JSON holds it: correlations with intervals, and the mean of every figure at every level."""
    names, levels = sorted({name for name, _, _ in items}), sorted({truth for _, truth, _ in items})
    means: dict[str, list[float | None]] = {}
    for key in FIGURES:
        of_level = [[abs(f[key]) if PAIRED[key] else f[key] for _, truth, f in items if truth == level
                     and f[key] is not None] for level in levels]
        means[key] = [float(np.mean(values)) if values else None for values in of_level]
    correlations = {key: vars(correlation(items, key)) for key in FIGURES}
    found = {"scenes": len(names), "sounds": len(items), "levels": levels, "correlations": correlations, "means": means}
    if part == "adapter":
        found |= {"sound": args.sound, "recognised": [recognised_share(args, names, level) for level in levels]}
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def document_text(figures: dict[str, Any]) -> str:
    """Return the block of the document."""
    parts = [part for part in LEVELS if part in figures]
    rows, scale = [], []
    for key in FIGURES:
        row = ROWS[key]
        rows.append((row.name, *(_correlation(figures[part]["correlations"][key]) for part in parts)))
        name = f"{row.name} ({row.unit})" if row.unit else row.name
        scale.append((name, *(_ends(figures[part]["means"][key], row.number) for part in parts)))
    header = [HEADINGS[part] for part in parts]
    numbers = "; ".join(
        f"{part}: {counted(figures[part]['sounds'], 'sound')} of {counted(figures[part]['scenes'], 'scene')}"
        for part in parts)
    texts = [f"Rank correlation of each figure, of single pairs of 8 s, with what is wrong ({numbers}), and its 95 % "
             "interval. Near 1: it always tells the worse sound from the better one; 0: it does not see it; below 0: "
             "it is misled. **Bold**: 0.5 and more.\n",
             table(("", *header), rows),
             "The means at the two ends, nothing wrong → most wrong, to know what a value stands for:\n",
             table(("", *header), scale)]
    if "adapter" in figures:
        shares = ", ".join(f"{share:.0%}" for share in figures["adapter"]["recognised"])
        texts.append(f"Share of sounds that are recognised as a {figures['adapter']['sound']} at strength 1 down to 0: "
                     f"{shares}.\n")
    return marked_block(BEGIN_MARK, texts)


def _correlation(found: dict[str, Any]) -> str:
    if not np.isfinite(found["value"]):
        return "-"
    value = f"{found['value'] + 0:.2f}"
    value = f"**{value}**" if found["value"] >= 0.5 else value
    return value if found["low"] is None else f"{value} ({found['low']:.2f} to {found['high']:.2f})"


def _ends(means: Sequence[float | None], number: str) -> str:
    return " → ".join("-" if mean is None else f"{mean:{number}}" for mean in (means[0], means[-1]))


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    output = args.work / "metric_trust.json"
    figures = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    for part in args.only:
        figures[part] = summary(part, measure(part, args), args)
        atomic_write_text(output, json.dumps(figures, indent=1) + "\n")
    text = document_text(figures)
    update_document(args.document, BEGIN_MARK, text)
    print(text)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
