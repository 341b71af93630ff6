"""Part of `gpu.py`: whether the device computes what the CPU does, in float32 and in half precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from gpu_rows import Row, Rows, Setup, filled, filled_clip, filled_generator, guarded
from measure import relative_error
from stages import TOLERANCE, features_of, random_clips, set_lengths
from torch import Tensor, nn

from selva.data.dataset import ListDataset
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.lora.state import lora_state_dict
from selva.models.clip_t5 import meta_t5
from selva.models.config import VocoderConfig
from selva.models.generator import Generator
from selva.models.random_weights import fill_random_
from selva.models.textsynch import TextSynch
from selva.models.variants import Variant, get_variant
from selva.models.zoo import build_mel, build_vae, build_video_encoder, build_vocoder
from selva.training.config import TrainConfig
from selva.training.run import TrainingRun
from selva.utils.text import counted

SECONDS = 1.0
EXACT, TF32 = 1e-4, 1e-2  # relative errors: of float32, and of convolutions whose inputs have the 10 bits of TF32
LOSSES_DIFFER = 1e-3  # relative; a loss is the mean of thousands of squares
# Of the change of the factors after 20 steps. Adam divides by the size of the gradient, so an entry whose gradient is
# little more than rounding moves by a whole step in a direction that rounding decides.
CHANGES_DIFFER = 0.1
Use = Callable[[Any, torch.device], Tensor]


def networks(setup: Setup) -> Rows:
    """Compare every network with the CPU in float32, and the generators in half precision with float32."""
    for variant in setup.variants("small_16k", "large_44k", "mmaudio_large_44k_v2"):
        yield from guarded(setup, f"generator, {variant.name}", _generator_rows(setup, variant))
    for of, build, uses in _others(setup):
        yield from guarded(setup, f"{' and '.join(uses)}, {of}", _network_rows(setup, of, build, uses))


@torch.no_grad()
def _network_rows(setup: Setup, of: str, build: Callable[[], nn.Module], uses: dict[str, Use]) -> Iterator[Row]:
    """Compare what a network returns with what its copy on the CPU does, for every use of it."""
    network = build()
    copied = copy.deepcopy(network).cpu()
    for what, run in uses.items():
        expected = run(copied, torch.device("cpu"))
        with _convolutions(tf32=False):
            found = run(network, setup.device).cpu()
        yield Row(f"{what}, fp32 against the CPU", of, relative_error(found, expected), "", EXACT)
        if setup.device.type == "cuda":
            with _convolutions(tf32=True):
                usual = run(network, setup.device).cpu()
            yield Row(f"{what}, fp32 as PyTorch sets it", of, relative_error(usual, expected), "", TF32,
                      note="convolutions may use TF32")


def _generator_rows(setup: Setup, variant: Variant) -> Iterator[Row]:
    """Compare the velocity of a generator; a large one is made on the device and copied to the CPU."""
    on_device = filled_generator(variant, setup.device)
    on_cpu = copy.deepcopy(on_device).cpu()
    clips = random_clips(variant, 2, SECONDS)
    for model in (on_device, on_cpu):
        set_lengths(model, variant, SECONDS)
    expected = _velocity(on_cpu, clips, torch.float32)
    with _convolutions(tf32=False):
        found = _velocity(on_device, clips, torch.float32)
    yield Row("generator, fp32 against the CPU", variant.name, relative_error(found, expected), "", EXACT)
    del on_cpu
    for dtype in (torch.bfloat16, torch.float16):
        half = _velocity(on_device, clips, dtype)
        name = str(dtype).removeprefix("torch.")
        yield Row(f"generator, {name} against fp32", variant.name, relative_error(half, found), "",
                  2 * TOLERANCE[dtype])


@torch.no_grad()
def _velocity(model: Generator, clips: list, dtype: torch.dtype) -> Tensor:
    device = model.latent_mean.device
    rng = torch.Generator().manual_seed(1)
    latent = torch.randn(len(clips), model.latent_seq_len, model.config.latent_dim, generator=rng).to(device)
    t = torch.tensor([0.3, 0.7], device=device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return model.predict_flow(latent, t, model.preprocess_conditions(*features_of(clips, device))).float().cpu()


def _others(setup: Setup) -> Iterator[tuple[str, Callable[[], nn.Module], dict[str, Use]]]:
    """Yield (size, how to build it on the device, name -> use) of all but the generator, for a second or less."""
    rng, on = torch.Generator().manual_seed(2), setup.device
    for variant in setup.variants("small_16k", "large_44k"):
        spectrogram = torch.randn(1, variant.vae.num_mels, 64, generator=rng)
        latents = torch.randn(1, variant.vae.latent_dim, 32, generator=rng)
        waveform = 0.1 * torch.randn(1, 16_000, generator=rng)
        yield variant.mode, lambda v=variant: build_mel(v.mode).to(on), {
            "mel front end": lambda net, device, x=waveform: net(x.to(device))}
        yield variant.name, lambda v=variant: filled(build_vae(v.vae), on), {
            "VAE encoder": lambda net, device, x=spectrogram: net.encode(x.to(device))[0],
            "VAE decoder": lambda net, device, x=latents: net.decode(x.to(device))}
        if isinstance(variant.vocoder, VocoderConfig):  # the stand-in of tiny_16k iterates until phases agree
            yield variant.name, lambda v=variant: filled(build_vocoder(v.vocoder), on), {
                "vocoder": lambda net, device, x=spectrogram: net(x.to(device))}
    (variant,) = setup.variants("small_16k")  # the published variants share the rest
    frames = torch.rand(1, 24, 3, *2 * [variant.sync_image_size], generator=rng) * 2 - 1
    words = torch.randn(1, 6, variant.video_encoder.text_dim, generator=rng)
    pixels = torch.rand(2, 3, *2 * [variant.clip_image_size], generator=rng)
    tokens = torch.randint(1, variant.clip.vocab_size, (2, variant.clip.context_length), generator=rng)
    ids = torch.randint(2, 200, (2, 9), generator=rng)

    def watched(net: nn.Module, device: torch.device) -> Tensor:
        mask = torch.ones(1, words.shape[1], dtype=torch.bool, device=device)
        return cast(TextSynch, net).encode(frames.to(device), words.to(device), mask)

    def t5() -> nn.Module:
        assert variant.t5 is not None
        return filled(meta_t5(variant.t5).to_empty(device=on), on)

    yield variant.name, lambda: filled(build_video_encoder(variant.name), on), {"video encoder": watched}
    yield variant.name, lambda: filled_clip(variant, on), {
        "CLIP, frames": lambda net, device: net.encode_image(pixels.to(device)),
        "CLIP, texts": lambda net, device: net.encode_text(tokens.to(device))}
    yield variant.name, t5, {"T5": lambda net, device: net(input_ids=ids.to(device)).last_hidden_state}


@contextmanager
def _convolutions(tf32: bool) -> Iterator[None]:
    """Let float32 convolutions be computed in TF32, which is PyTorch's default, or not, which is this software's."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def training(setup: Setup) -> Rows:
    """Train the same steps on the CPU and on the device, in float32, and compare losses and factors."""
    steps = setup.pick(20, 3)
    results = []
    with _convolutions(tf32=False):
        for device in (torch.device("cpu"), setup.device):
            run = _tiny_run(device, steps)
            start = lora_state_dict(run.generator)
            losses = torch.stack([run.train_step()[0] for _ in range(steps)]).cpu()
            end = lora_state_dict(run.generator)
            results.append((losses, torch.cat([(end[key] - start[key]).flatten() for key in end])))
    (cpu_losses, cpu_change), (losses, change) = results
    yield Row("losses, against the CPU", counted(steps, "step"), relative_error(losses, cpu_losses), "", LOSSES_DIFFER)
    yield Row("change of the adapter, against the CPU", counted(steps, "step"), relative_error(change, cpu_change), "",
              CHANGES_DIFFER)


def _tiny_run(device: torch.device, steps: int) -> TrainingRun:
    variant = get_variant("tiny_16k")
    generator = fill_random_(Generator(variant.generator)).requires_grad_(False)
    inject_lora(generator, LoRAConfig(rank=4), torch.Generator().manual_seed(0))
    generator.to(device).train()
    clips = ListDataset(random_clips(variant, 8, SECONDS))
    config = TrainConfig(steps=steps, batch_size=4, warmup_steps=0)
    return TrainingRun(generator, clips, clips.subset([]), config, torch.float32)
