"""Sampling of sounds longer than a model was trained on: overlapping windows that move together.

    features of the whole clip -> windows -> velocity of each window -> blended by smooth ramps -> one step of the whole

There is one state for the whole length. At every evaluation each window sees its part of it, and where windows overlap
their velocities are averaged with weights that fade from one to the other. So the windows agree at every step, and
there is no seam to hide at the end. (The averaging is that of MultiDiffusion, arXiv:2302.08113, along time.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from selva import flow
from selva.flow import SamplingConfig
from selva.models.generator import Generator
from selva.sampling import (
    NO_GRAPHS,
    SamplingGraphs,
    TimedWeights,
    draw_noise,
    guided_velocity,
    restored,
    sample_latents,
    switching_times,
    timed_velocity,
)
from selva.sequence import (
    DEFAULT_DURATION_SEC,
    LATENT_DOWNSAMPLE,
    SYNC_TOKENS_PER_SEGMENT,
    WINDOW_STEP_SEC,
    SequenceConfig,
    first_clip_frame,
    sequence_config,
)
from selva.utils.errors import UserError
from selva.utils.text import counted

DEFAULT_OVERLAP_SEC = 2.0
DEFAULT_WINDOWS_PER_PASS = 4
SHORTEST_WINDOW_SEC = 4 * WINDOW_STEP_SEC  # half of it overlaps, and there is still a step to take


@dataclass(frozen=True)
class WindowGrid:
    """Positions of the windows of a long clip.

    All windows have the same lengths, begin with a sync segment, and together cover every latent frame.

    Attributes:
        whole: lengths of the clip. window: lengths of every window.
        segments: the sync segment with which each window begins, 0.32 s apart.
        latent_starts: the latent frame with which each window begins.
    """

    whole: SequenceConfig
    window: SequenceConfig
    segments: tuple[int, ...]
    latent_starts: tuple[int, ...]

    def latents(self, index: int) -> slice:
        """Return the latent frames of a window."""
        start = self.latent_starts[index]
        return slice(start, start + self.window.latent_seq_len)

    def clip_frames(self, index: int) -> slice:
        """Return the CLIP frames of a window; the first is the one on show when it begins."""
        start = first_clip_frame(self.segments[index])
        return slice(start, start + self.window.clip_seq_len)

    def sync_tokens(self, index: int) -> slice:
        """Return the sync tokens of a window."""
        start = self.segments[index] * SYNC_TOKENS_PER_SEGMENT
        return slice(start, start + self.window.sync_seq_len)

    def weights(self) -> Tensor:
        """Return (windows, n) float32 weights of each window's frames, which add up to 1 at every frame of the clip.

        Over the overlap of two neighbours they follow sin² and cos², elsewhere they are 1.
        """
        n, starts = self.window.latent_seq_len, self.latent_starts
        weights = torch.ones(len(starts), n, dtype=torch.float64)
        for i, (start, following) in enumerate(pairwise(starts)):
            overlap = start + n - following
            rise = torch.sin(math.pi / 2 * (torch.arange(overlap, dtype=torch.float64) + 0.5) / overlap).square()
            weights[i, n - overlap :] *= rise.flip(0)
            weights[i + 1, :overlap] *= rise
        total = torch.zeros(self.whole.latent_seq_len, dtype=torch.float64)
        for i in range(len(starts)):
            total[self.latents(i)] += weights[i]  # other than 1 only where three windows meet
        return torch.stack([weights[i] / total[self.latents(i)] for i in range(len(starts))]).float()


def window_grid(
    mode: str,
    duration_sec: float,
    window_sec: float = DEFAULT_DURATION_SEC,
    overlap_sec: float = DEFAULT_OVERLAP_SEC,
) -> WindowGrid:
    """Return the windows for a clip of ``duration_sec``; one of that length if it is not longer than ``window_sec``.

    A window begins with a sync segment and the last one ends with the clip, so windows are up to 0.32 s shorter than
    ``window_sec``. They are spread evenly; neighbours overlap by ``overlap_sec`` or a little more.

    At 16 kHz every sync segment begins with a latent frame. At 44.1 kHz the nearest one is taken, at most 12 ms away
    (23 ms for the last window, which ends with the clip); a sync token is 40 ms.

    Raises:
        ValueError: unknown mode, a duration below 0.64 s, a window below 1.28 s, or an overlap that is shorter than
            0.32 s or longer than half a window.
    """
    whole = sequence_config(mode, duration_sec)
    if not SHORTEST_WINDOW_SEC <= window_sec < math.inf:
        raise UserError(f"window is {window_sec} s, expected at least {SHORTEST_WINDOW_SEC:g} s")
    if not WINDOW_STEP_SEC <= overlap_sec <= window_sec / 2:
        raise UserError(f"overlap is {overlap_sec} s, expected {WINDOW_STEP_SEC:g} s to half a window, "
                         f"{window_sec / 2:g} s")
    if duration_sec <= window_sec:
        return WindowGrid(whole, whole, (0,), (0,))
    last = math.ceil((duration_sec - window_sec) / WINDOW_STEP_SEC - 1e-6)
    window = sequence_config(mode, round(duration_sec - last * WINDOW_STEP_SEC, 6))
    furthest = math.floor((window.duration_sec - overlap_sec) / WINDOW_STEP_SEC + 1e-6)
    steps = math.ceil(last / furthest)
    segments = tuple(round(i * last / steps) for i in range(steps + 1))
    frames_per_segment = WINDOW_STEP_SEC * whole.sampling_rate / (whole.hop_length * LATENT_DOWNSAMPLE)
    starts = [round(segment * frames_per_segment) for segment in segments[:-1]]
    return WindowGrid(whole, window, segments, (*starts, whole.latent_seq_len - window.latent_seq_len))


@contextmanager
def _set_to(generator: Generator, sequence: SequenceConfig) -> Iterator[None]:
    """Set the generator's lengths to those of ``sequence`` for a while."""
    before = generator.latent_seq_len, generator.clip_seq_len, generator.sync_seq_len
    generator.set_sequence(sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len)
    try:
        yield
    finally:
        generator.set_sequence(*before)


@torch.no_grad()
def sample_long(
    generator: Generator,
    clip_f: Tensor | None,
    sync_f: Tensor | None,
    text_f: Tensor,
    seeds: Sequence[int],
    config: SamplingConfig | None = None,
    *,
    mode: str,
    duration_sec: float,
    window_sec: float = DEFAULT_DURATION_SEC,
    overlap_sec: float = DEFAULT_OVERLAP_SEC,
    windows_per_pass: int = DEFAULT_WINDOWS_PER_PASS,
    negative_text: Tensor | None = None,
    precision: torch.dtype = torch.float32,
    on_step: Callable[[int], None] | None = None,
    graphs: SamplingGraphs = NO_GRAPHS,
    timed: TimedWeights | None = None,
) -> Tensor:
    """Return (B, N, C) float32 latents of any duration, as the VAE decodes them.

    The generator need not be set to any length; it is left set to what it was. Up to ``window_sec`` the result is that
    of :func:`selva.sampling.sample_latents`, bit for bit.

    Args:
        clip_f, sync_f: (B, T, ·), (B, S, ·) features of the whole clip, the lengths that
            ``sequence_config(mode, duration_sec)`` gives, on the generator's device. None: the learned empty features.
        text_f: (B, 77, ·) text features, the same for all windows.
        seeds: one seed per item. The noise belongs to the place in the clip, whatever the windows are.
        mode: "16k" or "44k". window_sec, overlap_sec: see :func:`window_grid`.
        windows_per_pass: windows, times items, that go through the network at once; more take more memory.
        negative_text, precision, on_step, graphs, timed: as for sample_latents.

    Raises:
        ValueError: features of other lengths or not one per seed, or see :func:`window_grid`.
    """
    config = config or SamplingConfig()
    if windows_per_pass < 1:
        raise UserError(f"windows_per_pass is {windows_per_pass}, expected at least 1")
    grid = window_grid(mode, duration_sec, window_sec, overlap_sec)
    with _set_to(generator, grid.whole):
        empty_clip, empty_sync, _ = generator.empty_features(len(seeds))
    clip_f, sync_f = empty_clip if clip_f is None else clip_f, empty_sync if sync_f is None else sync_f
    _check_features(grid.whole, clip_f, sync_f, text_f, len(seeds))
    if len(grid.segments) == 1:
        with _set_to(generator, grid.whole):
            return sample_latents(generator, clip_f, sync_f, text_f, seeds, config, negative_text=negative_text,
                                  precision=precision, on_step=on_step, graphs=graphs,
                                  timed=timed)
    device = text_f.device
    noise = draw_noise(generator, seeds, grid.whole.latent_seq_len).to(device)
    with _set_to(generator, grid.window), generator.computing_in(precision):
        graphs = NO_GRAPHS if timed is not None else graphs  # a graph would go on reading the weights of its making

        def make() -> flow.Velocity:
            passes = _window_passes(
                generator, grid, clip_f, sync_f, text_f, negative_text, config, windows_per_pass, graphs)
            return blended_velocity(passes, grid, device)

        with restored(timed):
            velocity = timed_velocity(timed, make)
            latents = flow.solve(velocity, noise, config, on_step, switching_times(config, timed))
    return generator.unnormalize(latents)


def _check_features(whole: SequenceConfig, clip_f: Tensor, sync_f: Tensor, text_f: Tensor, num_items: int) -> None:
    batches = [len(clip_f), len(sync_f), len(text_f)]
    if batches != [num_items] * 3:
        raise UserError(f"clip, sync and text features are for {batches} of the seeds, expected {num_items}, one per "
                        "seed")
    for what, features, expected in (
        ("clip features", clip_f, whole.clip_seq_len), ("sync features", sync_f, whole.sync_seq_len)
    ):
        if features.shape[1] != expected:
            raise UserError(f"{what} have {counted(features.shape[1], 'token')}, expected {expected} "
                             f"for {whole.duration_sec:g} s")


@dataclass(frozen=True)
class WindowPass:
    """Windows that go through the network together.

    Attributes:
        places: (item, window) of every row. velocity: ``fn(t, x)`` for x (rows, n, C).
    """

    places: tuple[tuple[int, int], ...]
    velocity: flow.Velocity


def _window_passes(
    generator: Generator, grid: WindowGrid, clip_f: Tensor, sync_f: Tensor, text_f: Tensor,
    negative_text: Tensor | None, config: SamplingConfig, windows_per_pass: int,
    graphs: SamplingGraphs,
) -> list[WindowPass]:
    """Return the passes, with the conditions of every window projected once for all steps."""
    places = [(item, window) for item in range(len(text_f)) for window in range(len(grid.segments))]
    passes = []
    for first in range(0, len(places), windows_per_pass):
        rows = tuple(places[first : first + windows_per_pass])
        items = [item for item, _ in rows]
        conditions = generator.preprocess_conditions(
            torch.stack([clip_f[item, grid.clip_frames(window)] for item, window in rows]),
            torch.stack([sync_f[item, grid.sync_tokens(window)] for item, window in rows]),
            text_f[items],
        )
        negative = negative_text
        if negative is not None and len(negative) > 1:  # one for each item
            negative = negative[items]
        empty = generator.empty_conditions(len(rows), negative)
        fn = guided_velocity(generator, conditions, empty, config.cfg_strength, config.cfg_interval, graphs)
        passes.append(WindowPass(rows, fn))
    return passes


def blended_velocity(passes: Sequence[WindowPass], grid: WindowGrid, device: torch.device) -> flow.Velocity:
    """Return ``fn(t, x)``, the velocity (B, N, C) of the whole clip, averaged over the windows that cover a frame."""
    weights = grid.weights()[:, :, None].to(device)  # (windows, n, 1)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for part in passes:
            rows = part.velocity(t, torch.stack([x[item, grid.latents(window)] for item, window in part.places]))
            for (item, window), row in zip(part.places, rows, strict=True):
                total[item, grid.latents(window)] += weights[window] * row
        return total

    return velocity
