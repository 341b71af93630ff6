"""Sampling: conditions and noise -> latents (guided Euler steps) -> mel -> waveform.

The state and the time stay in float32 whatever the network runs in; noise is drawn on the CPU, so one seed means one
sound on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selva import flow
from selva.models.generator import Conditions, Generator
from selva.models.vae import VAE
from selva.models.vocoder import Vocoder


@dataclass(frozen=True)
class SamplingConfig:
    """How latents are sampled; the defaults are those of the MMAudio and SelVA demos."""

    num_steps: int = 25
    cfg_strength: float = 4.5  # guidance; below 1 the unconditional branch is left out

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}, expected at least 1")


def guided_velocity(
    generator: Generator, conditions: Conditions, empty: Conditions, cfg_strength: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``fn(t, x)``, the guided velocity (B, N, C) in float32 at the scalar time ``t``.

    Both branches run in one batched pass. Below a strength of 1 only the conditional one is evaluated, as in MMAudio.
    """
    if cfg_strength < 1.0:

        def conditional(t: Tensor, x: Tensor) -> Tensor:
            return generator.predict_flow(x, t.expand(x.shape[0]), conditions).float()

        return conditional

    both = conditions.cat(empty)

    def guided(t: Tensor, x: Tensor) -> Tensor:
        v_cond, v_uncond = generator.predict_flow(x.repeat(2, 1, 1), t.expand(2 * x.shape[0]), both).float().chunk(2)
        return flow.guided(v_cond, v_uncond, cfg_strength)

    return guided


def draw_noise(generator: Generator, seeds: Sequence[int]) -> Tensor:
    """Return (len(seeds), N, C) float32 CPU noise; every item depends on its own seed only, not on its batch."""
    shape = (generator.latent_seq_len, generator.config.latent_dim)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample_latents(
    generator: Generator,
    clip_f: Tensor,
    sync_f: Tensor,
    text_f: Tensor,
    seeds: Sequence[int],
    config: SamplingConfig | None = None,
    *,
    negative_text: Tensor | None = None,
    precision: torch.dtype = torch.float32,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Return (B, N, C) float32 latents as the VAE decodes them.

    Args:
        clip_f, sync_f, text_f: (B, T, ·), (B, S, ·), (B, 77, ·) features on the generator's device.
        seeds: one seed per item.
        negative_text: (1 or B, 77, text_dim) text features to guide away from; None is the learned empty text.
        precision: autocast dtype of the network; the state, the time and the guidance are float32.
        on_step: called with the number of steps done.
    """
    config = config or SamplingConfig()
    device = clip_f.device
    noise = draw_noise(generator, seeds).to(device)
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        conditions = generator.preprocess_conditions(clip_f, sync_f, text_f)
        empty = generator.empty_conditions(len(seeds), negative_text)
        velocity = guided_velocity(generator, conditions, empty, config.cfg_strength)
        latents = flow.euler(velocity, noise, config.num_steps, on_step)
    return generator.unnormalize(latents)


@torch.no_grad()
def decode_latents(latents: Tensor, vae: VAE, vocoder: Vocoder) -> Tensor:
    """Return (B, samples) float32 waveforms in [-1, 1] from latents (B, N, C): VAE decoder, then vocoder.

    Both run in the dtype of their own weights.
    """
    mel = vae.decode(latents.mT.to(next(vae.parameters()).dtype))  # (B, n_mels, 2N)
    return vocoder(mel.to(next(vocoder.parameters()).dtype))[:, 0].float()  # (B, samples)
