"""selva.training.memory: the memory of a step, found on tensors without numbers."""

from __future__ import annotations

import dataclasses
import logging
import re

import pytest
import torch
from fake_cuda import fake_cuda, needs_cuda_build
from small_run import make_clips, make_generator
from test_devices import make_run
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from selva.features import FeatureBundle, save_features
from selva.lora.config import LoRAConfig
from selva.models import blocks
from selva.models.variants import get_variant
from selva.models.zoo import build_generator
from selva.sequence import sequence_config
from selva.training import memory
from selva.training.config import RunConfig, TrainConfig
from selva.training.memory import LiveStorages, has_several_lengths, largest_batch, log_step_memory, step_memory
from selva.training.objective import flow_loss, sample_noise

GIB, MIB = 2**30, 2**20
DROPOUT = LoRAConfig(rank=4, dropout=0.1)
TINY = ("tiny_16k", LoRAConfig(rank=4))


def of_batch(batch_size, variant="tiny_16k", precision=torch.bfloat16, lora=None, ema_decay=0.0, **more):
    training = TrainConfig(batch_size=batch_size, ema_decay=ema_decay)
    return step_memory(variant, lora or LoRAConfig(rank=16), training, precision, **{"num_clips": 16, **more})


@pytest.mark.parametrize(
    ("batch_size", "checkpoint_blocks", "ceiling"),
    [(1, False, 2.25), (4, False, 3.15), (16, False, 6.6), (16, True, 2.55)],
)
def test_large_44k_takes_no_more_than_it_did(batch_size, checkpoint_blocks, ceiling):
    size = of_batch(batch_size, "large_44k", checkpoint_blocks=checkpoint_blocks, num_clips=batch_size)
    assert 0.95 * ceiling < size.peak / GIB < ceiling


def test_live_storages_are_counted_once_and_only_as_long_as_they_live():
    with FakeTensorMode(), LiveStorages() as live:
        x = torch.empty(MIB)  # 4 MiB
        view = x[: MIB // 2].view(2, -1).mT
        y = x * 2
        assert live.total == live.peak == 8 * MIB
        del x, y
        assert live.total == 4 * MIB  # the view keeps the whole
        del view
        z = torch.empty(1)
        assert live.total == memory.BLOCK and live.peak == 8 * MIB and z is not None


def test_the_parts_are_those_of_a_real_model():
    size, lora = of_batch(4), LoRAConfig(rank=16)
    with torch.device("meta"):
        model = build_generator("tiny_16k")
        memory.cast_frozen_(model, torch.bfloat16)
        memory.inject_lora(model, lora, torch.Generator())
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    adapter = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
    config, sequence = model.config, sequence_config("16k", 8.0)
    tokens = sequence.latent_seq_len + sequence.clip_seq_len + config.text_seq_len + 2
    cached = 16 * (tokens * config.hidden_dim * 2 + 2 * sequence.latent_seq_len * config.latent_dim * 4)
    slack = 512 * (len(list(model.parameters())) + 200)  # every storage is rounded up
    assert weights <= size.weights <= weights + slack
    assert 2 * adapter + cached <= size.resident <= 2 * adapter + cached + slack + 200_000  # tables of positions
    assert size.peak > size.weights + size.resident and size.of_step > 0


def test_what_stays_between_steps_counts():
    plain = of_batch(4)
    assert of_batch(4, ema_decay=0.9).resident > plain.resident  # an average of the adapter
    many = of_batch(4, num_clips=116)  # conditions of 100 more clips
    of_a_clip = (many.peak - plain.peak) / 100
    assert of_a_clip == (many.resident - plain.resident) / 100
    sizes = get_variant("tiny_16k").generator
    assert of_a_clip == (250 + 64 + 79) * sizes.hidden_dim * 2 + 2 * 250 * sizes.latent_dim * 4
    assert of_batch(4, num_clips=10**6).resident < plain.resident  # too many to keep any


def test_memory_grows_with_the_batch_and_the_length_and_shrinks_with_checkpointing():
    peaks = [of_batch(n).peak for n in (1, 4, 16)]
    assert peaks == sorted(peaks) and peaks[2] > 2 * peaks[1]
    assert of_batch(4, duration_sec=4.0).peak < of_batch(4).peak < of_batch(4, precision=torch.float32).peak
    every, some, none = (of_batch(16, checkpoint_blocks=n).peak for n in (True, 2, False))
    assert every < some < none


@needs_cuda_build
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_fake_cpu_that_stands_for_a_gpu_keeps_for_backward_what_a_fake_gpu_keeps(precision, monkeypatch):
    """Autocast has other rules on CPUs, so the number would be worth nothing if it did not agree with CUDA's."""
    found = []
    with fake_cuda(), monkeypatch.context() as patch:
        # What PyTorch chooses where there is a GPU; without one it writes attention out.
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
        run = make_run(precision=precision)
        found.append(kept_for_backward(run))
    with memory._isolated(), FakeTensorMode():
        variant, dtype = get_variant("small_16k"), run.precision
        generator = on_cpu(variant, dtype)
        clips = memory._Clips(variant, 8.0, 3)
        cpu = memory.TrainingRun(generator, clips, clips.subset([0]), run.config, dtype)
        cpu.batches.draw = run.batches.draw
        found.append(kept_for_backward(cpu))
    assert found[0] == pytest.approx(found[1], rel=0.03)


def fused_attention(q, k, v):
    if q.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def on_cpu(variant, dtype):
    config = dataclasses.replace(variant.generator, depth=3, fused_depth=1)
    with unset_fake_temporarily(), torch.device("meta"):
        generator = build_generator(config)
        memory.cast_frozen_(generator, dtype)
        memory.inject_lora(generator, LoRAConfig(rank=4), torch.Generator())
    return memory._allocated_(generator)


def kept_for_backward(run):
    """Return the bytes that a forward pass leaves behind."""
    batch = run._load(run.batches.draw())
    noise = sample_noise(batch.mean.shape, run.config, run.rng, 0.0)
    flow_loss(run.generator, batch, noise, run.config, run.precision)  # makes tables
    with LiveStorages() as live:
        loss = flow_loss(run.generator, batch, noise, run.config, run.precision)
        assert loss.requires_grad
        return live.total


def test_nothing_is_left_behind():
    state = torch.get_rng_state()
    of_batch(1, lora=LoRAConfig(rank=4, dropout=0.1))  # whose masks have a seed at every step
    assert torch.equal(torch.get_rng_state(), state)
    assert not isinstance(blocks.rotary_table(250, 32, 1.0, torch.device("cpu"))[0], FakeTensor)
    model, clip = make_generator(), make_clips(1)[0]
    model.set_sequence(*clip.lengths)
    velocity = model(clip.mean[None], clip.clip_f[None], clip.sync_f[None], clip.text_f[None], torch.tensor([0.5]))
    assert velocity.isfinite().all()


def test_the_largest_batch_that_fits():
    peaks = {1: 100, 4: 130, 32: 410}  # 90 and 10 a clip
    assert [largest_batch(peaks, n) for n in (99, 100, 130, 139, 410, 500)] == [0, 1, 4, 4, 32, 41]
    assert largest_batch(peaks, 10**9) == memory.MOST_CLIPS
    sizes = {n: of_batch(n).peak for n in (1, 32)}
    fits = largest_batch(sizes, sizes[32] / 2)
    assert of_batch(fits).peak <= sizes[32] / 2 < of_batch(fits + 1).peak * 1.02


class Card:
    """A CUDA device that says how much of its memory is free."""

    def __init__(self, monkeypatch, free):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), 8 * GIB))
        self.type = "cuda"


def test_the_log_names_the_batch_that_fits(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    for i in range(3):
        (tmp_path / f"{i}.npz").touch()
    config = RunConfig(data_dir=tmp_path, precision="bf16", training=TrainConfig(batch_size=4))
    log_step_memory(dataclasses.replace(config, precision="fp32"), "auto", torch.device("cpu"))
    assert "on an NVIDIA GPU in bf16 takes" in caplog.text  # what auto will be there
    counts = re.search(r"card of 8 GB: (\d+), 12 GB: (\d+), 16 GB: (\d+), 24 GB: (\d+);", caplog.text)
    assert counts and 1 < int(counts[1]) < int(counts[2]) < int(counts[3]) <= int(counts[4])
    caplog.clear()
    log_step_memory(config, "bf16", Card(monkeypatch, free=0.1))
    record = caplog.records[-1]
    assert "of whose 8.0 GiB 0.1 are free: none" in record.message and record.levelno == logging.WARNING
    log_step_memory(config, "bf16", Card(monkeypatch, free=8))
    assert caplog.records[-1].levelno == logging.INFO


def test_graphs_keep_the_memory_of_a_step_beside_what_runs_without():
    alone = of_batch(4, validates=False)
    assert of_batch(4, validates=False, graphs=True) == alone
    several = of_batch(4, validates=False, graphs=True, several_lengths=True)
    assert several.of_step == 2 * alone.of_step and several.resident == alone.resident
    validated = of_batch(4, graphs=True)
    assert alone.peak < validated.peak < several.peak == of_batch(4, graphs=True, several_lengths=True).peak
    assert of_batch(4).peak == alone.peak


def test_lengths_that_a_model_tells_apart_are_counted():
    tiny = get_variant("tiny_16k")
    assert not has_several_lengths([8.0, 9.5, 8.001, float("nan"), 0.1], tiny, 8.0)  # windows; two cannot be used
    assert has_several_lengths([8.0, 9.5], tiny, 10.0) and has_several_lengths([8.0, 4.0], tiny, 8.0)


@pytest.mark.parametrize("flags", [{}, {"cuda_graph": "off"}, {"grad_checkpointing": True, "lora": DROPOUT}])
def test_a_dry_run_counts_a_step_twice_where_graphs_of_several_lengths_keep_one(tmp_path, caplog, monkeypatch, flags):
    caplog.set_level(logging.INFO)
    asked = []
    monkeypatch.setattr(memory, "step_memory", lambda *args, **more: asked.append(
        (more["graphs"], more["several_lengths"])) or memory.StepMemory(0, 0, 0))
    for number, seconds in enumerate((4.0, 8.0)):
        save_features(tmp_path / f"{number}.npz", FeatureBundle(torch.zeros(1, 8, 4), torch.zeros(1, 8, 4), seconds))
        log_step_memory(RunConfig(data_dir=tmp_path, precision="fp32", **flags), "bf16", torch.device("cpu"))
        assert ("the step counts twice" in caplog.text) is (number == 1 and not flags)
    assert set(asked) == ({(True, False), (True, True)} if not flags else {(False, False)})


def test_the_step_that_is_measured_has_the_moments_of_earlier_ones(monkeypatch):
    step, found = memory.TrainingRun.train_step, []
    monkeypatch.setattr(memory.TrainingRun, "train_step",
                        lambda run: (found.append(len(run.optimizer.state) / len(run.parameters)), step(run))[1])
    of_batch(1)
    assert found == [1.0]
