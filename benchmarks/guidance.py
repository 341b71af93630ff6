"""Measure adapters of `soundbench.py` at several strengths of guidance, with either unconditional branch.

    python benchmarks/guidance.py --work bench --keys select-gong-20-1-e284445f3a      # adds a row to docs/findings.md

Guidance of strength w moves by w times the velocity with conditions less (w - 1) times that without. Both come from
the adapted model, as infer.py samples; or the one without from the base model ("base"), which tells what the adapter
has done to it. A key is that of a row of soundbench.jsonl and of the adapter in the work folder. The scenes, of the new
sound and of the known ones, are the first ones of those that judge its run, and each is sampled from a seed of its own,
the same everywhere. Figures go to --results; an adapter that is there is not measured again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sound_data import KNOWN, Inputs
from sound_judge import heard_figures, uses_clip_features
from sound_plan import ROOT, SCENE_SETS
from sound_rows import read_rows
from tiny_tables import table
from torch import Tensor

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli, flow
from selva.checkpoint import load_adapter
from selva.flow import SamplingConfig
from selva.lora.merge import merge_adapter
from selva.models.generator import Generator
from selva.models.variants import get_variant
from selva.sampling import draw_noise
from selva.sequence import sequence_config
from selva.utils.device import resolve_device
from selva.utils.document import begin_mark, marked_block, update_document
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text
from selva.utils.progress import Progress
from selva.weights.load import load_generator
from toyworld.judging import Classifier, fit_classifier
from toyworld.measure import EncodedCases, ToyGenerator

VARIANT = "tiny_16k"
STRENGTHS = {"adapted": (1.0, 1.5, 2.0, 3.0, 4.5), "base": (1.5, 2.0, 3.0, 4.5)}  # at 1 the branch does not count
BATCH = 4
BEGIN_MARK = begin_mark("benchmarks/guidance.py")
MEASURES = (("new", "recognised", "The share of the new scenes that is recognised, in %", 100, "{:.0f}"),
            ("known", "recognised", "The share of the known scenes that is recognised, in %", 100, "{:.0f}"),
            ("new", "distance_db", "The distance of the new sounds to the true ones, in dB", 1, "{:.1f}"))

Row = dict[str, Any]


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("measurement")
    group.add_argument("--keys", nargs="+", required=True, metavar="KEY", help="runs of soundbench.py")
    group.add_argument("--work", type=Path, default=Path("soundbench"), help="work folder of soundbench.py")
    group.add_argument("--rows", type=Path, default=ROOT / "benchmarks" / "soundbench.jsonl", help="its rows")
    group.add_argument("--count", type=cli.positive_int, default=12, help="scenes of the new sound")
    group.add_argument("--known", type=cli.positive_int, default=20, help="scenes of the known ones, in turn")
    group.add_argument("--duration", type=float, default=8.0, help="seconds of a scene")
    group.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "guidance.json",
                       help="figures of all keys; added to")
    group.add_argument("--document", type=Path, default=ROOT / "docs" / "findings.md", help="gets the tables")
    group.add_argument("--threads", type=cli.positive_int, default=1, help="threads of PyTorch")
    parser.add_common(seed=False)
    return parser


@torch.no_grad()
def guided_latents(
    adapted: Generator, branch: Generator, scenes: Sequence[EncodedCases], strength: float, first_seed: int,
    duration_sec: float, clip_features: bool,
) -> Tensor:
    """Return (B, N, C) latents, by the conditional velocity of one generator and the unconditional one of another."""
    lengths = sequence_config(get_variant(VARIANT).mode, duration_sec)
    for generator in (adapted, branch):
        generator.set_sequence(lengths.latent_seq_len, lengths.clip_seq_len, lengths.sync_seq_len)
    clip_f, sync_f, text_f = (torch.cat([getattr(one, name) for one in scenes]).to(adapted.latent_mean.device)
                              for name in ("clip_f", "sync_f", "text_f"))
    if not clip_features:
        clip_f = adapted.empty_features(len(scenes))[0]
    conditions = adapted.preprocess_conditions(clip_f, sync_f, text_f)
    empty = branch.empty_conditions(len(scenes))

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        times = torch.full((len(x),), t.item(), device=x.device)
        v_cond = adapted.predict_flow(x, times, conditions)
        return v_cond if strength == 1 else flow.guided(v_cond, branch.predict_flow(x, times, empty), strength)

    noise = draw_noise(adapted, range(first_seed, first_seed + len(scenes))).to(adapted.latent_mean.device)
    return adapted.unnormalize(flow.solve(velocity, noise, SamplingConfig()))


def measure(row: Row, args, maker: ToyGenerator, classifier: Classifier) -> Row:
    """Return the figures of one run at all strengths, by the branch."""
    path = args.work / "adapters" / f"{row['key']}.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such file; soundbench.py leaves it there when it makes the run anew")
    adapter, base, adapted = load_adapter(path), *(load_generator(VARIANT, None).to(maker.device).eval() for _ in "ab")
    merge_adapter(adapted, adapter, 1.0)
    inputs = Inputs(args.work, maker, args.duration)
    found: Row = {name: row[name] for name in ("key", "method", "sound", "seed")} | {name: {} for name in STRENGTHS}
    with Progress(2 * sum(map(len, STRENGTHS.values())), row["key"], "settings") as progress:
        for part, name, count in (("new", row["sound"], args.count), ("known", KNOWN, args.known)):
            cases, encoded = (some[:count] for some in inputs.scenes(row["scenes"], name))
            found[f"{part}_scenes"] = len(cases)
            for branch, generator in (("adapted", adapted), ("base", base)):
                for strength in STRENGTHS[branch]:
                    sounds = []
                    for first in range(0, len(cases), BATCH):
                        latents = guided_latents(adapted, generator, encoded[first : first + BATCH], strength, first,
                                                 args.duration, uses_clip_features(adapter))
                        sounds += maker.decode(latents, args.duration)
                    heard = heard_figures(sounds, cases, classifier)
                    figures = {key: heard[key] for key in ("recognised", "distance_db", "hits")}
                    found[branch].setdefault(f"{strength:g}", {})[part] = figures
                    progress.update(progress.done + 1)
    return found


def tables(rows: Sequence[Row]) -> list[str]:
    """Return Markdown: how often the sound is recognised, and its distance to the true one, a line per run."""
    counts = ", ".join(f"{rows[0][f'{part}_scenes']} {part}" for part in ("new", "known"))
    parts = [f"### Guidance\n\nScenes ({counts}), made with guidance of several strengths. Without conditions the "
             "adapted model is asked, as `infer.py` does it, or the base model."]
    columns = [(name, f"{strength:g}") for name, strengths in STRENGTHS.items() for strength in strengths]
    header = ("method", "sound", "seed", *(f"{strength}" + ", base" * (name == "base") for name, strength in columns))
    for part, measured, words, factor, form in MEASURES:
        lines = [(row["method"], row["sound"], str(row["seed"]),
                  *(form.format(factor * row[name][strength][part][measured]) for name, strength in columns))
                 for row in rows]
        parts.append(f"\n{words}:\n\n{table(header, lines)}")
    return parts


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    known = {row["key"]: row for row in read_rows(args.rows)}
    if lost := [key for key in args.keys if key not in known]:
        raise UserError(f"{args.rows}: has no run {', '.join(lost)}; soundbench.py --list shows what there is")
    if earlier := [key for key in args.keys if known[key]["scenes"] not in SCENE_SETS]:
        raise UserError(f"{', '.join(earlier)}: made for an earlier version of the world, whose scenes are not made "
                        "any more; expected keys of runs of this one")
    rows: list[Row] = json.loads(args.results.read_text(encoding="utf-8")) if args.results.is_file() else []
    missing = [key for key in args.keys if all(row["key"] != key for row in rows)]
    if missing:
        maker, classifier = ToyGenerator(VARIANT, resolve_device(args.device)), fit_classifier()
        for key in missing:
            rows.append(measure(known[key], args, maker, classifier))
            text = ",\n".join(json.dumps(row) for row in rows)
            atomic_write_text(args.results, f"[{text}]\n")
    update_document(args.document, BEGIN_MARK, marked_block(BEGIN_MARK, tables(rows)))
    print(args.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
