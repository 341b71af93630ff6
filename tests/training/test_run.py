"""The training loop on a small generator: objective, precision, resuming, validation."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from small_run import CONFIG, make_clips, make_generator, make_run

from selva import flow
from selva.checkpoint import load_checkpoint, save_checkpoint
from selva.data.dataset import BucketBatchSampler, ClipWindow, ListDataset, collate, split_validation
from selva.lora.config import LoRAConfig
from selva.lora.state import lora_state_dict
from selva.training.config import TrainConfig
from selva.training.loop import fit
from selva.training.objective import VALIDATION_TIMES, flow_loss, sample_noise, validate
from selva.training.run import TrainingRun
from selva.training.schedule import learning_rate
from selva.utils.metrics_log import MetricsFile

# -- objective ----------------------------------------------------------------------------------------------------


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


# -- precision ----------------------------------------------------------------------------------------------------


def test_adapter_and_optimiser_stay_float32_over_a_half_precision_base():
    """Pitfalls D1 and D2: bfloat16 adapters lose small updates, a bfloat16 second moment cannot decay."""
    run = make_run(dtype=torch.bfloat16)
    generator = run.generator
    assert generator.fused_blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert generator.latent_mean.dtype == generator.empty_clip_feat.dtype == torch.float32
    before = lora_state_dict(generator)
    loss, norm = run.train_step()
    assert loss.dtype == norm.dtype == torch.float32 and torch.isfinite(loss)
    assert all(p.dtype == torch.float32 for p in run.parameters)
    moments = [v for state in run.optimizer.state.values() for v in state.values() if v.ndim]
    assert moments and all(v.dtype == torch.float32 for v in moments)
    assert any(not torch.equal(before[k], v) for k, v in lora_state_dict(generator).items())


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


def test_a_first_float16_step_keeps_a_and_moves_b():
    """Pitfall D3: B is zero at first, so the gradient of A is zero, and Adam in float16 would divide it by zero."""
    run = make_run(dataclasses.replace(CONFIG, weight_decay=0.0), dtype=torch.float16)
    before = lora_state_dict(run.generator)
    run.train_step()
    after = lora_state_dict(run.generator)
    assert all(torch.equal(after[key], before[key]) for key in after if key.endswith("lora_A"))
    assert all(torch.isfinite(after[key]).all() and after[key].any() for key in after if key.endswith("lora_B"))
    _, norm = run.train_step()
    assert torch.isfinite(norm) and all(p.isfinite().all() for p in run.parameters)


def test_float16_gradients_do_not_vanish(monkeypatch):
    """Pitfall D3: without loss scaling, gradients below 6e-8 are zero in float16."""
    norms = []
    for factor in (1.0, 1e-6):
        monkeypatch.setattr(
            "selva.training.run.flow_loss", lambda *args, factor=factor: factor * flow_loss(*args)
        )
        norms.append(make_run(dtype=torch.float16).train_step()[1].item() / factor)
    assert norms[0] > 1e-3 and norms[1] == pytest.approx(norms[0], rel=0.02)


def test_half_precision_loss_is_close_to_float32():
    batch = collate(make_clips(2))
    draws = sample_noise(batch.mean.shape, CONFIG, torch.Generator().manual_seed(3), 0.0)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_generator(LoRAConfig(rank=2), dtype).eval()
        losses.append(flow_loss(model, batch, draws, CONFIG, dtype).detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)  # eight bits of mantissa
    assert not torch.equal(*losses)


def test_the_base_is_bit_identical_after_training():
    run = make_run()
    base = {k: v.clone() for k, v in run.generator.state_dict().items() if "lora_" not in k}
    for _ in range(3):
        run.train_step()
    assert all(torch.equal(v, run.generator.state_dict()[k]) for k, v in base.items())


# -- bookkeeping --------------------------------------------------------------------------------------------------


def test_warm_up_starts_above_zero_and_ends_at_the_rate():
    """Pitfall F1."""
    config = dataclasses.replace(CONFIG, lr=1.0, warmup_steps=4)
    assert [learning_rate(k, config) for k in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


SCHEDULES = {
    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "cosine": [0.5, 1.0, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381],
    "cosine_restarts": [0.5, 1.0, 0.8536, 0.5, 0.1464, 1.0, 0.8536, 0.5, 0.1464],
    "multistep": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    config = TrainConfig(lr=1.0, warmup_steps=1, steps=9, lr_schedule=schedule, lr_cycles=2)
    assert [learning_rate(k, config) for k in range(9)] == pytest.approx(SCHEDULES[schedule], abs=1e-4)


def test_multistep_is_that_of_the_base_model():
    """MMAudio: 300 000 updates, 1000 of warm-up, a tenth at 240 000 and again at 270 000 counted after it."""
    config = TrainConfig(lr=1.0, warmup_steps=1000, steps=300_000, lr_schedule="multistep")
    found = [learning_rate(k, config) for k in (0, 999, 1000, 240_999, 241_000, 270_999, 271_000)]
    assert found == pytest.approx([1 / 1001, 1000 / 1001, 1.0, 1.0, 0.1, 0.1, 0.01])


def test_weight_decay_shrinks_the_factors_by_the_rate_times_its_value():
    """Pitfall F10: one decay, of A and B alike. At the first step B is zero, so nothing else moves A."""
    run = make_run(dataclasses.replace(CONFIG, lr=0.1, warmup_steps=0, weight_decay=0.5))
    before = lora_state_dict(run.generator)
    run.train_step()
    for key, value in lora_state_dict(run.generator).items():
        if key.endswith("lora_A"):
            torch.testing.assert_close(value, (1 - 0.1 * 0.5) * before[key])
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.5, 0.5]


def test_gradients_are_clipped_before_the_update(monkeypatch):
    run = make_run(dataclasses.replace(CONFIG, grad_clip=1e-3))
    norms = []
    step = run.optimizer.step
    monkeypatch.setattr(
        run.optimizer, "step",
        lambda: (norms.append(torch.stack([p.grad.norm() for p in run.parameters]).norm().item()), step()),
    )
    _, before = run.train_step()
    assert before > 1e-3 and norms[0] == pytest.approx(1e-3, rel=1e-3)


def test_accumulated_batches_make_one_step_with_their_mean_gradient(monkeypatch):
    """Pitfall F2: two accumulated batches of two are one step on a batch of four."""
    clips = make_clips(4)
    draws = sample_noise(torch.Size((4, *clips[0].mean.shape)), CONFIG, torch.Generator().manual_seed(3), 0.0)
    norms = []
    for accum in (1, 2):
        size = 4 // accum
        parts = [slice(i * size, (i + 1) * size) for i in range(accum)]
        drawn = iter([draws.part(part) for part in parts])
        monkeypatch.setattr("selva.training.run.sample_noise", lambda *args, drawn=drawn, **kwargs: next(drawn))
        config = dataclasses.replace(CONFIG, batch_size=size, grad_accum=accum)
        every = ListDataset(clips)
        run = TrainingRun(make_generator(LoRAConfig(rank=2)), every, every.subset([]), config, torch.float32)
        visits = iter([[ClipWindow(i, 0) for i in range(4)[part]] for part in parts])
        monkeypatch.setattr(run.batches, "draw", lambda visits=visits: next(visits))
        loss, norm = run.train_step()
        assert run.step == 1
        norms.append((loss, norm))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-7)


def test_epochs_visit_every_clip_once_in_batches_of_one_length():
    """Pitfall F9: shuffled epochs, not draws with replacement."""
    clips = make_clips(4) + make_clips(4, 1.5)
    batches = BucketBatchSampler(clips, 2, seed=3)
    seen = []
    for _ in range(4):
        batch = next(batches)
        assert len({i.rsplit("_", 1)[1] for i in batch.ids}) == 1
        seen += batch.ids
    assert sorted(seen) == sorted(c.id for c in clips)


def test_batch_order_continues_from_its_state():
    clips = make_clips(5) + make_clips(3, 1.5)
    batches, other = BucketBatchSampler(clips, 2, seed=3), BucketBatchSampler(clips, 2, seed=9)
    for _ in range(5):
        next(batches)
    other.load_state_dict(batches.state_dict())
    assert [next(batches).ids for _ in range(9)] == [next(other).ids for _ in range(9)]


def spoil_latents(run: TrainingRun) -> None:
    load = run.projected.load

    def spoilt(visits):
        batch = load(visits)
        return dataclasses.replace(batch, mean=torch.full_like(batch.mean, float("nan")))

    run.projected.load = spoilt


def test_a_bad_gradient_changes_nothing():
    run = make_run()
    run.train_step()
    before, moments = lora_state_dict(run.generator), copy.deepcopy(run.optimizer.state_dict()["state"])
    spoil_latents(run)
    _, norm = run.train_step()
    assert not torch.isfinite(norm) and run.step == 2
    assert all(torch.equal(v, before[k]) for k, v in lora_state_dict(run.generator).items())
    for number, state in run.optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, moments[number][k]) for k, v in state.items())


def test_training_stops_when_no_gradient_is_finite(tmp_path, monkeypatch):
    monkeypatch.setattr("selva.training.loop.MAX_BAD_STEPS", 4)
    run = make_run(dataclasses.replace(CONFIG, steps=50), val=0)
    spoil_latents(run)
    with pytest.raises(ValueError, match="last checkpoint is intact"):
        fit(run, MetricsFile(tmp_path / "m.jsonl"), on_checkpoint=lambda r: None, on_best=lambda r: None)


# -- resuming -----------------------------------------------------------------------------------------------------


SCHEDULE_OF_STOP = {1: "cosine", 2: "constant", 3: "cosine_restarts", 5: "multistep"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop_at", SCHEDULE_OF_STOP)
def test_resumed_steps_equal_uninterrupted_ones_bit_for_bit(tmp_path, stop_at, dtype):
    """DESIGN: k steps, a resume and N - k steps give the bits of N steps, for every schedule, with accumulation,
    dropout, average and validation on. Pitfalls F3: also at steps that the accumulation does not divide; F5: noise,
    times and clips go on and do not start again; F6: the curriculum switches (here after step 3) where it would have.
    """
    config = dataclasses.replace(CONFIG, grad_accum=2, ema_decay=0.9, lr_schedule=SCHEDULE_OF_STOP[stop_at],
                                 timestep_mode="curriculum", curriculum_switch=0.5)

    def train(run, until=None):
        fit(run, MetricsFile(tmp_path / "metrics.jsonl"), on_checkpoint=lambda r: None, on_best=lambda r: None,
            should_stop=lambda: run.step == until)
        return run

    whole = train(make_run(config, dtype=dtype))
    first = train(make_run(config, dtype=dtype), until=stop_at)
    path = tmp_path / "adapter_step00001.pt"
    save_checkpoint(path, first.generator, {"variant": "small"}, step=first.step,
                    optimizer=first.optimizer.state_dict(), extra=first.extra_state())
    torch.manual_seed(123)
    second = make_run(config, dtype=dtype)
    torch.rand(5)
    second.restore(load_checkpoint(path))
    train(second)
    assert second.step == whole.step == config.steps
    for key, value in lora_state_dict(whole.generator).items():
        assert torch.equal(value, lora_state_dict(second.generator)[key]), key
        assert torch.equal(whole.ema.average[key], second.ema.average[key]), key
    assert second.best_val_loss == whole.best_val_loss and second.best_step == whole.best_step


def test_a_new_rate_takes_effect_when_resuming(tmp_path):
    """Pitfall F4."""
    run = make_run()
    run.train_step()
    path = tmp_path / "adapter_step00001.pt"
    save_checkpoint(path, run.generator, {}, step=1, optimizer=run.optimizer.state_dict(), extra=run.extra_state())
    changed = make_run(dataclasses.replace(CONFIG, lr=0.5, warmup_steps=0, weight_decay=0.25, lora_plus_ratio=4.0))
    changed.restore(load_checkpoint(path))
    changed.train_step()
    groups = changed.optimizer.param_groups
    assert [g["lr"] for g in groups] == [0.5, 2.0] and [g["weight_decay"] for g in groups] == [0.25, 0.25]


# -- validation ---------------------------------------------------------------------------------------------------


def test_validation_is_repeatable_and_leaves_the_training_alone():
    """Pitfall I1: a fixed grid of noise and times; DESIGN: isolated from the training's random state."""
    run = make_run(val=2)
    state = torch.get_rng_state()
    bins = validate(run.generator, run.val_clips, run.config, torch.float32)
    assert len(bins) == VALIDATION_TIMES and run.generator.training
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


def test_training_lowers_the_loss_of_what_it_sees(tmp_path):
    """One clip can be learned by heart."""
    clips = make_clips(1)
    config = dataclasses.replace(CONFIG, steps=120, lr=2e-2, latent="mode", null_prob=0.0, log_every=50)
    clips = ListDataset(clips)
    generator = make_generator(LoRAConfig(rank=8, targets=("attn.qkv", "linear1", "ffn.w2")))
    run = TrainingRun(generator, clips, clips.subset([]), config, torch.float32)
    before = sum(validate(run.generator, clips, config, torch.float32))
    fit(run, MetricsFile(tmp_path / "m.jsonl"), on_checkpoint=lambda r: None, on_best=lambda r: None)
    assert sum(validate(run.generator, clips, config, torch.float32)) < 0.7 * before


def test_the_best_step_is_reported_when_it_happens(tmp_path):
    run, best = make_run(), []
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    fit(run, metrics, on_checkpoint=lambda r: None, on_best=lambda r: best.append(r.step))
    steps, losses = metrics.series("val_loss")
    assert steps == [0, 3, 6]
    lowest = float("inf")
    expected = []
    for step, loss in zip(steps, losses, strict=True):
        if loss < lowest:
            lowest = loss
            expected += [step] if step else []
    assert best == expected and run.best_val_loss == lowest


def fake_validations(monkeypatch, losses):
    values = iter(losses)
    monkeypatch.setattr("selva.training.run.validate", lambda *args: [next(values)])


def test_a_model_that_cannot_see_the_held_out_clips_is_not_trained(monkeypatch):
    fake_validations(monkeypatch, [float("nan")])
    run = make_run()
    with pytest.raises(ValueError, match="not finite before the first step"):
        fit(run, MetricsFile(), on_checkpoint=lambda r: None, on_best=lambda r: None)
    assert run.step == 0


def test_patience_ends_the_run_and_saves(tmp_path, monkeypatch, caplog):
    fake_validations(monkeypatch, [3.0, 2.0, 2.5, 2.4, 2.3])
    run, saved = make_run(dataclasses.replace(CONFIG, steps=50, val_every=2, patience=2, save_every=100)), []
    caplog.set_level("INFO", "selva")
    assert fit(run, MetricsFile(), on_checkpoint=lambda r: saved.append(r.step), on_best=lambda r: None)
    assert run.step == 6 and saved == [6] and run.best_step == 2 and "no better validation loss" in caplog.text


@pytest.mark.parametrize("learns", [True, False])
def test_overfitting_is_said_with_the_step_to_go_back_to(monkeypatch, caplog, learns):
    """Held-out clips get worse: overfitting only if the training loss falls meanwhile."""
    fake_validations(monkeypatch, [3.0, 2.0, 2.1, 2.2, 2.3, 2.4])
    run = make_run(dataclasses.replace(CONFIG, steps=10, val_every=2))
    losses = iter(range(10, 0, -1) if learns else range(1, 11))

    def step():
        run.step += 1
        return torch.tensor(float(next(losses))), torch.tensor(1.0)

    monkeypatch.setattr(run, "train_step", step)
    fit(run, MetricsFile(), on_checkpoint=lambda r: None, on_best=lambda r: None)
    assert ("overfitting" in caplog.text and "go back to step 2" in caplog.text) is learns


def test_the_average_follows_its_formula_and_leaves_the_training_alone():
    config = dataclasses.replace(CONFIG, ema_decay=0.5)
    plain = make_run()
    for _ in range(3):
        plain.train_step()
    run = make_run(config)
    expected = lora_state_dict(run.generator)
    for step in range(1, 4):
        run.train_step()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {k: decay * expected[k] + (1 - decay) * v for k, v in lora_state_dict(run.generator).items()}
    for key, value in run.ema.average.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)
    before = lora_state_dict(run.generator)
    with run.evaluated():
        inside = lora_state_dict(run.generator)
    after = lora_state_dict(run.generator)
    assert all(torch.equal(before[k], after[k]) and torch.equal(inside[k], run.ema.average[k]) for k in before)
    assert all(torch.equal(v, before[k]) for k, v in lora_state_dict(plain.generator).items())


def test_rows_and_checkpoints_come_at_their_steps(tmp_path):
    run, saved = make_run(dataclasses.replace(CONFIG, steps=7)), []
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert fit(run, metrics, on_checkpoint=lambda r: saved.append(r.step), on_best=lambda r: None)
    assert saved == [3, 6, 7] and metrics.series("loss")[0] == list(range(1, 8))
    assert MetricsFile(metrics.path).rows == metrics.rows


def test_stopping_saves_first(tmp_path):
    """Pitfall F8: whatever was done since the last checkpoint."""
    run, saved = make_run(dataclasses.replace(CONFIG, steps=50)), []
    finished = fit(run, MetricsFile(tmp_path / "m.jsonl"), on_checkpoint=lambda r: saved.append(r.step),
                   on_best=lambda r: None, should_stop=lambda: run.step >= 4)
    assert not finished and saved == [3, 4] and run.step == 4


@pytest.mark.parametrize(
    "count, fraction, expected", [(4, 0.1, 0), (5, 0.1, 1), (30, 0.1, 3), (10, 0.0, 0), (6, 0.99, 5)]
)
def test_how_many_clips_are_held_out(count, fraction, expected):
    clips = ListDataset(make_clips(count))
    train, val = split_validation(clips, fraction, seed=1)
    assert len(val) == expected and sorted(train.ids + val.ids) == sorted(clips.ids)
    assert split_validation(clips, fraction, seed=1)[1].ids == val.ids


def test_bad_settings_are_reported_together():
    with pytest.raises(ValueError, match=r"steps is 0.*lr is -1.*null_prob is 2.*timestep_mode is 'x'"):
        TrainConfig(steps=0, lr=-1, null_prob=2, timestep_mode="x")
    assert set(flow.TIMESTEP_MODES) == {"logit_normal", "uniform", "curriculum"}
