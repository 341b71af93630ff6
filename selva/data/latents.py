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
from selva.utils.errors import UserError
from selva.weights.load import load_vae

# A video's sound may end a little before its picture; silence of up to this length is appended to the waveform.
MAX_AUDIO_SHORTFALL_SEC = 0.25
# Part of the cache's keys. Raise it when the mel filterbank, the VAE encoder or the preparation of sound changes, so
# that latents of an older front end are not taken for right ones (pitfall A1).
FRONT_END = "slaney-1"



def load_waveform(path: Path, sequence: SequenceConfig, normalize: Normalize) -> Tensor:
    """Return the (samples,) float32 sound of the first window of a clip, at the model's rate and exactly its length."""
    (waveform,) = load_windows(path, sequence, (0.0,), normalize)
    return waveform


def load_windows(
    path: Path, sequence: SequenceConfig, starts_sec: Sequence[float], normalize: Normalize
) -> list[Tensor]:
    """Return (samples,) float32 per window of a clip; the level is normalised over the whole file, as MMAudio did.

    Raises:
        ValueError: unreadable, silent, not finite, or more than ``MAX_AUDIO_SHORTFALL_SEC`` too short.
    """
    waveform, rate = read_audio(path)
    starts = [round(start * sequence.sampling_rate) for start in starts_sec]
    end = max(starts) + sequence.num_audio_frames
    seconds, needed = waveform.shape[-1] / rate, end / sequence.sampling_rate
    if seconds < needed - MAX_AUDIO_SHORTFALL_SEC:
        raise UserError(
            f"{path}: {seconds:.2f} s of sound, but the features of this clip cover {needed:.2f} s; "
            f"use the sound that belongs to the video, or extract again with --duration {seconds:.2f}"
        )
    waveform = prepare_audio(waveform, rate, sequence.sampling_rate, end, normalize=normalize, pad=True)
    return [waveform[start : start + sequence.num_audio_frames] for start in starts]


@torch.no_grad()
def encode_latents(waveform: Tensor, mel: MelSpectrogram, vae: VAE) -> tuple[Tensor, Tensor]:
    """Return mean and deviation, each (B, N, C) float32, of the VAE posterior of ``waveform`` (B, samples)."""
    mean, std = vae.encode(mel(waveform))  # each (B, C, N)
    return mean.mT, std.mT


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
