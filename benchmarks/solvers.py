"""Errors of few steps against many: solvers and guidance intervals against many-step Euler.

    python benchmarks/solvers.py --variant tiny_16k
    python benchmarks/solvers.py --variant small_16k --selva_dir weights --features features/*.npz --device cuda

Every row starts from the same noise and conditions as the reference, Euler with --reference_steps. The error is that of
the normalised latents, in dB of their power: -20 dB is a tenth of the amplitude. The spectral distance is that of the
decoded sounds. Both are means over clips and seeds. Solvers that evaluate the velocity equally often cost the same. An
evaluation with guidance is two passes of the network, one per branch; outside an interval it is one.

Without --features the sounds are made from --prompt alone. Prints two Markdown tables and writes a JSON file.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from results import write_results
from torch import Tensor

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli, flow
from selva.audio.metrics import log_spectral_distance
from selva.features import load_features
from selva.flow import WHOLE_INTERVAL, SamplingConfig
from selva.models.generator import Generator
from selva.models.variants import Variant, get_variant
from selva.sampling import decode_latents, sample_latents
from selva.sequence import DEFAULT_DURATION_SEC, SequenceConfig, sequence_config
from selva.utils.device import resolve_device
from selva.utils.progress import Progress
from selva.weights.load import load_clip_text, load_generator, load_vae, load_vocoder

log = logging.getLogger("selva.solvers")

INTERVALS = (WHOLE_INTERVAL, (0.0, 0.8), (0.0, 0.6), (0.2, 1.0), (0.4, 1.0), (0.2, 0.8))


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("comparison")
    group.add_argument("--features", type=Path, nargs="+", default=[], metavar="FILE.npz",
                       help="clips to make sound for; with their own prompts")
    group.add_argument("--prompt", default="a dog barking", help="what to make sound of without --features")
    group.add_argument("--duration", type=float, default=DEFAULT_DURATION_SEC, help="seconds, without --features")
    group.add_argument("--evaluations", type=cli.positive_int, nargs="+", default=[8, 16, 24, 50, 100],
                       help="network evaluations per sound; even numbers suit all solvers")
    group.add_argument("--reference_steps", type=cli.positive_int, default=400, help="Euler steps of the reference")
    group.add_argument("--num_steps", type=cli.positive_int, default=SamplingConfig.num_steps,
                       help="Euler steps with which guidance intervals are compared")
    group.add_argument("--cfg_strength", type=float, default=SamplingConfig.cfg_strength, help="guidance of all rows")
    group.add_argument("--num_seeds", type=cli.positive_int, default=2, help="sounds per clip, from --seed on")
    group.add_argument("--output", type=Path, default=Path("solvers.json"), help="where the figures go")
    parser.add_model()
    parser.add_common()
    return parser


class SampledClip:
    """The conditions of one sound, and the generator that makes it."""

    def __init__(self, generator: Generator, sequence: SequenceConfig, features: Sequence[Tensor | None]) -> None:
        self.generator, self.sequence = generator, sequence
        generator.set_sequence(sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len)
        empty, device = generator.empty_features(1), generator.latent_mean.device
        clip_f, sync_f, text_f = (e if own is None else own.to(device) for own, e in zip(features, empty, strict=True))
        self.features = clip_f, sync_f, text_f

    def sample(self, seed: int, config: SamplingConfig) -> tuple[Tensor, int]:
        """Return (1, N, C) latents, and how often the network ran: with guidance, twice per evaluation."""
        lengths, batches = self.sequence, []
        self.generator.set_sequence(lengths.latent_seq_len, lengths.clip_seq_len, lengths.sync_seq_len)
        hook = self.generator.audio_input_proj.register_forward_pre_hook(lambda _, x: batches.append(len(x[0])))
        latents = sample_latents(self.generator, *self.features, [seed], config).cpu()
        hook.remove()
        return latents, sum(batches)


def read_clips(args, variant: Variant, generator: Generator) -> list[SampledClip]:
    """Return the clips of --features, or one of the prompt alone."""
    clips = []
    encoder = None
    for path in args.features or [None]:
        bundle = load_features(path) if path else None
        text = bundle.text_features if bundle else None
        if text is None:
            encoder = encoder or load_clip_text(variant.name, args.selva_dir, resolve_device(args.device))
            text = encoder.encode([bundle.prompt if bundle else args.prompt])
        sequence = sequence_config(variant.mode, bundle.duration if bundle else args.duration)
        clip_f, sync_f = (bundle.clip_features, bundle.sync_features) if bundle else (None, None)
        if variant.family == "selva":
            clip_f = None  # as officially released
        clips.append(SampledClip(generator, sequence, (clip_f, sync_f, text)))
    return clips


def settings_to_compare(args) -> list[SamplingConfig]:
    """Return every row: solvers at equal numbers of evaluations, then intervals."""
    rows = [
        SamplingConfig(
            evaluations // flow.EVALUATIONS_PER_STEP[solver], cfg_strength=args.cfg_strength, solver=solver
        )
        for evaluations in args.evaluations for solver in flow.SOLVERS
        if evaluations % flow.EVALUATIONS_PER_STEP[solver] == 0
    ]
    return rows + [
        SamplingConfig(args.num_steps, cfg_strength=args.cfg_strength, cfg_interval=bounds) for bounds in INTERVALS
    ]


def error_db(found: Tensor, reference: Tensor) -> float:
    """Return the power of the difference over the power of the reference, in dB."""
    ratio = (found - reference).square().mean() / reference.square().mean()
    return 10 * math.log10(max(ratio.item(), 1e-12))


def measure(args, variant: Variant, generator: Generator, clips: list[SampledClip]) -> list[dict[str, Any]]:
    """Return a row per setting and clip and seed; the first setting is Euler with half the steps of the reference."""
    device = generator.latent_mean.device
    vae = load_vae(variant.name, args.selva_dir, device)
    vocoder = load_vocoder(variant.name, args.selva_dir, device)
    rate = clips[0].sequence.sampling_rate
    half = SamplingConfig(max(1, args.reference_steps // 2), cfg_strength=args.cfg_strength)
    configs = [half, *settings_to_compare(args)]
    rows = []
    with Progress(len(clips) * args.num_seeds * len(configs), "sampling", "sounds") as progress:
        for clip in clips:
            for seed in range(args.seed, args.seed + args.num_seeds):
                reference, _ = clip.sample(seed, SamplingConfig(args.reference_steps, cfg_strength=args.cfg_strength))
                sound = decode_latents(reference.to(device), vae, vocoder)[0].cpu()
                for config in configs:
                    latents, passes = clip.sample(seed, config)
                    found = decode_latents(latents.to(device), vae, vocoder)[0].cpu()
                    normalized = (generator.normalize(x.to(device)) for x in (latents, reference))
                    rows.append({"config": config, "passes": passes, "error_db": error_db(*normalized),
                                 "distance_db": log_spectral_distance(found, sound, rate)})
                    progress.update(progress.done + 1)
    return rows


def summaries(rows: list[dict[str, Any]]) -> dict[SamplingConfig, dict[str, float]]:
    """Return the means of every setting, in the order in which they were measured."""
    return {
        config: {
            key: statistics.fmean(row[key] for row in rows if row["config"] == config)
            for key in ("error_db", "distance_db", "passes")
        }
        for config in dict.fromkeys(row["config"] for row in rows)
    }


def markdown(means: dict[SamplingConfig, dict[str, float]], interval_steps: int) -> str:
    """Return the table of solvers and the table of intervals."""
    solvers = ["| evaluations | solver | steps | error | spectral distance |", "|---|---|---|---|---|"]
    intervals = [f"| guidance from t to t, {interval_steps} Euler steps | network passes | error | spectral distance |",
                 "|---|---|---|---|"]
    for config, mean in means.items():
        cells = f"{mean['error_db']:.1f} dB | {mean['distance_db']:.2f} dB |"
        start, end = config.cfg_interval
        if (start, end) == WHOLE_INTERVAL:
            solvers.append(f"| {config.num_evaluations} | {config.solver} | {config.num_steps} | {cells}")
        if config.solver == "euler" and config.num_steps == interval_steps:
            intervals.append(f"| {start:g} to {end:g} | {mean['passes']:.0f} | {cells}")
    return "\n".join([*solvers, "", *intervals])


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device, variant = resolve_device(args.device), get_variant(args.variant)
    generator = load_generator(variant.name, args.selva_dir).to(device).eval()
    clips = read_clips(args, variant, generator)
    means = summaries(measure(args, variant, generator, clips))
    results = [{**asdict(config), "evaluations": config.num_evaluations, **mean} for config, mean in means.items()]
    write_results(args.output, cli.saved_settings(args), results)
    print(markdown(means, args.num_steps))
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
