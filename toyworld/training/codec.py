"""Stages "vae", "decoder" and "vocoder": the autoencoder of log-mel spectrograms, and magnitudes for them.

The magnitude-preserving layers have rows of unit norm. Training keeps them there by projecting after every step, so
the weights are those that ``VAE.state_dict`` holds and :meth:`VAE.load_state_dict` reads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from selva.models.mel import MelSpectrogram
from selva.models.mel_inversion import MelInversion
from selva.models.vae import VAE, Conv
from toyworld.training.loop import Task, torch_rng

KL_WEIGHT = 0.002  # per latent value, beside the mean absolute error per normalised mel value
LOUD_WEIGHT = 6.0  # of the loudest values over the rest
LOUD_DECADES = 2.5  # below the loudest value of a crop, over which that weight falls to none
FLOOR = -4.0  # log10; what is fainter is never loud, even where nothing sounds
NARROWEST = 0.2  # of a band's deviation: keeps bands that never sound from being blown up
BAND_SHIFT = 2.0  # deviations by which neighbouring bands are shifted apart, see band_statistics


def band_statistics(mels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and deviation of the bands that the VAE normalises by, each (1, bands, 1) float32.

    The first layer divides every frame by its magnitude. Bands that are centred would lose their level there: a faint
    and a strong deviation from the mean look alike. Shifting even bands up and odd bands down puts a value of
    known size into every frame, against which levels can be read.

    Args:
        mels: (n, bands, frames) log-mels.
    """
    x = mels.float()
    std = x.std(dim=(0, 2)).clamp(min=NARROWEST)
    shift = BAND_SHIFT * std * torch.tensor([1.0, -1.0]).repeat(len(std) // 2)
    return (x.mean(dim=(0, 2)) - shift)[None, :, None], std[None, :, None]


class VaeTask(Task):
    """Reconstruction of mels from noisy latents of limited information, loud values best.

    Short high tones are few values among many. With all weighted alike, bird and glass came out decades too faint.

    Args:
        train, held_out: (sounds, bands, frames) log-mels.
        frames: length of the random crops that are trained on; shorter sounds are taken whole.
    """

    def __init__(self, vae: VAE, train: Tensor, held_out: Tensor, frames: int = 128) -> None:
        self.network, self.vae = vae, vae
        even = train.shape[2] // 2 * 2  # a latent frame stands for two
        self.train, self.held_out, self.frames = train, held_out[..., :even], min(frames, even)

    def loss(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        mel = self._crops(rng, batch_size)
        mean, std = self.vae.encode(mel)
        noise = torch.randn(mean.shape, generator=torch_rng(rng)).to(mean.device)
        error, l1 = self._errors(mean + std * noise, mel)
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.clamp(min=1e-8).log()).float().mean()
        return error + KL_WEIGHT * kl, {"l1": l1.detach(), "kl": kl.detach()}

    def _crops(self, rng: np.random.Generator, batch_size: int) -> Tensor:
        """Return (B, bands, frames) random stretches of random sounds."""
        chosen = torch.from_numpy(rng.integers(len(self.train), size=batch_size))
        start = int(rng.integers(self.train.shape[2] - self.frames + 1))
        return self.train[chosen, :, start : start + self.frames].float().to(self.vae.data_mean.device)

    def _errors(self, latents: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Return the error of decoding, in deviations of each band: absolute and squared, and absolute alone."""
        error = (self.vae.decode(latents) - mel).float().div(self.vae.data_std)
        weight = loudness_weight(mel)
        l1 = (weight * error.abs()).mean()
        return l1 + 0.5 * (weight * error.square()).mean(), l1

    @torch.no_grad()
    def after_update_(self) -> None:
        project_(self.network)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        mel = self.held_out.float().to(self.vae.data_mean.device)
        mean, std = self.vae.encode(mel)
        rebuilt = self.vae.decode(mean)
        return {
            "val_l1_log10": float((rebuilt - mel).abs().mean()), "val_std": float(std.mean()),
            "val_mean_rms": float(mean.square().mean().sqrt()),
        }


class DecoderTask(VaeTask):
    """Training of the decoder alone, on latents with less noise than in stage "vae"; the encoder stays as it is."""

    def __init__(self, vae: VAE, train: Tensor, held_out: Tensor) -> None:
        super().__init__(vae, train, held_out)
        vae.requires_grad_(False)
        assert vae.decoder is not None
        self.network = vae.decoder.requires_grad_(True)

    def loss(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        mel = self._crops(rng, batch_size)
        mean, std = self.vae.encode(mel)
        noise = torch.randn(mean.shape, generator=torch_rng(rng)).to(mean.device) * float(rng.random())
        error, l1 = self._errors(mean + std * noise, mel)
        return error, {"l1": l1.detach()}


def loudness_weight(mel: Tensor) -> Tensor:
    """Return weights of mean 1 for log-mels (B, bands, frames), larger where a sound is loud."""
    top = mel.amax(dim=(1, 2), keepdim=True)
    loud = ((mel - top) / LOUD_DECADES + 1).clamp(0, 1) * (mel > FLOOR)
    weight = 1 + LOUD_WEIGHT * loud
    return weight / weight.mean()


@torch.no_grad()
def project_(network: nn.Module) -> None:
    """Give every row of every magnitude-preserving convolution unit norm again."""
    for module in network.modules():
        if isinstance(module, Conv):
            module.weight.div_(torch.linalg.vector_norm(module.weight, dim=(1, 2), keepdim=True).clamp(min=1e-8))


def as_published(vae: VAE) -> dict[str, Tensor]:
    """Return a state dict for :meth:`VAE.load_published`, which normalises: rows of unit root mean square."""
    convolutions = {f"{name}.weight" for name, module in vae.named_modules() if isinstance(module, Conv)}
    return {
        name: tensor * tensor[0].numel() ** 0.5 if name in convolutions else tensor
        for name, tensor in vae.state_dict().items()
    }


# ---------------------------------------------------------------------------------------------------------------
# vocoder
# ---------------------------------------------------------------------------------------------------------------


class VocoderTask(Task):
    """Training of the magnitudes that belong to a mel, on a scale on which quiet bins count less than loud ones.

    Args:
        sounds: (n, samples) float32. held_out: likewise.
    """

    def __init__(self, vocoder: MelInversion, mel: MelSpectrogram, sounds: Tensor, held_out: Tensor) -> None:
        self.network, self.vocoder, self.mel = vocoder, vocoder, mel
        self.sounds, self.held_out = sounds, held_out
        self.length = 64 * mel.config.hop_length  # of the random crops

    def loss(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        start = int(rng.integers(self.sounds.shape[1] - self.length + 1))
        chosen = torch.from_numpy(rng.integers(len(self.sounds), size=batch_size))
        sound = self.sounds[chosen, start : start + self.length].to(next(self.vocoder.parameters()).device)
        with torch.autocast(sound.device.type, enabled=False):
            error, plain = self._errors(sound)
        return error, {"plain": plain}

    def _errors(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        """Return the error of the magnitudes, and that of the plain ones without the network."""
        mel, wanted = self.mel(sound), _compressed(self.mel.magnitudes(sound))
        return (
            (_compressed(self.vocoder.magnitudes(mel)) - wanted).abs().mean(),
            (_compressed(self.vocoder.plain_magnitudes(mel)) - wanted).abs().mean(),
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        sound = self.held_out.to(next(self.vocoder.parameters()).device)
        error, plain = self._errors(sound)
        rebuilt = self.vocoder(self.mel(sound))[:, 0]
        distance = (self.mel(rebuilt) - self.mel(sound)).abs().mean()
        return {"val_error": float(error), "val_plain": float(plain), "val_mel_log10": float(distance)}


def _compressed(magnitude: Tensor) -> Tensor:
    return (magnitude + 1e-5).pow(0.3)
