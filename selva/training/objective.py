"""Objective of a training step, and validation on fixed noise.

The recipe is that of the base models (MMAudio, arXiv:2412.15322): latents drawn from the VAE posterior at every use,
logit-normal times, video and text conditions replaced by the empty ones with probability 0.1 each. Time, noise, targets
and loss are float32; only the frozen network runs in half precision.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from selva import flow
from selva.data.dataset import Batch, ClipDataset, TrainingClip, collate
from selva.models.generator import Generator
from selva.training.condition_cache import CachedBatch
from selva.training.config import ObjectiveConfig
from selva.utils.device import to_device
from selva.utils.distributed import World

ALONE = World()


@dataclass(frozen=True)
class NoiseSample:
    """Random numbers of one batch, drawn on the CPU in float32 (masks: bool), so that devices agree.

    Attributes:
        posterior, noise: (B, N, C) standard normal. t: (B,). drop_video, drop_text: (B,) which conditions are empty.
    """

    posterior: Tensor
    t: Tensor
    noise: Tensor
    drop_video: Tensor
    drop_text: Tensor

    def part(self, own: slice) -> NoiseSample:
        """Return the random numbers of some items of the batch."""
        return NoiseSample(*(getattr(self, field.name)[own] for field in fields(self)))

    def to(self, device: torch.device) -> NoiseSample:
        """Return the random numbers on a device."""
        return NoiseSample(*(to_device(getattr(self, field.name), device) for field in fields(self)))


def sample_noise(shape: torch.Size, config: ObjectiveConfig, rng: torch.Generator, progress: float) -> NoiseSample:
    """Draw the random numbers for a batch of latents of ``shape`` (B, N, C); the order is MMAudio's."""
    posterior = torch.randn(shape, generator=rng)
    t = flow.sample_times(
        shape[0], config.timestep_mode, rng, sigma=config.logit_normal_sigma,
        progress=progress, curriculum_switch=config.curriculum_switch,
    )
    noise = torch.randn(shape, generator=rng)
    drop_video = torch.rand(shape[0], generator=rng) < config.null_prob
    drop_text = torch.rand(shape[0], generator=rng) < config.null_prob
    return NoiseSample(posterior, t, noise, drop_video, drop_text)


def flow_loss(
    generator: Generator, batch: Batch | CachedBatch, noise: NoiseSample, config: ObjectiveConfig,
    precision: torch.dtype,
) -> Tensor:
    """Return the (B,) flow-matching losses of a batch, in float32.

    Where the configuration masks padding, frames of it do not count, and in their place the network is given the latent
    of silence with the noise of the step: what a clip holds there changes neither the loss nor its gradient.

    Args:
        batch: on the generator's device; features, or their projections from the cache.
        noise: on the CPU or that device, see :func:`sample_noise`.
        precision: autocast dtype of the network; float32 switches autocast off.
    """
    velocity, x0, x1, left_out = predicted_velocity(generator, batch, noise, config, precision)
    return flow.loss(velocity, x0, x1, left_out=left_out)


def predicted_velocity(
    generator: Generator, batch: Batch | CachedBatch, noise: NoiseSample, config: ObjectiveConfig,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the two sides that :func:`flow_loss` compares.

    The network's velocity, noise and data, (B, N, C) each; and the (B, N) mask of the frames that do not count, None if
    all do.
    """
    noise = noise.to(batch.mean.device)
    drop_text = noise.drop_text
    generator.set_sequence(*batch.lengths)
    latent = batch.mean + batch.std * noise.posterior if config.latent == "sample" else batch.mean
    x1 = generator.normalize(latent)
    padding = batch.padding if config.padded_loss == "masked" else None
    if padding is not None:
        x1 = torch.where(padding.mask[:, :, None], generator.normalize(padding.silence), x1)
    xt = flow.interpolate(noise.noise, x1, noise.t)
    drop_video = noise.drop_video | ~batch.has_video
    drop_clip = torch.ones_like(drop_video) if config.clip_features == "empty" else drop_video
    with generator.computing_in(precision):
        if isinstance(batch, CachedBatch):
            conditions = batch.with_dropped(drop_clip, drop_video, drop_text)
        else:
            conditions = generator.preprocess_conditions(*_features(generator, batch, drop_clip, drop_video, drop_text))
        velocity = generator.predict_flow(xt, noise.t, conditions)
    return velocity, noise.noise, x1, padding.mask if padding is not None else None


def _features(
    generator: Generator, batch: Batch, drop_clip: Tensor, drop_video: Tensor, drop_text: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the CLIP, sync and text features of a batch with the empty ones where the (B,) masks are True."""
    pairs = zip(
        (drop_clip, drop_video, drop_text), generator.empty_features(1), (batch.clip_f, batch.sync_f, batch.text_f),
        strict=True,
    )
    clip_f, sync_f, text_f = (torch.where(drop[:, None, None], empty, full) for drop, empty, full in pairs)
    return clip_f, sync_f, text_f


def validate(
    generator: Generator, clips: ClipDataset, config: ObjectiveConfig, precision: torch.dtype, world: World = ALONE,
    objective: Callable[[Batch, NoiseSample], Tensor] | None = None, each: list[Tensor] | None = None,
) -> list[float]:
    """Return the mean held-out loss per time bin, ``config.validation_times`` values from noise to data.

    Args:
        each: gets the (bins,) losses of every clip of this process.
    """
    total = held_out_losses(generator, clips, config, precision, world, objective, each)
    return (world.sum_(total) / len(clips)).tolist()


@torch.no_grad()
def held_out_losses(
    generator: Generator, clips: ClipDataset, config: ObjectiveConfig, precision: torch.dtype, world: World = ALONE,
    objective: Callable[[Batch, NoiseSample], Tensor] | None = None, each: list[Tensor] | None = None,
) -> Tensor:
    """Return the sums of the losses of this process's held-out clips per time bin, on the device.

    Noise and posterior draws of a clip depend on the seed and its id, the times are fixed and nothing is dropped: two
    evaluations differ only by the adapter, and the random state of the training is not touched.

    Args:
        objective: computes the losses; :func:`flow_loss` if None. One that processes share is called equally often in
            all of them.
        each: gets the (bins,) losses of every clip of this process.
    """
    compute = objective or (lambda batch, noise: flow_loss(generator, batch, noise, config, precision))
    was_training = generator.training
    generator.eval()
    total = torch.zeros(config.validation_times, device=generator.latent_mean.device)
    for first in range(0, len(clips), world.size):
        index = first + world.rank
        if index >= len(clips) and objective is None:
            break
        losses = compute(*fixed_draw(generator, clips.clip(min(index, len(clips) - 1)), config))
        if index < len(clips):  # else it only keeps the others company
            total += losses
            if each is not None:
                each.append(losses)
    generator.train(was_training)
    return total


def clip_losses(
    generator: Generator, clips: ClipDataset, config: ObjectiveConfig, precision: torch.dtype, world: World = ALONE
) -> Tensor:
    """Return the (clips, bins) losses of this process's clips as :func:`held_out_losses` computes them."""
    each: list[Tensor] = []
    held_out_losses(generator, clips, config, precision, world, each=each)
    return torch.stack(each)


def fixed_draw(generator: Generator, clip: TrainingClip, config: ObjectiveConfig) -> tuple[Batch, NoiseSample]:
    """Return a clip at the ``config.validation_times`` times of a validation, with its own noise, always the same."""
    count = config.validation_times
    times = (torch.arange(count, dtype=torch.float32) + 0.5) / count
    nothing = torch.zeros(count, dtype=torch.bool)
    rng = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{clip.id}".encode()))
    batch = collate([clip] * count).to(generator.latent_mean.device)
    posterior, noise = (torch.randn(batch.mean.shape, generator=rng) for _ in range(2))
    return batch, NoiseSample(posterior, times, noise, nothing, nothing)
