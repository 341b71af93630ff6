"""selva.training.objective: the loss, dropped conditions, number formats, validation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_run import CONFIG, make_clips, make_generator, make_run
from torch import Tensor

from selva import flow
from selva.data.dataset import ListDataset, TrainingClip, collate
from selva.data.order import ClipWindow
from selva.data.padding import Padding
from selva.lora.config import LoRAConfig
from selva.lora.state import lora_parameters
from selva.training.condition_cache import ConditionCache
from selva.training.objective import (
    flow_loss,
    sample_noise,
    validate,
)


def test_loss_is_that_of_the_published_recipe():
    """Posterior sample, normalised, straight path, velocity target: recomputed here by hand."""
    model = make_generator(LoRAConfig(rank=2)).eval()
    batch = collate(make_clips(2))
    config = dataclasses.replace(CONFIG, null_prob=0.0)
    draws = sample_noise(batch.mean.shape, config, torch.Generator().manual_seed(3), 0.0)
    with torch.no_grad():
        found = flow_loss(model, batch, draws, config, torch.float32)
        x1 = (batch.mean + batch.std * draws.posterior - model.latent_mean) / model.latent_std
        t = draws.t[:, None, None]
        xt = (1 - t) * draws.noise + t * x1
        v = model(xt, batch.clip_f, batch.sync_f, batch.text_f, draws.t)
        expected = ((v - (x1 - draws.noise)) ** 2).mean((1, 2))
    torch.testing.assert_close(found, expected)


def test_latent_mode_takes_the_posterior_mean():
    """Pitfall A3: the mean only where it was asked for."""
    model = make_generator(LoRAConfig(rank=2)).eval()
    batch = collate(make_clips(2))
    draws = sample_noise(batch.mean.shape, CONFIG, torch.Generator().manual_seed(3), 0.0)
    wide = dataclasses.replace(batch, std=batch.std * 5)
    losses = {}
    with torch.no_grad():
        for latent in ("sample", "mode"):
            config = dataclasses.replace(CONFIG, latent=latent)
            losses[latent] = [flow_loss(model, b, draws, config, torch.float32) for b in (batch, wide)]
    assert torch.equal(*losses["mode"]) and not torch.equal(*losses["sample"])


@pytest.mark.parametrize("what", ["video", "text", "clip"])
def test_dropped_conditions_are_the_learned_empty_ones(what):
    """Pitfall C1: CLIP and sync are dropped together, text by itself; `--clip_features empty` drops CLIP always."""
    model = make_generator(LoRAConfig(rank=2)).eval()
    batch = collate(make_clips(2))
    model.set_sequence(*batch.lengths)
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    base = sample_noise(batch.mean.shape, CONFIG, torch.Generator().manual_seed(3), 0.0)
    draws = dataclasses.replace(
        base, drop_video=yes if what == "video" else no, drop_text=yes if what == "text" else no
    )
    config = dataclasses.replace(CONFIG, clip_features="empty" if what == "clip" else "use")
    clip, sync, text = model.empty_features(2)
    replaced = {"video": {"clip_f": clip, "sync_f": sync}, "text": {"text_f": text}, "clip": {"clip_f": clip}}[what]
    with torch.no_grad():
        dropped = flow_loss(model, batch, draws, config, torch.float32)
        nothing = dataclasses.replace(base, drop_video=no, drop_text=no)
        expected = flow_loss(model, dataclasses.replace(batch, **replaced), nothing, CONFIG, torch.float32)
        full = flow_loss(model, batch, nothing, CONFIG, torch.float32)
    assert torch.equal(dropped, expected) and not torch.allclose(dropped, full)


def test_sound_without_pictures_is_trained_on_the_learned_empty_video():
    model = make_generator(LoRAConfig(rank=2)).eval()
    clips = make_clips(2)
    nan = {"clip_f": torch.full_like(clips[1].clip_f, torch.nan), "sync_f": torch.full_like(clips[1].sync_f, torch.nan)}
    mixed = collate([clips[0], dataclasses.replace(clips[1], has_video=False, **nan)])
    draws = sample_noise(mixed.mean.shape, CONFIG, torch.Generator().manual_seed(3), 0.0)
    with_video = dataclasses.replace(draws, drop_video=torch.tensor([False, False]))
    dropped = dataclasses.replace(draws, drop_video=torch.tensor([False, True]))
    with torch.no_grad():
        found = flow_loss(model, mixed, with_video, CONFIG, torch.float32)
        expected = flow_loss(model, collate(clips), dropped, CONFIG, torch.float32)
    assert torch.equal(found, expected)


def test_condition_dropout_is_independent_and_as_frequent_as_asked():
    draws = sample_noise(torch.Size((20_000, 1, 1)), CONFIG, torch.Generator().manual_seed(0), 0.0)
    assert draws.drop_video.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert draws.drop_text.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (draws.drop_video & draws.drop_text).float().mean().item() == pytest.approx(0.01, abs=0.003)


def test_the_objective_is_float32_around_a_half_precision_network(monkeypatch):
    """Pitfall C4: path, time, target and loss are exact; the network alone is rounded."""
    model = make_generator(LoRAConfig(rank=2), torch.bfloat16).eval()
    batch = collate(make_clips(2))
    draws = sample_noise(batch.mean.shape, CONFIG, torch.Generator().manual_seed(3), 0.0)
    seen = {}

    def predict_nothing(xt, t, _conditions):
        seen.update(xt=xt, t=t)
        return torch.zeros_like(xt, dtype=torch.bfloat16)

    monkeypatch.setattr(model, "predict_flow", predict_nothing)
    found = flow_loss(model, batch, draws, CONFIG, torch.bfloat16)
    x1 = (batch.mean + batch.std * draws.posterior - model.latent_mean) / model.latent_std
    t = draws.t[:, None, None]
    assert found.dtype == seen["xt"].dtype == torch.float32 and torch.equal(seen["t"], draws.t)
    torch.testing.assert_close(seen["xt"], (1 - t) * draws.noise + t * x1)  # with the tolerance of float32
    torch.testing.assert_close(found, (x1 - draws.noise).square().mean((1, 2)))


def test_half_precision_loss_is_close_to_float32():
    batch = collate(make_clips(2))
    draws = sample_noise(batch.mean.shape, CONFIG, torch.Generator().manual_seed(3), 0.0)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_generator(LoRAConfig(rank=2), dtype).eval()
        losses.append(flow_loss(model, batch, draws, CONFIG, dtype).detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)  # eight bits of mantissa
    assert not torch.equal(*losses)


def test_validation_is_repeatable_and_leaves_the_training_alone():
    """Pitfall I1: a fixed grid of noise and times; DESIGN: isolated from the training's random state."""
    run = make_run(val=2)
    state = torch.get_rng_state()
    bins = validate(run.generator, run.val_clips, run.config, torch.float32)
    assert len(bins) == run.config.validation_times == 4 and run.generator.training
    assert bins == validate(run.generator, run.val_clips, run.config, torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    single = [validate(run.generator, run.val_clips.subset([i]), run.config, torch.float32) for i in range(2)]
    assert bins == pytest.approx([(a + b) / 2 for a, b in zip(*single, strict=True)])


def test_validation_is_binned_by_time_and_comparable_between_timestep_modes(monkeypatch):
    """Pitfall I4: a mean over random times falls when hard times become rare, not when the fit is better."""
    run = make_run(val=2)
    modes = [dataclasses.replace(run.config, timestep_mode=mode) for mode in flow.TIMESTEP_MODES]
    first, *others = [validate(run.generator, run.val_clips, config, torch.float32) for config in modes]
    assert all(bins == first for bins in others)
    monkeypatch.setattr("selva.training.objective.flow_loss", lambda generator, batch, draws, *rest: draws.t)
    assert validate(run.generator, run.val_clips, run.config, torch.float32) == [0.125, 0.375, 0.625, 0.875]


# -- padding -----------------------------------------------------------------------------------------------------------


SILENCE = torch.tensor([-1.0, 0.5, 2.0, 0.0])


def padded_clips(frames: int = 10, content: float = 0.0) -> list[TrainingClip]:
    """Return a clip with padding behind ``frames`` of sound, in which ``content`` lies, and one that is full."""
    clip, full = make_clips(2)
    mask = torch.arange(len(clip.mean)) >= frames
    mean, std = (torch.where(mask[:, None], x + content, x) for x in (clip.mean, clip.std))
    return [dataclasses.replace(clip, mean=mean, std=std, padding=Padding(mask, SILENCE)), full]


def losses_and_gradient(padded_loss: str, content: float, latent: str, cached: bool) -> tuple[Tensor, list[Tensor]]:
    model, clips = make_generator(LoRAConfig(rank=2)).eval(), padded_clips(content=content)
    with torch.no_grad():  # else that of A is zero
        for parameter in (factors := lora_parameters(model)):
            parameter.add_(0.1)
    config = dataclasses.replace(CONFIG, padded_loss=padded_loss, latent=latent)
    batch = collate(clips)
    if cached:
        batch = ConditionCache(model, ListDataset(clips), torch.float32).load([ClipWindow(0, 0), ClipWindow(1, 0)])
    draws = sample_noise(batch.mean.shape, config, torch.Generator().manual_seed(3), 0.0)
    losses = flow_loss(model, batch, draws, config, torch.float32)
    return losses.detach(), list(torch.autograd.grad(losses.mean(), factors))


@pytest.mark.parametrize("latent", ["sample", "mode"])
@pytest.mark.parametrize("cached", [False, True])
def test_what_lies_in_the_padding_cannot_change_the_gradient(latent, cached):
    """Not through the target, and not through the attention of the sound to it."""
    one, of_one = losses_and_gradient("masked", 0.0, latent, cached)
    for content in (100.0, torch.nan):
        two, of_two = losses_and_gradient("masked", content, latent, cached)
        assert torch.equal(one, two) and all(torch.equal(a, b) for a, b in zip(of_one, of_two, strict=True))
    assert all(gradient.any() for gradient in of_one)
    full, of_full = (losses_and_gradient("full", content, latent, cached) for content in (0.0, 100.0))
    assert full[0][1] == of_full[0][1] and full[0][0] != of_full[0][0]
    assert not all(torch.equal(a, b) for a, b in zip(full[1], of_full[1], strict=True))


def test_the_loss_of_a_padded_clip_is_the_mean_over_its_sound(monkeypatch):
    """The network is given silence in the padding, with noise; a clip without padding has the loss it always had."""
    model, clips = make_generator(LoRAConfig(rank=2)).eval(), padded_clips()
    batch = collate(clips)
    draws = sample_noise(batch.mean.shape, CONFIG, torch.Generator().manual_seed(3), 0.0)
    seen = []

    def predict_nothing(xt, _t, _conditions):
        seen.append(xt)
        return torch.zeros_like(xt)

    monkeypatch.setattr(model, "predict_flow", predict_nothing)
    found = flow_loss(model, batch, draws, CONFIG, torch.float32)
    x1 = (batch.mean + batch.std * draws.posterior - model.latent_mean) / model.latent_std
    silence = ((SILENCE - model.latent_mean) / model.latent_std).view(1, 4)
    t = draws.t[0]
    torch.testing.assert_close(seen[0][0, 10:], (1 - t) * draws.noise[0, 10:] + t * silence.expand(len(x1[0]) - 10, 4))
    torch.testing.assert_close(found[0], (x1 - draws.noise)[0, :10].square().mean())
    torch.testing.assert_close(found[1], (x1 - draws.noise)[1].square().mean())


def test_validation_leaves_out_the_padding_too():
    run = make_run()
    losses = {
        (mode, content): validate(run.generator, ListDataset(padded_clips(content=content)),
                                  dataclasses.replace(run.config, padded_loss=mode), torch.float32)
        for mode in ("masked", "full") for content in (0.0, 3.0)
    }
    assert losses["masked", 0.0] == losses["masked", 3.0]
    assert len({tuple(bins) for bins in losses.values()}) == 3
