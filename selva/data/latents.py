"""Latents of the sound of a clip: reading the file, its windows, the mel front end, the VAE encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from selva.audio.config import Normalize
from selva.media import prepare_audio, read_audio
from selva.models.mel import MelSpectrogram
from selva.models.vae import VAE
from selva.models.variants import Variant
from selva.models.zoo import build_mel
from selva.sequence import SequenceConfig
from selva.weights.load import load_vae

# Part of the cache's keys. Raise it when the mel filterbank, the VAE encoder or the preparation of sound changes, so
# that latents of an older front end are not taken for right ones (pitfall A1).
FRONT_END = "slaney-1"
SILENCE_SEC = 2.0  # of zeros that are encoded for the latent of silence: far enough from both ends


def load_waveform(path: Path, sequence: SequenceConfig, normalize: Normalize) -> Tensor:
    """Return the (samples,) float32 sound of the first window of a clip, at the model's rate and exactly its length."""
    (waveform,) = load_windows(path, sequence, (0.0,), normalize)
    return waveform


def load_windows(
    path: Path, sequence: SequenceConfig, starts_sec: Sequence[float], normalize: Normalize
) -> list[Tensor]:
    """Return (samples,) float32 per window of a clip; the level is normalised over the whole file, as MMAudio did.

    Sound that ends before a window is followed by zeros, see :mod:`selva.data.padding`.

    Raises:
        ValueError: unreadable, silent or not finite.
    """
    waveform, rate = read_audio(path)
    starts = [round(start * sequence.sampling_rate) for start in starts_sec]
    end = max(starts) + sequence.num_audio_frames
    waveform = prepare_audio(waveform, rate, sequence.sampling_rate, end, normalize=normalize, pad=True)
    return [waveform[start : start + sequence.num_audio_frames] for start in starts]


@torch.no_grad()
def encode_latents(waveform: Tensor, mel: MelSpectrogram, vae: VAE) -> tuple[Tensor, Tensor]:
    """Return mean and deviation, each (B, N, C) float32, of the VAE posterior of ``waveform`` (B, samples)."""
    mean, std = vae.encode(mel(waveform))  # each (B, C, N)
    return mean.mT, std.mT


def silence_latent(sequence: SequenceConfig, mel: MelSpectrogram, vae: VAE) -> Tensor:
    """Return (C,) float32 on the CPU: the latent of digital silence, from the middle of some seconds of it."""
    samples = round(SILENCE_SEC * sequence.sampling_rate)
    mean, _ = encode_latents(torch.zeros(1, samples, device=next(vae.parameters()).device), mel, vae)  # (1, N, C)
    return mean[0, mean.shape[1] // 2].float().cpu()


class SoundEncoder:
    """Sound of a clip -> latents, in float32 always (pitfall G2); loaded on first use."""

    def __init__(self, variant: Variant, selva_dir: Path | None, device: torch.device) -> None:
        self.variant, self.selva_dir, self.device = variant, selva_dir, device
        self._networks: tuple[MelSpectrogram, VAE] | None = None

    def encode(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation, each (1, N, C) on the CPU, of (samples,)."""
        if self._networks is None:
            vae = load_vae(self.variant.name, self.selva_dir, self.device).drop_decoder()
            self._networks = build_mel(self.variant.mode).to(self.device), vae
        mean, std = encode_latents(waveform[None].to(self.device), *self._networks)
        return mean.float().cpu(), std.float().cpu()
