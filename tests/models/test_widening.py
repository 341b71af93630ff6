"""selva.models.widening: half-precision weights, float32 products, and no float32 copy kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_run import CONFIG, make_clips, make_generator
from torch import nn

from selva.data.dataset import collate
from selva.lora.config import LoRAConfig
from selva.lora.state import lora_parameters
from selva.models.generator import cast_frozen_
from selva.models.widening import Widening
from selva.training.memory import step_memory
from selva.training.objective import flow_loss, sample_noise
from selva.training.run import TrainingRun

LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (2, 30, 24)),
    "linear_no_bias": (lambda: nn.Linear(24, 16, bias=False), (5, 24)),
    "conv": (lambda: nn.Conv1d(24, 16, 3, padding=1), (2, 24, 30)),
    "conv_strided": (lambda: nn.Conv1d(24, 16, 5, stride=2, padding=2, groups=2, bias=False), (2, 24, 31)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_computes_what_its_rounded_weights_would_in_float32(name, dtype):
    make, shape = LAYERS[name]
    stored = make().to(dtype).requires_grad_(False)
    single = copy.deepcopy(stored).float()
    x = torch.randn(shape, requires_grad=True)
    with pytest.raises(RuntimeError, match="type"):
        stored(x)
    kept = []
    with Widening(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = stored(x)
    towards = torch.randn_like(y)
    y.backward(towards)
    expected_x = x.detach().clone().requires_grad_()
    expected = single(expected_x)
    expected.backward(towards)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=1e-5, atol=1e-6)
    assert [t.data_ptr() for t in kept] == [stored.weight.data_ptr()]


def test_autocast_and_equal_types_are_left_alone():
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = half(x)
    with Widening():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(half(x), expected) and expected.dtype == torch.bfloat16


def gradients(model):
    return torch.cat([p.grad.flatten() for p in lora_parameters(model) if p.grad is not None])


@pytest.mark.parametrize("lora", [
    LoRAConfig(rank=2, targets=("all",)), LoRAConfig(rank=2, targets=("attn.qkv",), init="pissa"),
    LoRAConfig(rank=2, targets=("attn.qkv", "linear1"), dora=True)], ids=["lora", "pissa", "dora"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_step_equals_that_of_a_float32_model_with_the_same_weights(lora, recomputed):
    stored, single = make_generator(lora), make_generator(lora)
    cast_frozen_(stored, torch.bfloat16)
    cast_frozen_(single, torch.bfloat16)
    cast_frozen_(single, torch.float32)
    stored.gradient_checkpointing = recomputed
    batch = collate(make_clips(2))
    noise = sample_noise(batch.mean.shape, CONFIG, torch.Generator().manual_seed(3), 0.0)
    losses = []
    for model in (stored, single):
        losses.append(flow_loss(model, batch, noise, CONFIG, torch.float32).mean())
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    ours, theirs = (gradients(model) for model in (stored, single))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm() and theirs.norm() > 0


def test_half_the_memory_of_the_weights_and_no_second_copy_in_a_step():
    """By tensors alone: the step itself may take a float32 copy of the largest matrix at a time, not of the model."""
    lora = LoRAConfig(rank=2)
    single = step_memory("tiny_16k", lora, CONFIG, torch.float32)
    stored = step_memory("tiny_16k", lora, CONFIG, torch.float32, stored=torch.bfloat16)
    assert stored.weights < 0.55 * single.weights
    assert stored.of_step < single.of_step + 0.05 * single.weights


def test_sampling_and_the_projections_kept_before_training(tmp_path):
    from selva.flow import SamplingConfig
    from selva.sampling import sample_latents

    stored = make_generator(LoRAConfig(rank=2)).eval()
    single = copy.deepcopy(stored)
    cast_frozen_(stored, torch.bfloat16)
    cast_frozen_(single, torch.bfloat16)
    cast_frozen_(single, torch.float32)
    clip = make_clips(1)[0]
    made = []
    for model in (stored, single):
        model.set_sequence(*collate([clip]).lengths)
        made.append(sample_latents(model, clip.clip_f[None], clip.sync_f[None], clip.text_f[None], [1],
                                   SamplingConfig(num_steps=3), precision=torch.float32))
    assert (made[0] - made[1]).norm() <= 1e-4 * made[1].norm()
    run = TrainingRun(stored, *_datasets(), CONFIG, torch.float32)
    assert run.condition_cache is not None
    run.generator.train()
    assert run.train_step()[0].isfinite()


def _datasets():
    from selva.data.dataset import ListDataset

    clips = ListDataset(make_clips(2))
    return clips, clips.subset([0])


def test_a_run_and_a_sound_in_half_the_memory(tmp_path, caplog):
    from make_data import put_clip

    from selva import SoundGenerator
    from selva.checkpoint import load_adapter
    from selva.training.config import RunConfig, TrainConfig
    from selva.training.train import train
    from selva.utils.errors import UserError
    from selva.weights.config import GeneratorModelConfig

    for number in range(3):
        put_clip(tmp_path / "features", f"clip_{number}", seed=number)
    config = RunConfig(
        data_dir=tmp_path / "features", output_dir=tmp_path / "run", model=GeneratorModelConfig(variant="tiny_16k"),
        training=TrainConfig(steps=2, batch_size=1), precision="fp32", base_dtype="bf16", verdict=False, preview=False)
    result = train(config)
    assert result.adapter is not None
    meta = load_adapter(result.adapter).meta
    assert (meta["precision"], meta["base_dtype"]) == ("fp32", "bf16")
    made = {}
    for base_dtype in ("auto", "bf16"):
        generator = SoundGenerator("tiny_16k", precision="fp32", base_dtype=base_dtype, adapters=[result.adapter])
        made[base_dtype] = generator.generate(features=tmp_path / "features" / "clip_0.npz").waveform
    assert made["auto"].shape == made["bf16"].shape and not torch.equal(made["auto"], made["bf16"])
    with pytest.raises(UserError, match="--compile does not go together with --base_dtype bf16"):
        RunConfig(data_dir=tmp_path, compile=True, base_dtype="bf16")
