"""Part of `gpu.py`: the time and the memory of training steps and of sampling, eager, as graphs and compiled."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_rows import Row, Rows, Setup, filled, filled_clip, filled_generator, free, guarded
from measure import count_flops
from plain import plain_training, wrap_plainly_
from stages import RANK, TARGET, features_of, plain_clips, random_clips, set_lengths
from torch import Tensor

from selva.data.dataset import ListDataset
from selva.flow import SamplingConfig
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.models.generator import Generator, cast_frozen_
from selva.models.textsynch import TextSynch
from selva.models.variants import Variant
from selva.models.zoo import build_vae, build_video_encoder, build_vocoder
from selva.sampling import NO_GRAPHS, SamplingGraphs, decode_latents, sample_latents, sampling_graphs
from selva.sequence import sequence_config
from selva.training.compiling import compile_blocks_, prepare_to_compile
from selva.training.config import TrainConfig
from selva.training.memory import step_memory
from selva.training.run import TrainingRun
from selva.utils.graph import WARM_UPS, graphed_calls

VARIANTS = ("small_16k", "large_44k")
BATCHES = (1, 4, 16)
AIM_SEC = {("small_16k", 4): 8e-3, ("large_44k", 4): 25e-3}  # a step on an H100
AIM_GIB = {("large_44k", 1): 4.0}
SAMPLING_AIM_SEC = {"small_16k": 60e-3}  # 25 guided steps of 8 s
HALF = 0.5  # of our own eager time: the aim of a graph
DURATION_SEC, SAMPLING_STEPS = 8.0, 25
STEPS, ROUNDS = 10, 3  # timed without waiting in between, as a training runs; the median of the rounds counts


def steps(setup: Setup) -> Rows:
    """Time steps and measure their memory: plain, eager, as graphs and checkpointed, at every batch size."""
    for variant in setup.variants(*VARIANTS):
        clips = ListDataset(random_clips(variant, setup.pick(16, 4), setup.pick(DURATION_SEC, 1.0)))
        yield from guarded(setup, variant.name, _step_rows(setup, variant, clips))
        yield from guarded(setup, f"{variant.name}, plain loop", _plain_rows(setup, variant, clips))


def _step_rows(setup: Setup, variant: Variant, clips: ListDataset) -> Rows:
    generator = adapted_generator(setup, variant)
    for batch in setup.pick(BATCHES, (1, 2)):
        what = f"{variant.name}, batch {batch}"
        yield from guarded(setup, what, _eager_rows(setup, variant, generator, clips, batch))
        if setup.device.type == "cuda":
            yield from guarded(setup, f"{what}, graph", _graph_rows(setup, variant, generator, clips, batch))
    generator.gradient_checkpointing = True
    for batch in setup.pick(BATCHES, (2,)):
        rows = _checkpointed_rows(setup, variant, generator, clips, batch)
        yield from guarded(setup, f"{variant.name}, batch {batch}, checkpointed", rows)


def _eager_rows(
    setup: Setup, variant: Variant, generator: Generator, clips: ListDataset, batch: int
) -> Iterator[Row]:
    run = training_run(setup, generator, clips, batch)
    seconds, gib = measured(setup, run.train_step)
    note = rate_note(setup, batch, seconds, step_flops(run))
    yield Row(f"{variant.name}, step, eager", f"batch {batch}", seconds, "s", note=note)
    note = counted(setup, variant, clips, batch, False)
    yield memory_row(f"{variant.name}, memory, eager", variant, batch, gib, note)


def _graph_rows(
    setup: Setup, variant: Variant, generator: Generator, clips: ListDataset, batch: int
) -> Iterator[Row]:
    run = training_run(setup, generator, clips, batch)
    eager, _ = measured(setup, run.train_step)
    flops = step_flops(run)
    del run
    free(setup.device)
    run = training_run(setup, generator, clips, batch, "on")
    seconds, gib = measured(setup, run.train_step)
    note = rate_note(setup, batch, seconds, flops)
    aim = AIM_SEC.get((variant.name, batch))
    yield Row(f"{variant.name}, step, graph", f"batch {batch}", seconds, "s", aim=aim, note=note)
    yield Row(f"{variant.name}, step, graph over eager", f"batch {batch}", seconds / eager, "",
              aim=HALF if batch == 4 else None)
    yield memory_row(f"{variant.name}, memory, graph", variant, batch, gib)


def _checkpointed_rows(
    setup: Setup, variant: Variant, generator: Generator, clips: ListDataset, batch: int
) -> Iterator[Row]:
    seconds, gib = measured(setup, training_run(setup, generator, clips, batch).train_step)
    yield Row(f"{variant.name}, step, checkpointed", f"batch {batch}", seconds, "s")
    note = counted(setup, variant, clips, batch, True)
    yield memory_row(f"{variant.name}, memory, checkpointed", variant, batch, gib, note)


def memory_row(what: str, variant: Variant, batch: int, gib: float, note: str = "") -> Row:
    return Row(what, f"batch {batch}", gib, "GiB", aim=AIM_GIB.get((variant.name, batch)), note=note)


def counted(setup: Setup, variant: Variant, clips: ListDataset, batch: int, checkpointed: bool) -> str:
    """Return the memory of such a step as tensors without numbers give it, in words."""
    memory = step_memory(
        variant.name, LoRAConfig(rank=RANK, targets=(TARGET,)), TrainConfig(batch_size=batch), setup.bench.dtype,
        duration_sec=clips.clip(0).sequence.duration_sec, checkpoint_blocks=checkpointed, num_clips=len(clips),
        validates=False,
    )
    return f"counted without a GPU: {memory.peak / 2**30:.2f} GiB"


def _plain_rows(setup: Setup, variant: Variant, clips: ListDataset) -> Iterator[Row]:
    generator = filled_generator(variant, setup.device)
    set_lengths(generator, variant, clips.clip(0).sequence.duration_sec)
    generator.to(setup.bench.dtype)
    parameters = wrap_plainly_(generator, TARGET, RANK)
    for batch in setup.pick(BATCHES, (1,)):
        plain = plain_training(generator, parameters, plain_clips(clips.clips), batch, lr=1e-4)
        seconds, gib = measured(setup, lambda plain=plain: next(plain))
        yield Row(f"{variant.name}, step, plain loop", f"batch {batch}", seconds, "s",
                  note=f"{batch / seconds:.3g} samples/s")
        yield Row(f"{variant.name}, memory, plain loop", f"batch {batch}", gib, "GiB")
        del plain
        free(setup.device)


def compiled(setup: Setup) -> Rows:
    """Time compiled steps, eager and as graphs, with the time that the first of them takes."""
    prepare_to_compile(setup.device)
    for variant in setup.variants(*VARIANTS):
        yield from guarded(setup, f"{variant.name}, compiled", _compiled_rows(setup, variant))


def _compiled_rows(setup: Setup, variant: Variant) -> Iterator[Row]:
    generator, batch = adapted_generator(setup, variant), setup.pick(4, 2)
    compile_blocks_(generator)
    clips = ListDataset(random_clips(variant, setup.pick(16, 4), setup.pick(DURATION_SEC, 1.0)))
    for way in ("off", "on") if setup.device.type == "cuda" else ("off",):
        run = training_run(setup, generator, clips, batch, way)
        first = setup.bench.seconds(run.train_step)
        seconds, _ = measured(setup, run.train_step)
        name = "compiled, graph" if way == "on" else "compiled"
        yield Row(f"{variant.name}, step, {name}", f"batch {batch}", seconds, "s", note=f"the first one {first:.0f} s")


def sampling(setup: Setup) -> Rows:
    """Time the sampling of one sound, eager and by graphs, what makes its waveform, and the encoders of pictures."""
    for variant in setup.variants(*VARIANTS):
        yield from guarded(setup, f"{variant.name}, sampling", _sampling_rows(setup, variant))
        yield from guarded(setup, f"{variant.name}, vocoder", _decoder_rows(setup, variant))
    yield from guarded(setup, "video encoder and CLIP", _encoder_rows(setup))


def _sampling_rows(setup: Setup, variant: Variant) -> Iterator[Row]:
    count, duration = setup.pick(SAMPLING_STEPS, 4), setup.pick(DURATION_SEC, 1.0)
    generator = filled_generator(variant, setup.device)
    cast_frozen_(generator, setup.bench.dtype)
    set_lengths(generator, variant, duration)
    given = features_of(random_clips(variant, 1, duration), setup.device)
    size = f"{duration:g} s, guided steps: {count}"
    eager = median_of(setup, lambda: sound(setup, generator, given, NO_GRAPHS, count))
    yield Row(f"{variant.name}, sampling, eager", size, eager, "s")
    if setup.device.type == "cuda":
        graphs = sampling_graphs("on", setup.device)
        graph = median_of(setup, lambda: sound(setup, generator, given, graphs, count))
        yield Row(f"{variant.name}, sampling, graph", size, graph, "s", aim=SAMPLING_AIM_SEC.get(variant.name))


def _decoder_rows(setup: Setup, variant: Variant) -> Iterator[Row]:
    duration = setup.pick(DURATION_SEC, 1.0)
    vae = filled(build_vae(variant.vae), setup.device).drop_encoder()
    vocoder = filled(build_vocoder(variant.vocoder), setup.device)
    length = sequence_config(variant.mode, duration).latent_seq_len
    latents = torch.randn(1, length, variant.vae.latent_dim, device=setup.device)
    seconds = median_of(setup, lambda: decode_latents(latents, vae, vocoder))
    yield Row(f"{variant.name}, VAE and vocoder, fp32", f"{duration:g} s", seconds, "s")


def _encoder_rows(setup: Setup) -> Iterator[Row]:
    """Time the two encoders of pictures, in float32 as extraction runs them."""
    (variant,) = setup.variants("small_16k")
    encoder = filled(build_video_encoder(variant.name), setup.device)
    assert isinstance(encoder, TextSynch)
    count, size = setup.pick(200, 24), variant.sync_image_size
    frames = torch.rand(1, count, 3, size, size, device=setup.device) * 2 - 1
    words = torch.randn(1, 6, variant.video_encoder.text_dim, device=setup.device)
    mask = torch.ones(1, 6, dtype=torch.bool, device=setup.device)
    with torch.no_grad():
        seconds = median_of(setup, lambda: encoder.encode(frames, words, mask, segment_batch=8))
        yield Row("video encoder, fp32", f"frames: {count}", seconds, "s")
        clip, count = filled_clip(variant, setup.device), setup.pick(64, 2)
        pixels = torch.rand(count, 3, *2 * [variant.clip_image_size], device=setup.device)
        yield Row("CLIP, fp32", f"frames: {count}", median_of(setup, lambda: clip.encode_image(pixels)), "s")


# -- how it is measured ------------------------------------------------------------------------------------------------


def adapted_generator(setup: Setup, variant: Variant) -> Generator:
    generator = filled_generator(variant, setup.device)
    cast_frozen_(generator, setup.bench.dtype)
    inject_lora(generator, LoRAConfig(rank=RANK, targets=(TARGET,)))
    return generator.to(setup.device).train()


def training_run(
    setup: Setup, generator: Generator, clips: ListDataset, batch: int, cuda_graph: str = "off"
) -> TrainingRun:
    config = TrainConfig(steps=100_000, batch_size=batch, warmup_steps=0)
    graphs = graphed_calls(cuda_graph, setup.device, "training")
    return TrainingRun(generator, clips, clips.subset([]), config, setup.bench.dtype, graphs=graphs)


def measured(setup: Setup, call: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of a call among many, and the peak memory in GiB of all tensors, weights included.

    Without a GPU the memory is the rise during one call.
    """
    device = setup.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(setup.pick(WARM_UPS + 2, 1)):
        call()
    times = []
    for _ in range(setup.pick(ROUNDS, 1)):
        times.append(setup.bench.seconds(lambda: [call() for _ in range(setup.pick(STEPS, 1))]) / setup.pick(STEPS, 1))
    if device.type == "cuda":
        return statistics.median(times), torch.cuda.max_memory_allocated(device) / 2**30
    return statistics.median(times), setup.bench.tensor_rise(call) / 2**10


def median_of(setup: Setup, call: Callable[[], Any]) -> float:
    for _ in range(setup.pick(2, 1)):
        call()
    return statistics.median(setup.bench.seconds(call) for _ in range(setup.pick(5, 1)))


def step_flops(run: TrainingRun) -> int:
    """Return the operations of a step; of an eager run that has met all its clips, as their first step does more."""
    return count_flops(run.train_step)[0]


def rate_note(setup: Setup, batch: int, seconds: float, flops: int) -> str:
    """Return samples per second, and the share of the device's measured rate, of a step."""
    share = flops / seconds / 1e12 / setup.bench.ceilings[setup.bench.dtype]
    return f"{batch / seconds:.3g} samples/s, {share:.0%} of the matmul rate"


def sound(
    setup: Setup, generator: Generator, given: tuple[Tensor, Tensor, Tensor], graphs: SamplingGraphs, count: int
) -> Tensor:
    config = SamplingConfig(num_steps=count)
    return sample_latents(generator, *given, [0], config, precision=setup.bench.dtype, graphs=graphs)
