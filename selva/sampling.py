"""Sampling: conditions and noise -> latents (guided solver steps) -> mel -> waveform.

The state and the time stay in float32 whatever the network runs in; noise is drawn on the CPU, so one seed means one
sound on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from selva import flow
from selva.flow import WHOLE_INTERVAL, Interval, SamplingConfig, within
from selva.models.generator import Conditions, Generator
from selva.models.mel_inversion import MelInversion
from selva.models.vae import VAE
from selva.models.vocoder import Vocoder
from selva.sequence import SAMPLING_RATES
from selva.utils.errors import UserError
from selva.utils.graph import GraphedCalls, graphed_calls


class SamplingGraphs:
    """Graphs of a network pass, one for each shape and kind, kept from sound to sound; see :mod:`selva.utils.graph`.

    Args:
        calls: that are recorded; None: every kernel is started anew.
    """

    def __init__(self, calls: GraphedCalls | None = None) -> None:
        self.calls = calls
        self._addresses: tuple[int, ...] = ()

    def clear(self) -> None:
        """Let go of all graphs and their memory."""
        if self.calls is not None:
            self.calls.clear()

    def use(self, generator: Generator) -> None:
        """Prepare for a generator; if any of its weights lies elsewhere than before, all graphs are made anew."""
        if self.calls is None:
            return
        addresses = tuple(parameter.data_ptr() for parameter in generator.parameters())
        if addresses != self._addresses:
            self.clear()
            self._addresses = addresses

    def __call__(
        self, generator: Generator, kind: Hashable, function: Callable[..., Tensor], *arguments: Any
    ) -> Tensor:
        """Return ``function(*arguments)``, a pass of the generator at the lengths it is set to."""
        if self.calls is None:
            return function(*arguments)
        device = generator.latent_mean.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def alone(*arguments: Any) -> tuple[Tensor, ...]:
            # A weight that autocast has converted before, and keeps, would be gone when the graph is used again.
            with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
                return (function(*arguments),)

        lengths = generator.latent_seq_len, generator.clip_seq_len, generator.sync_seq_len
        return self.calls((kind, lengths, enabled, dtype), alone, *arguments, keep=generator.tables)[0]


def sampling_graphs(choice: str, device: torch.device) -> SamplingGraphs:
    """Return graphs for the passes of sampling on a device, where :func:`graphed_calls` chooses to have any.

    Raises:
        ValueError: ``choice`` is "on", and the device has no CUDA graphs.
    """
    return SamplingGraphs(graphed_calls(choice, device, "sampling"))


NO_GRAPHS = SamplingGraphs()


class TimedWeights(Protocol):
    """Weights that differ between times: those of a generator with its adapters, and without them."""

    times: tuple[float, float]

    def use(self, active: bool) -> None:
        """Put the weights of the times inside the interval in place, or those of the times outside."""
        ...


def timed_velocity(timed: TimedWeights | None, make: Callable[[], flow.Velocity]) -> flow.Velocity:
    """Return ``fn(t, x)`` that runs with the weights of its time; that of ``make`` where ``timed`` is None.

    Args:
        make: returns the velocity for the weights that are in place, conditions included, which may depend on them.
    """
    if timed is None:
        return make()
    timed.use(False)
    outside = make()
    timed.use(True)
    inside = make()
    times = timed.times

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        active = within(t.item(), times)
        timed.use(active)
        return (inside if active else outside)(t, x)

    return velocity


@contextmanager
def restored(timed: TimedWeights | None) -> Iterator[None]:
    """Put the weights of inside the interval back at the end, whatever happens."""
    try:
        yield
    finally:
        if timed is not None:
            timed.use(True)


def guided_velocity(
    generator: Generator,
    conditions: Conditions,
    empty: Conditions,
    cfg_strength: float,
    cfg_interval: tuple[float, float] = WHOLE_INTERVAL,
    graphs: SamplingGraphs = NO_GRAPHS,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``fn(t, x)``, the guided velocity (B, N, C) in float32 at the scalar time ``t``, which is on the CPU.

    Both branches run in one batched pass. Below a strength of 1, and at times outside ``cfg_interval``, only the
    conditional one is evaluated; the former is what MMAudio does.

    Args:
        graphs: record these passes.
    """
    graphs.use(generator)

    def one_pass(times: Tensor, x: Tensor, conditions: Conditions) -> Tensor:
        return generator.predict_flow(x, times, conditions).float()

    def two_passes(times: Tensor, x: Tensor, both: Conditions) -> Tensor:
        v_cond, v_uncond = one_pass(times, x.repeat(2, 1, 1), both).chunk(2)
        return flow.guided(v_cond, v_uncond, cfg_strength)

    def conditional(t: Tensor, x: Tensor) -> Tensor:
        return graphs(generator, "conditional", one_pass, _times(t, x.shape[0], x.device), x, conditions)

    if cfg_strength < 1.0:
        return conditional

    both = conditions.cat(empty)

    def guided(t: Tensor, x: Tensor) -> Tensor:
        times = _times(t, 2 * x.shape[0], x.device)
        return graphs(generator, ("guided", cfg_strength), two_passes, times, x, both)

    if cfg_interval == WHOLE_INTERVAL:
        return guided
    return lambda t, x: (guided if within(t.item(), cfg_interval) else conditional)(t, x)


def switching_times(config: SamplingConfig, timed: TimedWeights | None) -> list[Interval]:
    """Return the intervals of time in and out of which the velocity is another one: of guidance, and of an adapter."""
    return [config.cfg_interval, *([timed.times] if timed is not None else [])]


def _times(t: Tensor, count: int, device: torch.device) -> Tensor:
    """Return (count,) float32, a time of the CPU on a device; it travels with the kernel, without a copy."""
    return torch.full((count,), t.item(), dtype=torch.float32, device=device)


def draw_noise(generator: Generator, seeds: Sequence[int], num_frames: int | None = None) -> Tensor:
    """Return (len(seeds), N, C) float32 CPU noise; every item depends on its own seed only, not on its batch.

    N is ``num_frames``, or the latent length that the generator is set to.
    """
    shape = (num_frames or generator.latent_seq_len, generator.config.latent_dim)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample_latents(
    generator: Generator,
    clip_f: Tensor,
    sync_f: Tensor,
    text_f: Tensor,
    seeds: Sequence[int],
    config: SamplingConfig | None = None,
    *,
    negative_text: Tensor | None = None,
    precision: torch.dtype = torch.float32,
    on_step: Callable[[int], None] | None = None,
    graphs: SamplingGraphs = NO_GRAPHS,
    timed: TimedWeights | None = None,
) -> Tensor:
    """Return (B, N, C) float32 latents as the VAE decodes them.

    Args:
        clip_f, sync_f, text_f: (B, T, ·), (B, S, ·), (B, 77, ·) features on the generator's device.
        seeds: one seed per item.
        negative_text: (1 or B, 77, text_dim) text features to guide away from; None is the empty text.
        precision: autocast dtype of the network; the state, the time and the guidance are float32.
        on_step: called with the number of steps done.
        graphs: record the passes of the network, and use the graphs of earlier sounds; not with ``timed``.
        timed: exchanges the generator's weights on the way; those of inside its interval are in place in the end.
    """
    config = config or SamplingConfig()
    device = clip_f.device
    noise = draw_noise(generator, seeds).to(device)
    with generator.computing_in(precision):
        graphs = NO_GRAPHS if timed is not None else graphs  # a graph would go on reading the weights of its making

        def make() -> flow.Velocity:
            conditions = generator.preprocess_conditions(clip_f, sync_f, text_f)
            empty = generator.empty_conditions(len(seeds), negative_text)
            return guided_velocity(generator, conditions, empty, config.cfg_strength, config.cfg_interval,
                                   graphs)

        with restored(timed):
            velocity = timed_velocity(timed, make)
            latents = flow.solve(velocity, noise, config, on_step, switching_times(config, timed))
    return generator.unnormalize(latents)


@torch.no_grad()
def decode_latents(
    latents: Tensor, vae: VAE, vocoder: Vocoder | MelInversion, chunk_sec: float | None = None
) -> Tensor:
    """Return (B, samples) float32 waveforms in [-1, 1] from latents (B, N, C): VAE decoder, then vocoder.

    Both run in the dtype of their own weights.

    Args:
        chunk_sec: the vocoder makes at most so many seconds at once, which bounds the memory for long sounds. Every
            chunk is given the mel frames around it that it depends on, so the result is the whole's but for rounding.
            None: all at once. The VAE, whose attention sees the whole length, always runs at once; it takes little.

    Raises:
        ValueError: ``chunk_sec`` is not positive.
    """
    if chunk_sec is not None and not chunk_sec > 0:
        raise UserError(f"chunk_sec is {chunk_sec}, expected more than 0")
    mel = vae.decode(latents.mT.to(next(vae.parameters()).dtype))  # (B, n_mels, 2N)
    mel = mel.to(next(vocoder.parameters()).dtype)
    if chunk_sec is None:
        return vocoder(mel)[:, 0].float()  # (B, samples)
    frames = max(1, round(chunk_sec * SAMPLING_RATES[vae.config.mode] / vocoder.config.hop_length))
    return vocoder.in_chunks(mel, frames)[:, 0].float()
