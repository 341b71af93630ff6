"""Seams in long sounds: windows that move together, beside one pass and beside clips that are cut together.

    python benchmarks/long_sounds.py --variant tiny_16k --features long/*.npz
    python benchmarks/long_sounds.py --variant small_16k --selva_dir weights --prompt "rain on a roof" --device cuda

"windows" is what infer.py --long does. "one pass" gives the model the whole length at once: no joins, but a length that
it was not trained for. "cut" makes a sound for every window on its own and cuts them together in the middle of the
overlaps. All are decoded; around the joins (of "one pass", the same times) and everywhere else is measured:

    level     how much the level differs between the 100 ms before and after, in dB
    spectrum  how much the spectrum does, the log-spectral distance in dB
    onset     the strongest rise within 50 ms to either side; 1 is about an onset

What has no seams has the same figures at the joins as elsewhere. Prints a Markdown table and writes a JSON file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from results import write_results
from torch import Tensor

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.audio.metrics import onset_strength, power_frames
from selva.features import load_features
from selva.flow import SamplingConfig
from selva.inference.long_sampling import DEFAULT_OVERLAP_SEC, WindowGrid, sample_long, window_grid
from selva.models.generator import Generator
from selva.models.variants import get_variant
from selva.sampling import decode_latents, sample_latents
from selva.sequence import DEFAULT_DURATION_SEC, SAMPLING_RATES
from selva.utils.device import resolve_device
from selva.utils.errors import UserError
from selva.utils.progress import Progress
from selva.weights.load import load_clip_text, load_generator, load_vae, load_vocoder

METHODS = ("windows", "one pass", "cut")
MEASURES = ("level", "spectrum", "onset")
BESIDE_SEC, AROUND_SEC, FLOOR = 0.1, 0.05, 1e-10  # of full-scale power

Features = tuple[Tensor | None, Tensor | None, Tensor]  # of CLIP, of motion, of the text; None: the empty ones


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("comparison")
    group.add_argument("--features", type=Path, nargs="+", default=[], metavar="FILE.npz",
                       help="clips longer than --window, with their own prompts")
    group.add_argument("--prompt", default="rain on a roof", help="what to make sound of without --features")
    group.add_argument("--duration", type=float, default=30.0, help="seconds, without --features")
    group.add_argument("--window", type=float, default=DEFAULT_DURATION_SEC, help="seconds of a window")
    group.add_argument("--overlap", type=float, default=DEFAULT_OVERLAP_SEC, help="seconds that windows share")
    group.add_argument("--num_steps", type=cli.positive_int, default=SamplingConfig.num_steps, help="Euler steps")
    group.add_argument("--num_seeds", type=cli.positive_int, default=2, help="sounds per clip, from --seed on")
    group.add_argument("--output", type=Path, default=Path("long_sounds.json"), help="where the figures go")
    parser.add_model()
    parser.add_common()
    return parser


def read_clip(args, path: Path | None, device: torch.device) -> tuple[float, Features]:
    """Return the seconds and the features of one clip, or of the prompt alone."""
    variant = get_variant(args.variant)
    bundle = load_features(path) if path else None
    text = bundle.text_features if bundle else None
    if text is None:
        text = load_clip_text(variant.name, args.selva_dir, device).encode([bundle.prompt if bundle else args.prompt])
    clip_f = bundle.clip_features.to(device) if bundle and variant.family == "mmaudio" else None  # as released
    duration = bundle.duration if bundle else args.duration
    if duration <= args.window:
        raise UserError(f"{path or '--duration'}: {duration:g} s is not longer than a window of {args.window:g} s")
    return duration, (clip_f, bundle.sync_features.to(device) if bundle else None, text.to(device))


def sample_window(
    generator: Generator, grid: WindowGrid, index: int, features: Features, seed: int, config: SamplingConfig
) -> Tensor:
    """Return the latents (1, n, C) of one window as if it were a clip."""
    clip_f, sync_f, text_f = features
    lengths = grid.window
    generator.set_sequence(lengths.latent_seq_len, lengths.clip_seq_len, lengths.sync_seq_len)
    empty_clip, empty_sync, _ = generator.empty_features(1)
    return sample_latents(
        generator,
        empty_clip if clip_f is None else clip_f[:, grid.clip_frames(index)],
        empty_sync if sync_f is None else sync_f[:, grid.sync_tokens(index)],
        text_f, [seed], config,
    )


def join_frames(grid: WindowGrid) -> list[int]:
    """Return the latent frame in the middle of every overlap."""
    return [(grid.latents(i - 1).stop + grid.latents(i).start) // 2 for i in range(1, len(grid.segments))]


def sample(args, method: str, generator: Generator, grid: WindowGrid, features: Features, seed: int) -> Tensor:
    """Return the latents (1, N, C) of one of METHODS."""
    config = SamplingConfig(args.num_steps)
    if method == "cut":
        edges, parts = [0, *join_frames(grid), grid.whole.latent_seq_len], []
        for i, start in enumerate(grid.latent_starts):
            window = sample_window(generator, grid, i, features, seed + 1000 * i, config)
            parts.append(window[:, edges[i] - start : edges[i + 1] - start])
        return torch.cat(parts, dim=1)
    whole = grid.whole
    return sample_long(
        generator, *features, [seed], config, mode=whole.mode, duration_sec=whole.duration_sec,
        window_sec=args.window if method == "windows" else whole.duration_sec, overlap_sec=args.overlap,
    )


def seam_figures(waveform: Tensor, rate: int, times: Sequence[float]) -> dict[str, np.ndarray]:
    """Return (times,) of each of MEASURES at ``times`` of a sound (samples,)."""
    beside = round(BESIDE_SEC * rate)
    strength, frame_times = onset_strength(waveform, rate)
    figures: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for time in times:
        at = round(time * rate)
        before, after = waveform[at - beside : at], waveform[at : at + beside]
        levels = [10 * (x.double().square().mean() + FLOOR).log10() for x in (before, after)]
        spectra = [
            10 * (power_frames(x, rate, BESIDE_SEC / 3, padded=False).mean(dim=0) + FLOOR).log10()
            for x in (before, after)
        ]
        figures["level"].append(abs(levels[1] - levels[0]).item())
        figures["spectrum"].append((spectra[1] - spectra[0]).square().mean().sqrt().item())
        figures["onset"].append(strength[np.abs(frame_times - time) <= AROUND_SEC].max())
    return {measure: np.array(values) for measure, values in figures.items()}


def measure(args, generator: Generator, device: torch.device) -> list[dict]:
    """Return a row per clip, seed and method: the means of the measures at the joins and elsewhere."""
    variant = get_variant(args.variant)
    vae = load_vae(variant.name, args.selva_dir, device)
    vocoder = load_vocoder(variant.name, args.selva_dir, device)
    rate, paths = SAMPLING_RATES[variant.mode], args.features or [None]
    rows = []
    with Progress(len(paths) * args.num_seeds * len(METHODS), "sampling", "sounds") as progress:
        for path in paths:
            duration, features = read_clip(args, path, device)
            grid = window_grid(variant.mode, duration, args.window, args.overlap)
            frame_sec = duration / grid.whole.latent_seq_len
            joins = [frame * frame_sec for frame in join_frames(grid)]
            elsewhere = [t for t in np.arange(0.2, duration - 0.2, 0.1) if min(abs(t - j) for j in joins) > 0.3]
            for seed in range(args.seed, args.seed + args.num_seeds):
                for method in METHODS:
                    latents = sample(args, method, generator, grid, features, seed)
                    sound = decode_latents(latents, vae, vocoder, chunk_sec=DEFAULT_DURATION_SEC)[0].cpu()
                    row = {"clip": str(path or args.prompt), "seed": seed, "method": method, "joins": len(joins)}
                    for place, times in (("at_joins", joins), ("elsewhere", elsewhere)):
                        row[place] = {k: float(v.mean()) for k, v in seam_figures(sound, rate, times).items()}
                    rows.append(row)
                    progress.update(progress.done + 1)
    return rows


def markdown(rows: list[dict]) -> str:
    """Return a table of the means over clips and seeds, at the joins and elsewhere."""
    lines = [f"| | {' | '.join(f'{m} at joins | elsewhere' for m in MEASURES)} |", "|---" * 7 + "|"]
    for method in METHODS:
        cells = [
            f"{np.mean([row[place][m] for row in rows if row['method'] == method]):.2f}"
            for m in MEASURES for place in ("at_joins", "elsewhere")
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    rows = measure(args, load_generator(args.variant, args.selva_dir).to(device).eval(), device)
    write_results(args.output, cli.saved_settings(args), rows)
    print(markdown(rows))
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
