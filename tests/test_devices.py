"""Everything that computes, on CUDA tensors without a GPU: nothing mixes devices, and no step waits for the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fake_cuda import CUDA, HostWaited, backward, fake_cuda, needs_cuda_build, on_device
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from selva.data.dataset import ListDataset, TrainingClip
from selva.data.latents import encode_latents
from selva.data.order import ClipWindow
from selva.flow import SOLVERS, SamplingConfig
from selva.inference.long_sampling import sample_long
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.models.clip_t5 import ClipImage, ClipText, T5Text
from selva.models.generator import cast_frozen_
from selva.models.qk_norm_rope import qk_norm_rope
from selva.models.variants import get_variant
from selva.models.zoo import build_generator, build_mel, build_vae, build_video_encoder, build_vocoder
from selva.sampling import decode_latents, sample_latents
from selva.sequence import sequence_config
from selva.training import condition_cache
from selva.training.config import TrainConfig
from selva.training.loop import fit
from selva.training.objective import held_out_losses
from selva.training.run import TrainingRun
from selva.utils.device import dtype_of, to_device
from selva.utils.metrics_log import MetricsFile

pytestmark = needs_cuda_build
VARIANTS = ("small_16k", "large_44k", "mmaudio_large_44k_v2")


def generator_of(variant, precision="bf16", lora=None, shallow=False):
    def build():
        config = get_variant(variant).generator
        generator = build_generator(dataclasses.replace(config, depth=3, fused_depth=1) if shallow else config)
        cast_frozen_(generator, dtype_of(precision))
        if lora is not None:
            inject_lora(generator, lora, torch.Generator())
        return generator

    return on_device(build)


def make_run(variant="small_16k", precision="bf16", lora=None, shallow=True, **settings):
    lora = lora or LoRAConfig(rank=4)
    settings = {"steps": 100, "batch_size": 2, **settings}
    sizes, sequence = get_variant(variant).generator, sequence_config(get_variant(variant).mode, 8.0)
    clips = ListDataset(
        TrainingClip(
            str(i), "", None, sequence, torch.zeros(sequence.latent_seq_len, sizes.latent_dim),
            torch.zeros(sequence.latent_seq_len, sizes.latent_dim), torch.zeros(sequence.clip_seq_len, sizes.clip_dim),
            torch.zeros(sequence.sync_seq_len, sizes.sync_dim), torch.zeros(sizes.text_seq_len, sizes.text_dim),
            has_video=i != 1,
        ) for i in range(3)
    )
    generator = generator_of(variant, precision, lora, shallow)
    run = TrainingRun(generator, clips, clips.subset([0]), TrainConfig(**settings), dtype_of(precision))
    run.batches.draw = lambda: [ClipWindow(i % 3, 0) for i in range(settings["batch_size"])]  # no numbers, no order
    generator.train()
    return run


def take_steps(run, host, count=2):
    """Do the first step, which may set something up, and others in which the host must not wait."""
    loss, norm = run.train_step()
    host.strict = True
    for _ in range(count - 1):
        loss, norm = run.train_step()
    host.strict = False
    assert loss.is_cuda and norm.is_cuda and loss.dtype == torch.float32
    # Every trained parameter got a gradient, which the optimiser took.
    assert all(run.optimizer.state[p]["exp_avg"].is_cuda for p in run.parameters)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_and_a_validation_stay_on_the_device(variant):
    with fake_cuda() as host:
        run = make_run(variant, shallow=False)
        take_steps(run, host)
        assert held_out_losses(run.generator, run.val_clips, run.config, run.precision).is_cuda


CASES = {
    "fp16, scaled": {"precision": "fp16"},
    "fp32, average": {"precision": "fp32", "ema_decay": 0.9},
    "accumulated": {"grad_accum": 2},
    "LoRA+, dropout": {"lora": LoRAConfig(rank=4, dropout=0.1), "lora_plus_ratio": 4.0},
    "DoRA, convolutions": {"lora": LoRAConfig(rank=4, dora=True, targets=("attn.qkv", "linear1", "ffn.w1"))},
    "PiSSA": {"lora": LoRAConfig(rank=4, init="pissa")},
    "conditions adapted": {"lora": LoRAConfig(rank=4, targets=("text_input_proj.0", "clip_cond_proj"))},
    "no pictures": {"clip_features": "empty"},
    "the mode of latents": {"latent": "mode", "timestep_mode": "uniform"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_stays_on_the_device_whatever_the_settings(case):
    with fake_cuda() as host:
        take_steps(make_run(**CASES[case]), host)


def test_a_step_of_a_set_too_large_for_the_cache_stays_on_the_device(monkeypatch):
    monkeypatch.setattr(condition_cache, "MAX_BYTES", 0)
    with fake_cuda() as host:
        run = make_run()
        assert run.condition_cache is None
        take_steps(run, host)


def test_the_loop_reads_nothing_back_between_two_rows(monkeypatch):
    class EnoughError(Exception):
        pass

    with fake_cuda() as host:
        run = make_run(log_every=50, val_every=50, save_every=50)
        run.step, step = 1, run.train_step

        def counted():
            if run.step == 4:
                raise EnoughError
            host.strict = run.step > 1
            return step()

        monkeypatch.setattr(run, "train_step", counted)
        with pytest.raises(EnoughError):
            fit(run, MetricsFile(), on_checkpoint=lambda r: None, on_best=lambda r: None, should_stop=lambda: False)


# -- sampling ----------------------------------------------------------------------------------------------------------


def sampled(host, generator, count=2, **settings):
    lengths = generator.empty_features(count)
    host.strict = False
    latents = sample_latents(generator, *lengths, list(range(count)), SamplingConfig(num_steps=2, **settings),
                             precision=torch.bfloat16, on_step=lambda _: setattr(host, "strict", True))
    host.strict = False
    assert latents.is_cuda and latents.dtype == torch.float32
    return latents


@pytest.mark.parametrize("variant", VARIANTS)
def test_sampling_stays_on_the_device(variant):
    with fake_cuda() as host:
        sampled(host, generator_of(variant))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("settings", [{}, {"cfg_interval": (0.2, 0.8)}, {"cfg_strength": 0.5}], ids=str)
def test_sampling_stays_on_the_device_with_every_solver(solver, settings):
    with fake_cuda() as host:
        sampled(host, generator_of("small_16k", shallow=True), solver=solver, **settings)


def test_sampling_of_long_sounds_stays_on_the_device():
    with fake_cuda() as host:
        generator = generator_of("small_16k", shallow=True)
        text = generator.empty_features(2)[2]
        latents = sample_long(generator, None, None, text, [1, 2], SamplingConfig(num_steps=2), mode="16k",
                              duration_sec=20.0, precision=torch.bfloat16,
                              on_step=lambda _: setattr(host, "strict", True))
        assert latents.is_cuda


# -- sound and encoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["small_16k", "large_44k"])
def test_sound_is_encoded_and_decoded_on_the_device(variant):
    with fake_cuda():
        vae, vocoder, mel = (on_device(lambda build=build: build(variant)).eval()
                             for build in (build_vae, build_vocoder, build_mel))
        sequence = sequence_config(get_variant(variant).mode, 8.0)
        mean, std = encode_latents(torch.empty(1, sequence.num_audio_frames, device=CUDA), mel, vae)
        assert mean.is_cuda and std.is_cuda
        assert decode_latents(mean, vae, vocoder).is_cuda
        assert decode_latents(mean.repeat(1, 3, 1), vae, vocoder, chunk_sec=8.0).is_cuda


@pytest.mark.parametrize("variant", ["small_16k", "mmaudio_small_16k"])
def test_motion_is_encoded_on_the_device(variant):
    with fake_cuda():
        encoder = on_device(lambda: build_video_encoder(variant)).eval().requires_grad_(False)
        size, frames = encoder.config.image_size, 48
        pictures = torch.empty(1, frames, 3, size, size, device=CUDA)
        words = ()
        if variant == "small_16k":
            words = (torch.empty(1, 9, encoder.config.text_dim, device=CUDA),
                     torch.ones(1, 9, dtype=torch.bool, device=CUDA))
        assert encoder.encode(pictures, *words, segment_batch=2).is_cuda


def test_words_and_pictures_are_encoded_on_the_device():
    config = get_variant("small_16k").clip
    with fake_cuda():
        words = on_device(lambda: ClipText(config)).eval().requires_grad_(False)
        assert words.encode(["a dog barks", ""]).is_cuda
        pictures = on_device(lambda: ClipImage(config)).eval().requires_grad_(False)
        assert pictures.encode(torch.zeros(17, 3, 384, 384, dtype=torch.uint8, device=CUDA)).is_cuda


def test_words_for_the_video_encoder_are_encoded_on_the_device():
    config = dataclasses.replace(get_variant("small_16k").t5, byte_tokens=True)  # whose tokenizer needs no file
    with fake_cuda():
        encoder = on_device(lambda: T5Text(config)).eval().requires_grad_(False)
        features, mask = encoder.encode(["a dog barks"])
        assert features.is_cuda and mask.is_cuda


# -- the checks themselves ---------------------------------------------------------------------------------------------

READ_BACK = {
    "item": lambda x, host: x[0].item(),
    "bool": lambda x, host: bool(x[0] > 0),
    "tolist": lambda x, host: x.tolist(),
    "cpu": lambda x, host: x.cpu(),
    "chosen by a mask": lambda x, host: x[x > 0],
    "copied into a tensor of the host": lambda x, host: host.copy_(x),
}
MIXED = {
    "sum": lambda x, host: x + host,
    "product": lambda x, host: x @ host,
    "convolution": lambda x, host: torch.nn.functional.conv1d(x[None], host[None, None]),
    "layer": lambda x, host: torch.nn.functional.linear(x, host[None]),
}
WAITED_FOR = {
    "index on the host": lambda x, host: x[host.long()],
    "copied to the device": lambda x, host: host.to(x.device),
}


@pytest.mark.parametrize("fault", [*READ_BACK, *MIXED, *WAITED_FOR])
def test_a_fault_is_found(fault):
    """Whatever would make a GPU wait, or refuse, ends in an error here."""
    with fake_cuda() as host:
        x, on_host = torch.zeros(3, device=CUDA), torch.empty(3)
        host.strict = True
        with pytest.raises((HostWaited, DataDependentOutputException, DynamicOutputShapeException, RuntimeError)):
            {**READ_BACK, **MIXED, **WAITED_FOR}[fault](x, on_host)


@pytest.mark.parametrize("fine", [lambda x, host: x * torch.tensor(2.0), lambda x, host: to_device(host, x.device) + x])
def test_what_nobody_waits_for_is_no_fault(fine):
    with fake_cuda() as host:
        host.strict = True
        assert fine(torch.zeros(3, device=CUDA), torch.empty(3)).is_cuda


def test_the_gradients_of_fake_steps_are_those_of_pytorch():
    """The walk through the graph that stands in for PyTorch's, on real numbers."""
    grads = []
    for go_back in (torch.Tensor.backward, backward):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.SiLU(), torch.nn.Linear(6, 6))
        x = torch.randn(5, 4)
        y = layers(x)
        q, k, v = qk_norm_rope(torch.cat((y, y * 2, y), -1)[None], torch.ones(6), torch.ones(6), (x[:, :3], x[:, 1:]))
        go_back((q * k + v * layers[0].bias.sum() + y.mean()).square().mean())
        grads.append([p.grad for p in layers.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)
        assert one.any()
