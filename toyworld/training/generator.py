"""Stages "generator" and "finetune": flow matching on features and latents of scenes that were encoded once.

An item is one object of a scene: the features of the picture and of prompts for it, and the latents of its sound alone.
Scenes of 8 s are cut into windows of many lengths, which start with a sync segment; 0.32 s are ten latent frames.

Stage "generator" reads the features that the video encoder should give, computed from the ground truth, so it needs no
pictures and does not wait for the encoder. Stage "finetune" continues with those that it does give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from selva.data.dataset import Batch
from selva.models.blocks import JointBlock
from selva.models.clip_t5 import ClipImage, ClipText
from selva.models.generator import Generator
from selva.models.mel import MelSpectrogram
from selva.models.vae import VAE
from selva.sequence import (
    CLIP_FPS,
    SYNC_FPS,
    SYNC_SEGMENT_STEP,
    SYNC_TOKENS_PER_SEGMENT,
    sequence_config,
)
from selva.training.config import TrainConfig
from selva.training.objective import NoiseSample, flow_loss, sample_noise
from selva.utils.files import atomic_path
from selva.utils.progress import Progress
from selva.utils.torch_files import write_torch
from toyworld import Scene
from toyworld.training.encoders import SyncNetwork, ideal_features
from toyworld.training.loop import Task, torch_rng
from toyworld.training.prompts import vary
from toyworld.training.scenes import PoolConfig

PEAK = 0.95  # of a training sound, as in selva.media.prepare_audio
SEGMENT_SEC = SYNC_SEGMENT_STEP / SYNC_FPS
LATENTS_PER_SEGMENT = 10
FEATURE_NOISE = 0.3  # largest deviation of the noise on ideal features, whose values reach FEATURE_SCALE
CERTAINTY = (0.35, 1.1)  # what ideal features are multiplied by
LEAK = 0.4  # at most so much of the other thing's features, in relation to those of the named one
WORDINGS = 4  # prompts per object whose CLIP features are kept
CLIP_DROP = 0.6  # SelVA's generator is used without CLIP frame features by default, so it mostly learns without
DURATIONS_SEC = (8.0,) * 8 + (4.0, 2.56)  # of windows, drawn evenly
FRAME_SHARE = 0.1  # of what frame features would do, before there was any training with them
PLACE_PAIR = 8  # of rotary frequencies: turns by 2.5 radians in 250 latent frames
PLACE_SHARE = 0.53  # of a query that looks for its place
PLACE_BIAS = 4.0  # against projections of unit deviation
SECONDS_PER_ITEM = 8.0  # a batch of n items holds n times this much sound, in more windows if they are shorter


@dataclass(frozen=True)
class Encoders:
    """The trained networks of the earlier stages, frozen, in eval mode; ``sync`` is None where it is not needed."""

    sync: SyncNetwork | None
    clip_text: ClipText
    clip_image: ClipImage
    vae: VAE
    mel: MelSpectrogram


class EncodedScenes:
    """Everything the generator is trained on, stacked over items, in half precision.

    Attributes:
        mean, std: (items, N, C). sync: (items, S, D). text: (items, WORDINGS, 77, D).
        clip: (items, T, D); without pictures, (items, 0, D).
        places: (scene, object) of every item.
    """

    FIELDS = ("mean", "std", "sync", "clip", "text")

    def __init__(self, tensors: dict[str, Tensor], places: Sequence[tuple[int, int]], config: PoolConfig) -> None:
        self.mean, self.std, self.sync, self.clip, self.text = (tensors[name] for name in self.FIELDS)
        self.places, self.config = list(places), config
        self.sequence = sequence_config("16k", config.duration_sec)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def has_pictures(self) -> bool:
        """True where features are those of pictures, not ideal ones."""
        return self.clip.shape[1] > 0

    @classmethod
    def load_or_make(
        cls, config: PoolConfig, encoders: Encoders, clip_size: int | None, path: Path, fingerprint: str
    ) -> EncodedScenes:
        """Return the content of ``path`` if it was made from the same scenes and weights, else encode and write it.

        Without ``clip_size`` no pictures are painted: sync features are the ideal ones, CLIP features there are none.
        """
        places = [(i, k) for i in range(config.count) for k in range(len(config.scene(i).objects))]
        key = f"{config} {clip_size} {fingerprint}"
        if path.is_file():
            stored = torch.load(path, weights_only=True)
            if stored["key"] == key:
                return cls(stored["tensors"], places, config)
        tensors = _encode(config, encoders, clip_size)
        with atomic_path(path) as temporary:
            write_torch({"key": key, "tensors": tensors}, temporary)
        return cls(tensors, places, config)

    def batch(self, items: Sequence[int], segment: Sequence[int], duration_sec: float, wording: Sequence[int]) -> Batch:
        """Return windows of ``duration_sec`` that start at a sync segment each."""
        lengths = sequence_config("16k", duration_sec)

        def cut(x: Tensor, starts: Sequence[int], length: int) -> Tensor:
            return torch.stack([x[i, s : s + length].float() for i, s in zip(items, starts, strict=True)])

        latent = [s * LATENTS_PER_SEGMENT for s in segment]
        clip = [int(s * SEGMENT_SEC * CLIP_FPS) for s in segment]
        text = torch.stack([self.text[i, w].float() for i, w in zip(items, wording, strict=True)])
        if self.has_pictures:
            clip_f = cut(self.clip, clip, lengths.clip_seq_len)
        else:
            clip_f = torch.zeros(len(items), lengths.clip_seq_len, self.clip.shape[2])
        return Batch(
            cut(self.mean, latent, lengths.latent_seq_len), cut(self.std, latent, lengths.latent_seq_len), clip_f,
            cut(self.sync, [s * SYNC_TOKENS_PER_SEGMENT for s in segment], lengths.sync_seq_len),
            text, torch.ones(len(items), dtype=torch.bool), tuple(map(str, items)),
        )

    def other_sync(self, items: Sequence[int], segment: Sequence[int], length: int) -> Tensor:
        """Return (B, length, D) sync features of the other thing in the scene of every item, 0 where there is none."""
        numbers = {place: number for number, place in enumerate(self.places)}
        rows = []
        for item, start in zip(items, segment, strict=True):
            scene, thing = self.places[item]
            other, first = numbers.get((scene, 1 - thing)), start * SYNC_TOKENS_PER_SEGMENT
            row = self.sync[item if other is None else other, first : first + length].float()
            rows.append(torch.zeros_like(row) if other is None else row)
        return torch.stack(rows)


@torch.no_grad()
def _encode(config: PoolConfig, encoders: Encoders, clip_size: int | None) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name in EncodedScenes.FIELDS}
    device = encoders.vae.data_mean.device
    known: dict[str, Tensor] = {}
    with Progress(config.count, "encode", "scenes") as progress:
        for index in range(config.count):
            scene = config.scene(index)
            for named in range(len(scene.objects)):
                rng = np.random.default_rng((config.first_seed + index, named))
                prompts = [vary(rng, scene.prompt(rng, named)) for _ in range(WORDINGS)]
                for prompt in set(prompts) - set(known):
                    known[prompt] = encoders.clip_text.encode([prompt])[0]
                rows["text"].append(torch.stack([known[prompt] for prompt in prompts]))
                sync, clip = _picture_features(scene, named, prompts[0], config, encoders, clip_size)
                rows["sync"].append(sync)
                rows["clip"].append(clip)
                sound = scene.sound(encoders.mel.config.sampling_rate, only=named)
                sound = torch.from_numpy(sound / np.abs(sound).max() * PEAK)[None].to(device)
                mean, std = encoders.vae.encode(encoders.mel(sound))
                rows["mean"].append(mean[0].mT)
                rows["std"].append(std[0].mT)
            progress.update(index + 1)
    return {name: torch.stack([x.half().cpu() for x in values]) for name, values in rows.items()}


def _picture_features(
    scene: Scene, named: int, prompt: str, config: PoolConfig, encoders: Encoders, clip_size: int | None
) -> tuple[Tensor, Tensor]:
    """Return sync features (S, D) and CLIP features (T, D), or ideal ones and none."""
    if clip_size is None:
        sync = torch.from_numpy(ideal_features(scene, [named]))
        return sync, sync.new_zeros(0, encoders.clip_image.config.embed_dim)
    device = encoders.vae.data_mean.device
    pictures = torch.from_numpy(scene.frames(config.fps, config.size)).permute(0, 3, 1, 2)[None].to(device)
    small = torch.from_numpy(scene.frames(CLIP_FPS, clip_size)).permute(0, 3, 1, 2)
    assert encoders.sync is not None, "pictures need the video encoder"
    return encoders.sync.encode(pictures, [prompt])[0], encoders.clip_image.encode(small)


@torch.no_grad()
def start_with_a_sense_of_place_(generator: Generator) -> None:
    """Let the first head of the first block begin with attention to the text that falls from the start to the end.

    Sync tokens are stretched over the latents although their segments overlap, so when a token's moment comes depends
    on how far into the clip it stands, by up to 0.3 s. Latents have relative positions only; but text tokens have none
    at all, so a rotated constant query against a constant key of theirs measures the absolute position. Found by
    training alone, this takes far longer than everything else.
    """
    block = generator.joint_blocks[0]
    assert isinstance(block, JointBlock)
    heads, pair = generator.config.num_heads, 2 * PLACE_PAIR
    for stream, selector in ((block.latent_block, 0), (block.text_block, 1)):  # queries of latents, keys of text
        qkv = stream.attn.qkv
        weight, bias = (x.unflatten(0, (heads, -1, 3))[0, :, selector] for x in (qkv.weight, qkv.bias))
        weight.mul_(0.1)
        bias.zero_()
        bias[pair] = PLACE_BIAS
    bias = block.latent_block.attn.qkv.bias.unflatten(0, (heads, -1, 3))[0, :, 0]
    bias[pair], bias[-2] = PLACE_SHARE * PLACE_BIAS, (1 - PLACE_SHARE**2) ** 0.5 * PLACE_BIAS
    block.text_block.attn.qkv.bias.unflatten(0, (heads, -1, 3))[0, :, 2] = 1.0  # what attention to the text brings


@torch.no_grad()
def quieten_frames_(generator: Generator) -> None:
    """Bring CLIP frame features, which a generator has never met, near to the empty features that it knows."""
    projection = generator.clip_input_proj[0]
    assert isinstance(projection, nn.Linear)
    projection.bias.add_((1 - FRAME_SHARE) * generator.empty_clip_feat[0] @ projection.weight.T)
    projection.weight.mul_(FRAME_SHARE)


def imperfect(sync_f: Tensor, other_f: Tensor, rng: np.random.Generator) -> Tensor:
    """Return ideal features (B, S, D) as uncertain and noisy as an encoder may give them, with some of the other's."""
    leak = torch.from_numpy(rng.uniform(0, LEAK, len(sync_f)).astype(np.float32))[:, None, None]
    sync_f = sync_f + leak * other_f
    noise = torch.randn(sync_f.shape, generator=torch_rng(rng)) * FEATURE_NOISE * float(rng.random())
    sure = torch.from_numpy(rng.uniform(*CERTAINTY, len(sync_f)).astype(np.float32))[:, None, None]
    return sync_f * sure + noise


class GeneratorTask(Task):
    """Flow matching on random windows of encoded scenes."""

    def __init__(self, generator: Generator, train: EncodedScenes, held_out: EncodedScenes, precision: str) -> None:
        self.network, self.generator, self.train, self.held_out = generator, generator, train, held_out
        self.precision = torch.bfloat16 if precision == "bf16" else torch.float32
        self.objective = TrainConfig()
        self.durations = [d for d in DURATIONS_SEC if d <= train.config.duration_sec]

    def loss(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        batch = self._windows(self.train, rng, batch_size, float(rng.choice(self.durations)))
        noise = sample_noise(batch.mean.shape, self.objective, torch_rng(rng), progress=0.0)
        loss = self._loss(batch, noise, torch.from_numpy(rng.random(len(batch.ids)) < CLIP_DROP))
        return loss.mean(), {}

    def _loss(self, batch: Batch, noise: NoiseSample, no_clip: Tensor) -> Tensor:
        batch = batch.to(self.generator.latent_mean.device)
        empty = self.generator.empty_clip_feat
        if not self.train.has_pictures:
            no_clip = torch.ones_like(no_clip)
        clip = torch.where(no_clip.to(empty.device)[:, None, None], empty, batch.clip_f)
        return flow_loss(self.generator, dataclasses.replace(batch, clip_f=clip), noise, self.objective, self.precision)

    def _windows(self, scenes: EncodedScenes, rng: np.random.Generator, batch_size: int, duration_sec: float) -> Batch:
        count = max(1, round(batch_size * SECONDS_PER_ITEM / duration_sec))
        lengths = sequence_config("16k", duration_sec)
        last = (scenes.sequence.sync_seq_len - lengths.sync_seq_len) // SYNC_TOKENS_PER_SEGMENT
        last = min(last, (scenes.sequence.latent_seq_len - lengths.latent_seq_len) // LATENTS_PER_SEGMENT)
        numbers = (len(scenes), last + 1, WORDINGS)
        items, segment, wording = (rng.integers(number, size=count).tolist() for number in numbers)
        batch = scenes.batch(items, segment, duration_sec, wording)
        if scenes.has_pictures:
            return batch
        other_f = scenes.other_sync(items, segment, lengths.sync_seq_len)
        return dataclasses.replace(batch, sync_f=imperfect(batch.sync_f, other_f, rng))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the held-out loss of whole scenes on fixed noise, without CLIP features, nothing dropped."""
        rng, total = np.random.default_rng(0), []
        objective = TrainConfig(null_prob=0.0, timestep_mode="uniform")
        for first in range(0, len(self.held_out), 8):
            items = range(first, min(first + 8, len(self.held_out)))
            batch = self.held_out.batch(items, [0] * len(items), self.held_out.config.duration_sec, [0] * len(items))
            noise = sample_noise(batch.mean.shape, objective, torch_rng(rng), progress=0.0)
            total.append(self._loss(batch, noise, torch.ones(len(items), dtype=torch.bool)))
        return {"val_loss": float(torch.cat(total).mean())}
