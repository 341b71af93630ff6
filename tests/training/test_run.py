"""selva.training.run: precision, updates, accumulation, the average, and resumed runs."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from small_run import CONFIG, make_clips, make_generator, make_run, spoil_latents

from selva.checkpoint import check_same_settings, load_adapter, load_checkpoint, save_adapter, save_checkpoint
from selva.data.dataset import ConcatDataset, ListDataset, NamedDataset
from selva.data.order import ClipWindow
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora, principal_factors, remove_lora
from selva.lora.state import load_lora_state_, lora_state_dict, named_factors
from selva.training.loop import fit
from selva.training.objective import flow_loss, sample_noise
from selva.training.run import TrainingRun
from selva.training.ways import WAYS, WAYS_BEFORE
from selva.utils.distributed import World
from selva.utils.metrics_log import MetricsFile


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


def test_the_base_is_bit_identical_after_training():
    run = make_run()
    base = {k: v.clone() for k, v in run.generator.state_dict().items() if "lora_" not in k}
    for _ in range(3):
        run.train_step()
    assert all(torch.equal(v, run.generator.state_dict()[k]) for k, v in base.items())


def test_weight_decay_shrinks_the_factors_by_the_rate_times_its_value():
    """Pitfall F10: one decay, of A and B alike. At the first step B is zero, so nothing else moves A."""
    run = make_run(dataclasses.replace(CONFIG, lr=0.1, warmup_steps=0, weight_decay=0.5))
    before = lora_state_dict(run.generator)
    run.train_step()
    for key, value in lora_state_dict(run.generator).items():
        if key.endswith("lora_A"):
            torch.testing.assert_close(value, (1 - 0.1 * 0.5) * before[key])
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("fused", [True, False])
def test_the_decay_of_pissa_acts_on_what_was_learned(monkeypatch, fused):
    """Principal directions of W that are pulled to zero are taken out of the model, although nothing was learned."""
    if not fused:
        monkeypatch.setattr("selva.training.run.FUSED_DEVICES", ())
    config = dataclasses.replace(CONFIG, lr=0.1, warmup_steps=0, weight_decay=0.5, lora_plus_ratio=2.0)
    clips = ListDataset(make_clips(4))
    run = TrainingRun(make_generator(LoRAConfig(rank=2, init="pissa")), clips, clips.subset([]), config, torch.float32)
    with torch.no_grad():
        for key, value in named_factors(run.generator).items():
            if key.endswith(("lora_A", "lora_B")):
                value.add_(1.0)
    monkeypatch.setattr("selva.training.run.flow_loss", lambda *args: 0 * flow_loss(*args))
    run.train_step()
    after = lora_state_dict(run.generator)
    for key, value in after.items():
        if key.endswith(("lora_A", "lora_B")):
            left = 1 - (0.1 if key.endswith("A") else 0.2) * 0.5
            torch.testing.assert_close(value - after[f"{key}0"], torch.full_like(value, left), rtol=1e-4, atol=1e-5)
    spoil_latents(run)
    run.train_step()
    assert all(torch.equal(value, after[key]) for key, value in lora_state_dict(run.generator).items())


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
        windows = iter([[ClipWindow(i, 0) for i in range(4)[part]] for part in parts])
        monkeypatch.setattr(run.batches, "draw", lambda windows=windows: next(windows))
        loss, norm = run.train_step()
        assert run.step == 1
        norms.append((loss, norm))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "as on MPS"])
def test_a_bad_gradient_changes_nothing(fused, monkeypatch):
    """On devices whose fused update ignores the flag (pytorch 186360), the host decides."""
    if not fused:
        monkeypatch.setattr("selva.training.run.FUSED_DEVICES", ())
    run = make_run()
    assert all(bool(group["fused"]) == fused for group in run.optimizer.param_groups)
    run.train_step()
    before, moments = lora_state_dict(run.generator), copy.deepcopy(run.optimizer.state_dict()["state"])
    spoil_latents(run)
    _, norm = run.train_step()
    assert not torch.isfinite(norm) and run.step == 2
    assert all(torch.equal(v, before[k]) for k, v in lora_state_dict(run.generator).items())
    for number, state in run.optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, moments[number][k]) for k, v in state.items())


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


def test_power_averages_resume_bit_for_bit(tmp_path):
    config = dataclasses.replace(CONFIG, ema="power", ema_sigma_rel=(0.05, 0.2))
    whole, first, second = make_run(config), make_run(config), make_run(config)
    for _ in range(6):
        whole.train_step()
    for _ in range(4):
        first.train_step()
    path = tmp_path / "adapter_step00004.pt"
    save_checkpoint(path, first.generator, {"variant": "small"}, step=4, optimizer=first.optimizer.state_dict(),
                    extra=first.extra_state())
    second.restore(load_checkpoint(path))
    for _ in range(2):
        second.train_step()
    assert second.ema.step == whole.ema.step == 6
    for one, two in zip(whole.ema.tracks, second.ema.tracks, strict=True):
        assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert not all(torch.equal(value, whole.ema.tracks[1][key]) for key, value in whole.ema.tracks[0].items())
    with pytest.raises(ValueError, match=r"adapter_step00004.pt: the stored averages are of the widths \[0.05, 0.2\]"):
        make_run(dataclasses.replace(config, ema_sigma_rel=(0.05, 0.1))).restore(load_checkpoint(path))


@pytest.mark.parametrize("before, now, told", [
    ({"ema": "power"}, {"ema_decay": 0.5}, ["holds a power average", "the average starts here, at step 2"]),
    ({"ema_decay": 0.5}, {"ema": "power"}, ["holds an exponential average", "the average starts here, at step 2"]),
    ({}, {"ema": "power"}, ["the average starts here, at step 2"]),
    ({"ema": "power"}, {}, ["holds a power average"]),
])
def test_an_average_of_another_kind_begins_at_the_adapter(tmp_path, caplog, before, now, told):
    first, second = (make_run(dataclasses.replace(CONFIG, **settings)) for settings in (before, now))
    for _ in range(2):
        first.train_step()
    path = tmp_path / "adapter_step00002.pt"
    save_checkpoint(path, first.generator, {"variant": "small"}, step=2, optimizer=first.optimizer.state_dict(),
                    extra=first.extra_state())
    second.restore(load_checkpoint(path))
    assert [record.message.split(": ", 1)[1][:len(text)] for record, text in
            zip(caplog.records, told, strict=True)] == told
    if second.ema is not None:
        trained = lora_state_dict(second.generator)
        assert all(torch.equal(value, trained[key]) for key, value in second.ema.average.items())


def test_the_epsilon_of_the_optimiser():
    assert {group["eps"] for group in make_run().optimizer.param_groups} == {1e-8}
    run = make_run(dataclasses.replace(CONFIG, adam_eps=1e-6))
    assert {group["eps"] for group in run.optimizer.param_groups} == {1e-6}


def saved_run(run: TrainingRun, path, **extra):
    """Return what a step file of the run says, some of it changed."""
    save_checkpoint(path, run.generator, {}, step=run.step, optimizer=run.optimizer.state_dict(),
                    extra={**run.extra_state(), **extra})
    return load_checkpoint(path)


def masks(run: TrainingRun) -> list[torch.Tensor]:
    """Return what dropout lets through in the next step."""
    seen = []
    layer = run.generator.fused_blocks[0].attn.qkv
    original = layer.lora_input
    layer.lora_input = lambda x: seen.append(original(x)) or seen[-1]
    run.generator.train()
    run.train_step()
    layer.lora_input = original
    return [x == 0 for x in seen]


class OneOfSeveral(World):
    """A process of any rank that computes the whole batch, so that nothing but its masks is its own."""

    def own_slice(self, per_process):
        return slice(0, per_process)


def test_dropout_depends_on_seed_process_and_step_alone():
    def first(rank=0, seed=42, steps=0):
        run = make_run(dataclasses.replace(CONFIG, seed=seed, grad_accum=2))
        run.world, run.step = OneOfSeveral(rank=rank), steps
        torch.manual_seed(torch.seed())  # whatever happened before
        found = masks(run)
        assert len(found) == 2 and found[0].any() and not torch.equal(*found)
        return found[0]

    def same(one, two):
        return one.shape == two.shape and torch.equal(one, two)

    assert same(first(), first())
    assert not any(same(first(), first(**other)) for other in ({"rank": 1}, {"seed": 43}, {"steps": 1}))


def test_a_step_file_without_a_word_about_dropout_goes_on_as_version_0_1_0(tmp_path):
    """There, masks followed from one random state, whose position is in the file; and so does all that comes after."""
    run = make_run()
    run.train_step()
    old = saved_run(run, tmp_path / "adapter_step00001.pt")
    for key in ("ways", "content"):
        old.extra.pop(key)
    found = []
    for _ in range(2):
        resumed = make_run()
        torch.rand(7)
        resumed.restore(old)
        first = masks(resumed)
        again = make_run()
        again.restore(saved_run(resumed, tmp_path / "adapter_step00002.pt"))
        assert again.ways == resumed.ways == WAYS_BEFORE
        found.append([*first, *masks(again)])
    torch.set_rng_state(old.extra["dropout_rng"])
    plain = make_run()
    state = plain.extra_state()
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True)) and state["ways"] == WAYS


class Named(ListDataset):
    """Clips with hashes of their content."""

    def __init__(self, clips, **changed):
        super().__init__(clips)
        self.changed = changed

    def content(self, index):
        return {key: self.changed.get(key, "x") for key in ("features", "sound", "latents", "prompt", "windows")}


def run_on(clips, held_out=()) -> TrainingRun:
    held_out = held_out if isinstance(held_out, ListDataset) else ListDataset(held_out)
    return TrainingRun(make_generator(), clips, held_out, CONFIG, torch.float32)


def test_changed_clips_are_named_and_refused(tmp_path):
    clips = make_clips(4)
    run = run_on(Named(clips))
    saved = saved_run(run, tmp_path / "adapter_step00000.pt")
    run_on(Named(clips)).restore(saved)
    for changed, message in (
        (Named(clips, prompt="y"), "another prompt: clip0_1.0, clip1_1.0, clip2_1.0, clip3_1.0. Put"),
        (Named(clips, sound="y", latents="y"), "another sound: clip0"),
        (Named(clips[:3]), "gone: clip3_1.0"),
        (Named(make_clips(5)), "new: clip4_1.0"),
    ):
        with pytest.raises(ValueError, match=f"adapter_step00000.pt: .*{message}.*--init_from") as caught:
            run_on(changed).restore(saved)
        assert "\n" not in str(caught.value)


def test_other_held_out_clips_are_refused_where_there_were_some(tmp_path):
    """The best step would be that of a comparison between different clips."""
    clips, others = make_clips(4), make_clips(3, 1.5)
    saved = saved_run(run_on(ListDataset(clips), others[:1]), tmp_path / "adapter_step00000.pt")
    with pytest.raises(ValueError, match=r"new: clip1_1.5; gone: clip0_1.5"):
        run_on(ListDataset(clips), others[1:2]).restore(saved)
    saved = saved_run(run_on(ListDataset(clips[:3]), clips[3:]), tmp_path / "adapter_step00000.pt")
    with pytest.raises(ValueError, match=r"held out \(--val_dir, --val_fraction, --val_clips\), new: clip2_1.0"):
        run_on(ListDataset([clips[0], clips[1], clips[3]]), clips[2:3]).restore(saved)
    before = run_on(Named(clips[:3]), Named(clips[3:]))
    with pytest.raises(ValueError, match=r"any more: another prompt: clip2_1\.0, clip3_1\.0\. Put"):
        run_on(Named(clips[:2]), Named(clips[2:], prompt="y")).restore(saved_run(before, tmp_path / "a_step00000.pt"))
    without = saved_run(run_on(ListDataset(clips)), tmp_path / "adapter_step00000.pt")
    run_on(ListDataset(clips), others).restore(without)


def test_a_step_file_of_version_0_1_0_says_nothing_of_content(tmp_path):
    clips = make_clips(4)
    saved = saved_run(run_on(Named(clips)), tmp_path / "adapter_step00000.pt")
    saved.extra.pop("content")
    run_on(Named(clips, prompt="y")).restore(saved)


def test_a_run_starts_at_a_finished_adapter(tmp_path):
    first = make_run(dataclasses.replace(CONFIG, ema_decay=0.5))
    for _ in range(3):
        first.train_step()
    path = tmp_path / "adapter_final.pt"
    save_adapter(path, first.generator, {})
    second = make_run(dataclasses.replace(CONFIG, ema_decay=0.5))
    second.start_from(load_adapter(path))
    assert second.step == 0 and not second.optimizer.state_dict()["state"]
    trained = lora_state_dict(first.generator)
    assert all(torch.equal(value, trained[key]) for key, value in lora_state_dict(second.generator).items())
    assert all(torch.equal(value, trained[key]) for key, value in second.ema.average.items())


def test_every_set_has_a_validation_loss_of_its_own():
    clips = make_clips(5)
    sets = ConcatDataset(NamedDataset(ListDataset(clips[:1]), "gong"), NamedDataset(ListDataset(clips[1:4]), "laser"))
    row = TrainingRun(make_generator(), ListDataset(clips), sets, CONFIG, torch.float32).validate()
    alone = [TrainingRun(make_generator(), ListDataset(clips), sets.subset(part), CONFIG, torch.float32).validate()
             for part in ([0], [1, 2, 3])]
    assert row["val_loss/gong"] == pytest.approx(alone[0]["val_loss"], rel=1e-5)
    assert row["val_loss/laser"] == pytest.approx(alone[1]["val_loss"], rel=1e-5)
    assert row["val_loss"] == pytest.approx((row["val_loss/gong"] + 3 * row["val_loss/laser"]) / 4, rel=1e-5)
    assert not any(key.startswith("val_loss/") for one in alone for key in one)


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


PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("before", PRECISIONS)
@pytest.mark.parametrize("after", PRECISIONS)
def test_a_run_goes_on_in_any_precision(tmp_path, before, after):
    """Only fp16 scales its loss: the step file of another precision holds no scale, and one of fp16 a useless one."""
    run = make_run(dtype=before)
    run.train_step()
    path = tmp_path / "adapter_step00001.pt"
    save_checkpoint(path, run.generator, {}, step=1, optimizer=run.optimizer.state_dict(), extra=run.extra_state())
    resumed = make_run(dtype=after)
    resumed.restore(load_checkpoint(path))
    assert resumed.scaler.is_enabled() == (after == torch.float16)
    if before == after:
        assert resumed.scaler.state_dict() == run.scaler.state_dict()
    start = lora_state_dict(resumed.generator)
    assert all(torch.equal(start[key], value) for key, value in lora_state_dict(run.generator).items())
    for _ in range(6):  # a first scale that is too high skips steps
        loss, _ = resumed.train_step()
        assert torch.isfinite(loss)
    assert not all(torch.equal(start[key], value) for key, value in lora_state_dict(resumed.generator).items())


def test_a_pissa_training_of_comfyui_selva_is_continued(tmp_path, caplog):
    """Its default step file, PiSSA with rsLoRA and alpha twice the rank, beside the same steps as done there."""
    rank, clips, config = 2, ListDataset(make_clips()), dataclasses.replace(CONFIG, weight_decay=0.0)
    base, scale = make_generator(), 2 * 2 / 2**0.5
    remove_lora(base)
    names = [name for name, _ in base.named_modules() if name.endswith("attn.qkv")]
    factors, residuals = {}, {}
    for name in names:
        layer = base.get_submodule(name)
        a, b = principal_factors(layer.weight, rank)
        factors[f"{name}.lora_A"], factors[f"{name}.lora_B"] = a + 0.01, b - 0.01
        residuals[f"{name}.linear.weight"] = layer.weight.detach() - scale * b @ a
        residuals[f"{name}.linear.bias"] = layer.bias.detach()
    there = copy.deepcopy(base)
    there.load_state_dict({**base.state_dict(), **{k.replace(".linear.", "."): v for k, v in residuals.items()}})
    plain = LoRAConfig(rank, 2 * rank, rslora=True)
    inject_lora(there, plain)
    load_lora_state_(there, factors)
    reference = TrainingRun(there, clips, clips.subset([]), config, torch.float32)
    for _ in range(2):
        reference.train_step()
    meta = {"variant": "tiny", "rank": rank, "alpha": 2.0 * rank, "target": ["attn.qkv"], "steps": 6,
            "use_rslora": True, "init_mode": "pissa", "timestep_mode": "curriculum"}
    stored = {"state_dict": {**lora_state_dict(there), **residuals}, "optimizer": reference.optimizer.state_dict(),
              "scheduler": {"last_epoch": 2}, "step": 2, "meta": meta}
    torch.save(stored, tmp_path / "adapter_step00002.pt")

    saved = load_checkpoint(tmp_path / "adapter_step00002.pt")
    pissa = dataclasses.replace(plain, init="pissa")
    check_same_settings(saved, pissa)
    inject_lora(base, pissa)
    run = TrainingRun(base, clips, clips.subset([]), dataclasses.replace(config, ema_decay=0.5), torch.float32)
    run.restore(saved)
    assert "--timestep_mode curriculum, now uniform" in caplog.text and "no random states" in caplog.text
    again = TrainingRun(there, clips, clips.subset([]), config, torch.float32)
    again.optimizer, again.step = reference.optimizer, 2
    for _ in range(3):
        (loss, norm), (expected_loss, expected_norm) = run.train_step(), again.train_step()
        torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-3, atol=1e-5)
    for key, value in lora_state_dict(there).items():
        torch.testing.assert_close(lora_state_dict(base)[key], value, rtol=1e-3, atol=1e-3)

    # From here on its step files are ours: exact, with the same settings.
    save_checkpoint(tmp_path / "ours.pt", base, meta, step=5, optimizer=run.optimizer.state_dict(),
                    extra=run.extra_state())
    ours = load_checkpoint(tmp_path / "ours.pt")
    check_same_settings(ours, pissa)
    other = copy.deepcopy(base)
    with torch.no_grad():
        for factor in named_factors(other).values():
            factor.zero_()
    resumed = TrainingRun(other, clips, clips.subset([]), dataclasses.replace(config, ema_decay=0.5), torch.float32)
    resumed.restore(ours)
    run.train_step(), resumed.train_step()
    assert all(torch.equal(v, lora_state_dict(base)[k]) for k, v in lora_state_dict(other).items())
