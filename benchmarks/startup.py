"""One start of a training in a process of its own, up to and including the first step; run.py starts these.

    python benchmarks/startup.py ours --variant tiny_16k --data_dir features --out start.json

ours    what train_lora.py does: its own functions, in its order
plain   as one writes it first (benchmarks/plain.py): every weight file read into memory, CLIP as a whole, every prompt
        and every sound encoded anew

Writes a JSON file of seconds per stage, and beside it tensors by which the two ways are compared.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # the first use of torch.optim imports it anyway, in both ways: no part of what is compared
from measure import resident_bytes
from plain import (
    plain_clip,
    plain_conditions,
    plain_latents,
    plain_text_features,
    plain_training,
    plain_velocity,
    plain_weights,
    wrap_plainly_,
)
from torch import Tensor

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.data.latents import load_waveform
from selva.features import load_features
from selva.inputs.suffixes import AUDIO_SUFFIXES
from selva.lora.config import LoRAConfig
from selva.models.clip_t5 import _clip_tokenizer  # which words become which numbers is no part of what is compared
from selva.models.generator import Generator
from selva.models.variants import Variant, get_variant
from selva.models.zoo import build_generator, build_mel, build_vae
from selva.sequence import sequence_config
from selva.training.clips import load_split
from selva.training.config import RunConfig, TrainConfig
from selva.training.setup import build_run
from selva.utils.device import dtype_of, peak_memory_bytes, resolve_device
from selva.utils.distributed import World
from selva.utils.progress import StageTimes
from selva.weights.config import GeneratorModelConfig
from selva.weights.find import ASSETS, asset_name, find_weights

CHECK_TIME = 0.3  # of the flow, at which the two velocities are compared


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("way", choices=("ours", "plain"), help="what to start")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of .npz and sounds")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the seconds; tensors go beside it")
    parser.add_argument("--began", type=float, help="time.monotonic() when this process was started")
    parser.add_model()
    parser.add_common(precision="bf16")
    return parser


def weight_paths(variant: Variant, selva_dir: Path | None, *parts: str) -> list[Path]:
    """Return the files of some parts, each once."""
    if variant.packaged:
        return [ASSETS / asset_name(variant.name, part) for part in parts]
    found = find_weights(variant, selva_dir, parts)
    return list(dict.fromkeys(found[part][0] for part in parts))


def start_ours(args, times: StageTimes) -> Callable[[], dict[str, Tensor]]:
    """Start as train_lora.py does, and return a function that makes what is compared."""
    config = RunConfig(data_dir=args.data_dir, model=GeneratorModelConfig(args.variant, args.selva_dir, args.device),
                       precision=args.precision, val_fraction=0.0)
    device = resolve_device(args.device)
    with times.stage("data"):
        clips = load_split(config, device, World())
    with times.stage("model"):
        run = build_run(config, clips, device, World())
    with times.stage("first step"):
        run.generator.train()
        run.train_step()[0].item()

    def check() -> dict[str, Tensor]:
        clip, generator = clips[0].clip(0), without_update(run.generator)
        features = [x[None].to(device) for x in (clip.clip_f, clip.sync_f, clip.text_f)]
        noise, t = check_point(clip.mean, device)
        with torch.no_grad(), run.generator.computing_in(run.precision):
            velocity = generator.predict_flow(noise, t, generator.preprocess_conditions(*features))
        return {"latents": clip.mean, "text": clip.text_f, "velocity": velocity}

    return check


def start_plain(args, times: StageTimes) -> Callable[[], dict[str, Tensor]]:
    """Start the plain way, and return a function that makes what is compared."""
    device, variant = resolve_device(args.device), get_variant(args.variant)
    sequence, dtype = sequence_config(variant.mode), dtype_of(args.precision)
    with times.stage("model"):
        generator = build_generator(variant.generator)
        generator.load_published(plain_weights(weight_paths(variant, args.selva_dir, "generator")))
        generator.set_sequence(sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len)
        generator.to(device, dtype)
        lora = LoRAConfig()
        parameters = wrap_plainly_(generator, lora.targets[0], lora.rank)
    with times.stage("CLIP and prompts"):
        clip = plain_clip(variant.clip, weight_paths(variant, args.selva_dir, "clip_text", "clip_image")).to(device)
        tokenize = _clip_tokenizer(variant.clip)
        bundles = [load_features(path) for path in sorted(args.data_dir.glob("*.npz"))]
        texts = [plain_text_features(clip, tokenize([bundle.prompt]).to(device))[0] for bundle in bundles]
    with times.stage("VAE and sound"):
        vae = build_vae(variant.vae)
        vae.load_published(plain_weights(weight_paths(variant, args.selva_dir, "vae")))
        vae.to(device).requires_grad_(False)
        mel = build_mel(variant.mode).to(device)
        sounds = sorted(path for path in args.data_dir.iterdir() if path.suffix in AUDIO_SUFFIXES)
        latents = [
            plain_latents(vae, mel(load_waveform(path, sequence, "peak")[None].to(device)))[0][0] for path in sounds
        ]
    with times.stage("first step"):
        clips = [
            {"x1": x1, "clip": bundle.clip_features[0], "sync": bundle.sync_features[0], "text": text}
            for x1, text, bundle in zip(latents, texts, bundles, strict=True)
        ]
        config = TrainConfig()
        next(plain_training(generator, parameters, clips, config.batch_size, config.lr))

    def check() -> dict[str, Tensor]:
        features = [clips[0][name][None].to(device) for name in ("clip", "sync", "text")]
        noise, t = check_point(latents[0], device)
        with torch.no_grad():
            velocity = plain_velocity(without_update(generator), noise, t, plain_conditions(generator, *features))
        return {"latents": latents[0], "text": texts[0], "velocity": velocity}

    return check


@torch.no_grad()
def without_update(generator: Generator) -> Generator:
    """Return the generator with its adapter back at the start, where it changes nothing."""
    for name, parameter in generator.named_parameters():
        if name.endswith("lora_B"):
            parameter.zero_()
    return generator


def check_point(like: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the same noise (1, N, C) and time (1,) in every process."""
    noise = np.random.default_rng(0).standard_normal((1, *like.shape))
    return torch.from_numpy(noise).float().to(device), torch.tensor([CHECK_TIME], device=device)


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    imports_sec = None if args.began is None else time.monotonic() - args.began
    gc.collect()
    before, times = resident_bytes(), StageTimes()
    check = {"ours": start_ours, "plain": start_plain}[args.way](args, times)
    device = resolve_device(args.device)
    peak = peak_memory_bytes(device) - (before if device.type != "cuda" else 0)
    torch.save({name: x.float().cpu() for name, x in check().items()}, args.out.with_suffix(".pt"))
    total = sum(times.seconds.values())
    figures = {"total": total, "stages": times.seconds, "imports": imports_sec, "mib": peak / 2**20}
    args.out.write_text(json.dumps(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
