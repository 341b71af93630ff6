"""Train the same adapter the way the published trainer does and our way, and compare held-out losses.

    python benchmarks/train_quality.py --data_dir features/demo --variant tiny_16k --steps 400 --seeds 3

(a) "published", as ComfyUI-SelVA's trainer works (docs/fidelity.md): the model, the adapter and the optimiser state in
    bfloat16, time, noise and loss in bfloat16, uniform times, the mode of each latent, no dropped conditions, short
    clips filled up with zero features, batches drawn with replacement, a first step with rate 0.
(b) "ours": the defaults of train_lora.py.

Both start from the same adapter and are judged alike, in float32, on the same held-out clips at their true length:
`cond`, the loss with all conditions, and `null`, the loss with all of them replaced by the empty features, the other
half of what guidance uses. Writes a JSON file and prints a Markdown table.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from results import write_results
from torch import Tensor

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli, flow
from selva.data.dataset import ClipDataset
from selva.data.folder_dataset import load_clip_dataset
from selva.data.latents import encode_latents, load_waveform
from selva.data.split import split_validation
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.lora.state import lora_parameters
from selva.models.generator import Generator
from selva.models.variants import Variant, get_variant
from selva.models.zoo import build_mel
from selva.sequence import SequenceConfig, sequence_config
from selva.training.config import TrainConfig
from selva.training.objective import validate
from selva.training.run import TrainingRun
from selva.utils.device import resolve_device
from selva.utils.errors import UserError
from selva.utils.progress import Progress
from selva.utils.text import counted
from selva.weights.load import load_generator, load_vae

log = logging.getLogger("selva.train_quality")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("comparison")
    group.add_argument("--data_dir", type=Path, required=True, help="folder of feature bundles and their sounds")
    group.add_argument("--output", type=Path, default=Path("train_quality.json"), help="where the figures go")
    group.add_argument("--steps", type=cli.positive_int, default=400, help="updates of each run")
    group.add_argument("--eval_every", type=cli.positive_int, default=100, help="updates between evaluations")
    group.add_argument("--seeds", type=cli.positive_int, default=3, help="runs of each kind")
    group.add_argument("--batch_size", type=cli.positive_int, default=4, help="clips per update")
    group.add_argument("--lr", type=float, default=TrainConfig.lr, help="learning rate of both")
    group.add_argument("--rank", type=cli.positive_int, default=16, help="rank of both adapters")
    group.add_argument("--val_fraction", type=float, default=0.25, help="share of clips held out")
    parser.add_model()
    parser.add_common()
    return parser


def judge(generator: Generator, held_out: ClipDataset, seed: int) -> dict[str, float]:
    """Return the held-out losses with all conditions and with none."""
    config = TrainConfig(seed=seed)
    cond = statistics.fmean(validate(generator, held_out, config, torch.float32))
    null = statistics.fmean(validate(generator, WithoutConditions(held_out, generator), config, torch.float32))
    return {"cond": cond, "null": null}


class WithoutConditions(ClipDataset):
    """The clips of another set with the learned empty features in place of their own."""

    def __init__(self, base: ClipDataset, generator: Generator) -> None:
        self.base, self.empty_text = base, generator.empty_string_feat.detach().cpu()

    @property
    def ids(self) -> list[str]:
        return self.base.ids

    def lengths(self, index: int) -> tuple[int, int, int]:
        return self.base.lengths(index)

    def num_windows(self, index: int) -> int:
        return self.base.num_windows(index)

    def clip(self, index: int, window: int = 0):
        return dataclasses.replace(self.base.clip(index, window), has_video=False, text_f=self.empty_text)


# ---------------------------------------------------------------------------------------------------------------
# the published way
# ---------------------------------------------------------------------------------------------------------------


def filled_up(x: Tensor, length: int) -> Tensor:
    """Return (tokens, channels) with zero rows appended up to ``length`` (pitfall B1)."""
    return F.pad(x, (0, 0, 0, length - x.shape[0]))


def published_clips(
    clips: ClipDataset, variant: Variant, selva_dir: Path | None, device: torch.device
) -> list[dict[str, Tensor]]:
    """Return every clip at 8 s in bfloat16: silence behind the sound, zeros behind the features."""
    full: SequenceConfig = sequence_config(variant.mode)
    vae, mel = load_vae(variant.name, selva_dir, device), build_mel(variant.mode).to(device)
    result = []
    for index in range(len(clips)):
        clip = clips.clip(index)
        assert clip.audio_path is not None
        waveform = load_waveform(clip.audio_path, clip.sequence, "peak")
        waveform = F.pad(waveform, (0, full.num_audio_frames - waveform.shape[0]))
        mean, _ = encode_latents(waveform[None].to(device), mel, vae)
        parts = {
            "x1": mean[0], "clip": filled_up(clip.clip_f, full.clip_seq_len),
            "sync": filled_up(clip.sync_f, full.sync_seq_len), "text": clip.text_f,
        }
        result.append({name: value.to(device, torch.bfloat16) for name, value in parts.items()})
    return result


def train_published(
    generator: Generator, clips: list[dict[str, Tensor]], sequence: SequenceConfig, config: TrainConfig
) -> Iterator[int]:
    """Train in place and yield the number of updates done, for evaluation in between."""
    device = generator.latent_mean.device
    generator.to(torch.bfloat16)
    parameters = lora_parameters(generator)
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)  # our layers would keep float32
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, k / max(1, config.warmup_steps)))
    rng = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        generator.train()
        generator.set_sequence(sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len)
        chosen = [clips[i] for i in torch.randint(len(clips), (config.batch_size,), generator=rng).tolist()]
        batch = {name: torch.stack([clip[name] for clip in chosen]) for name in chosen[0]}
        x1 = generator.normalize(batch["x1"])
        t = torch.rand(config.batch_size, generator=rng, dtype=torch.bfloat16).to(device)
        x0 = torch.randn(x1.shape, generator=rng, dtype=torch.bfloat16).to(device)
        velocity = generator(flow.interpolate(x0, x1, t), batch["clip"], batch["sync"], batch["text"], t)
        loss = F.mse_loss(velocity, x1 - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield step + 1


def train_ours(
    generator: Generator, clips: ClipDataset, held_out: ClipDataset, config: TrainConfig
) -> Iterator[int]:
    """Train in place and yield the number of updates done."""
    run = TrainingRun(generator, clips, held_out, config, torch.bfloat16)
    for _ in range(config.steps):
        generator.train()
        run.train_step()
        yield run.step


def judged_copy(trained: Generator, args, variant: Variant) -> Generator:
    """Return the float32 base model with the adapter of ``trained`` as it stands."""
    model = load_generator(variant.name, args.selva_dir)
    inject_lora(model, LoRAConfig(rank=args.rank))
    with torch.no_grad():
        for own, other in zip(lora_parameters(model), lora_parameters(trained), strict=True):
            own.copy_(other.detach().float().cpu())
    return model.to(trained.latent_mean.device)


def markdown(results: list[dict]) -> str:
    """Return a table of mean and deviation over the seeds."""
    lines = ["| updates | published cond | ours cond | published null | ours null |", "|---|---|---|---|---|"]
    for step in sorted({row["step"] for row in results}):
        cells = []
        for loss in ("cond", "null"):
            for way in ("published", "ours"):
                values = [row[loss] for row in results if row["step"] == step and row["way"] == way]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.fmean(values):.4f} ± {spread:.4f}")
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device, variant = resolve_device(args.device), get_variant(args.variant)
    every, problems = load_clip_dataset(
        args.data_dir, variant, args.selva_dir, device, max_duration_sec=8.0, normalize_audio="peak"
    )
    if problems:
        raise UserError("; ".join(f"{path}: {reason}" for path, reason in problems))
    results = []
    with Progress(2 * args.seeds * args.steps, "training", "steps") as progress:
        for seed in range(args.seed, args.seed + args.seeds):
            clips, held_out = split_validation(every, args.val_fraction, seed)
            if not len(held_out):
                raise UserError(f"{args.data_dir}: {counted(len(every), 'clip')}, too few to hold some out")
            config = TrainConfig(steps=args.steps, lr=args.lr, batch_size=args.batch_size, seed=seed)
            for way in ("published", "ours"):
                generator = load_generator(variant.name, args.selva_dir)
                inject_lora(generator, LoRAConfig(rank=args.rank), torch.Generator().manual_seed(seed))
                generator.to(device)
                start = judge(generator, held_out, seed)
                results.append({"seed": seed, "way": way, "step": 0, **start})
                if way == "published":
                    filled = published_clips(clips, variant, args.selva_dir, device)
                    steps = train_published(generator, filled, sequence_config(variant.mode), config)
                else:
                    steps = train_ours(generator, clips, held_out, config)
                for step in steps:
                    progress.update(progress.done + 1)
                    if step % args.eval_every == 0 or step == args.steps:
                        row = judge(judged_copy(generator, args, variant), held_out, seed)
                        results.append({"seed": seed, "way": way, "step": step, **row})
                        log.info("seed %d, %s, %s: cond %.4f, null %.4f", seed, way, counted(step, "update"),
                                 row["cond"],
                                 row["null"])
    write_results(args.output, cli.saved_settings(args), results)
    print(markdown(results))
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
