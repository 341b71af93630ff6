import numpy as np
import torch

from selva.models.config import MelInversionConfig, VAEConfig
from selva.models.mel_inversion import MelInversion
from selva.models.vae import VAE, Conv
from selva.models.zoo import build_mel
from toyworld import random_sound
from toyworld.training.codec import VaeTask, VocoderTask, as_published, band_statistics, project_

SMALL = VAEConfig("16k", hidden_dim=4, latent_dim=3)


def test_band_statistics_are_measured_and_marked():
    mels = torch.randn(50, 80, 40) * torch.linspace(0.5, 2, 80)[None, :, None] - 3
    mean, std = band_statistics(mels)
    # 2000 numbers each: the deviation of a deviation is 1.6 % of it, and five of these are exceeded by none of 80.
    torch.testing.assert_close(std[0, :, 0], torch.linspace(0.5, 2, 80), atol=0, rtol=0.08)
    normalized = ((mels - mean) / std).mean(dim=(0, 2))
    torch.testing.assert_close(normalized, torch.tensor([2.0, -2.0]).repeat(40), atol=0.2, rtol=0)


def test_a_band_that_never_sounds_is_not_blown_up():
    assert band_statistics(torch.full((4, 80, 10), -5.0))[1].min() > 0.1


def test_projection_gives_rows_of_unit_norm():
    vae = VAE(SMALL)
    for module in vae.modules():
        if isinstance(module, Conv):
            module.weight.data.mul_(3).add_(0.1)
    project_(vae)
    rows = [m.weight.flatten(1).norm(dim=1) for m in vae.modules() if isinstance(m, Conv)]
    torch.testing.assert_close(torch.cat(rows), torch.ones(sum(map(len, rows))))


@torch.no_grad()
def test_published_weights_give_the_same_network_back():
    vae, again = VAE(SMALL), VAE(SMALL)
    again.load_published(as_published(vae))
    mel = torch.randn(1, 80, 16)
    (mean, std), (mean_again, std_again) = vae.encode(mel), again.encode(mel)
    torch.testing.assert_close(mean_again, mean, atol=0, rtol=5e-3)  # the small constant of the normalisation
    torch.testing.assert_close(again.decode(mean), vae.decode(mean), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(std_again, std, atol=0, rtol=5e-3)


def test_the_autoencoder_learns_a_batch():
    mels = torch.randn(4, 80, 1).expand(4, 80, 32) - 2
    task = VaeTask(VAE(SMALL), mels, mels, frames=16)
    optimizer = torch.optim.Adam(task.vae.parameters(), lr=5e-3)
    losses = []
    for step in range(30):
        loss, _ = task.loss(np.random.default_rng(step), 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.after_update_()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and set(task.validate()) == {"val_l1_log10", "val_std", "val_mean_rms"}


def test_magnitudes_are_learned_beyond_what_the_sums_say():
    sounds = torch.stack([torch.from_numpy(random_sound(np.random.default_rng(i), 1.5)) for i in range(3)])
    task = VocoderTask(MelInversion(MelInversionConfig(hidden_dim=32, num_steps=2)), build_mel("16k"), sounds, sounds)
    optimizer = torch.optim.Adam(task.vocoder.parameters(), lr=3e-3)
    for _ in range(25):
        loss, numbers = task.loss(np.random.default_rng(0), 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.97 * float(numbers["plain"]) and task.validate()["val_mel_log10"] < 2
