"""Long sounds: the grids of windows, windows that move together, and no seams where they meet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from selva.flow import SamplingConfig
from selva.inference.long_sampling import WindowGrid, sample_long, window_grid
from selva.models.config import GeneratorConfig
from selva.models.generator import Generator
from selva.sampling import draw_noise, guided_velocity, sample_latents
from selva.sequence import sequence_config
from selva.weights.load import load_generator

STEPS = SamplingConfig(4)


# ---------------------------------------------------------------------------------------------------------------
# grids
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["16k", "44k"])
@pytest.mark.parametrize(("window_sec", "overlap_sec"), [(8.0, 2.0), (8.0, 4.0), (4.0, 0.32), (1.28, 0.64)])
def test_windows_cover_every_frame_and_stay_on_all_grids(mode, window_sec, overlap_sec):
    frames_per_second = {"16k": 31.25, "44k": 44_100 / 1024}[mode]
    for duration in (8.01, 8.32, 9.0, 11.84, 13.37, 20.0, 29.97, 60.0, 61.25):
        grid = window_grid(mode, duration, window_sec, overlap_sec)
        whole, window, last = grid.whole, grid.window, len(grid.segments) - 1
        assert whole == sequence_config(mode, duration) and window_sec - 0.32 < window.duration_sec <= window_sec
        assert grid.segments[0] == grid.latent_starts[0] == 0
        assert grid.latents(last).stop == whole.latent_seq_len
        assert grid.sync_tokens(last).stop == whole.sync_seq_len
        assert grid.clip_frames(last).stop <= whole.clip_seq_len
        for i, segment in enumerate(grid.segments):
            begins = segment * 0.32
            assert abs(grid.latent_starts[i] / frames_per_second - begins) < (0.0233 if i == last else 0.0117)
            assert grid.clip_frames(i).start / 8 <= begins < (grid.clip_frames(i).start + 1) / 8
            if i:
                shared = grid.latents(i - 1).stop - grid.latents(i).start
                assert shared / frames_per_second > overlap_sec - 0.0234
        total = torch.zeros(whole.latent_seq_len)
        for i, weights in enumerate(grid.weights()):
            total[grid.latents(i)] += weights
        torch.testing.assert_close(total, torch.ones_like(total))
        assert grid.weights()[0, 0] == 1 == grid.weights()[-1, -1]  # the ends of the clip are no overlap


def test_at_16_khz_windows_begin_exactly_with_a_latent_frame():
    grid = window_grid("16k", 20.0)
    assert grid.latent_starts == tuple(10 * segment for segment in grid.segments) and len(grid.segments) == 4
    assert (grid.window.latent_seq_len, grid.window.clip_seq_len, grid.window.sync_seq_len) == (245, 62, 184)


def test_weights_fade_smoothly():
    """No step at either end of an overlap, where a hard cut would be."""
    steps = window_grid("16k", 20.0).weights().diff(dim=1).abs()
    assert 0 < steps.max() < 0.03


@pytest.mark.parametrize("duration", [0.64, 5.0, 8.0])
def test_a_clip_that_fits_is_one_window(duration):
    grid = window_grid("44k", duration)
    assert grid == WindowGrid(sequence_config("44k", duration), sequence_config("44k", duration), (0,), (0,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("8k", 9.0), "unknown audio mode"), (("16k", 0.5), "at least 0.64 s"), (("16k", 9.0, 1.0), "window is 1.0 s"),
     (("16k", 9.0, math.inf), "window is inf"), (("16k", 9.0, 8.0, 4.1), "overlap is 4.1 s"),
     (("16k", 9.0, 8.0, 0.1), "overlap is 0.1 s"), (("16k", math.nan), "duration is nan")],
)
def test_grids_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        window_grid(*arguments)


# ---------------------------------------------------------------------------------------------------------------
# a generator whose samples are known
# ---------------------------------------------------------------------------------------------------------------

TURN = 0.3  # radians per latent frame


@dataclass
class Places:
    """Conditions that hold only the start of each row in the clip."""

    first_frame: Tensor

    def cat(self, other: Places) -> Places:
        return Places(torch.cat((self.first_frame, other.first_frame)))


class Rotor(Generator):
    """A generator that samples (cos, sin) of a phase that turns steadily along the clip, from any noise.

    It reads its place in the clip from the sync features, whose tokens are numbers, so it notices windows that are
    given the wrong ones. Every window has its own error of phase and of level, as networks have.
    """

    def __init__(self, phase_error: float = 0.0, level_error: float = 0.0) -> None:
        super().__init__(GeneratorConfig(latent_dim=2, hidden_dim=8, depth=2, fused_depth=1, num_heads=1, clip_dim=1,
                                         sync_dim=1, text_dim=1))
        self.phase_error, self.level_error = phase_error, level_error

    def preprocess_conditions(self, clip_f, sync_f, text_f):
        self._check_tokens("clip features", clip_f, self.clip_seq_len)
        self._check_tokens("sync features", sync_f, self.sync_seq_len)
        segment = (sync_f[:, 0, 0] / 8).round()
        assert torch.equal(clip_f[:, 0, 0], (segment * 2.56).floor())
        assert torch.equal(sync_f[:, -1, 0] - sync_f[:, 0, 0] + 1, torch.full((len(sync_f),), self.sync_seq_len))
        return Places(segment * 10)

    def empty_conditions(self, batch_size, negative_text=None):
        return Places(torch.zeros(batch_size))

    def target(self, first_frame: Tensor) -> Tensor:
        """Return (B, N, 2), the samples of windows that begin there."""
        sign = torch.where((first_frame / 10).round() % 2 == 0, 1.0, -1.0)[:, None]
        phase = TURN * (first_frame[:, None] + torch.arange(self.latent_seq_len)) + sign * self.phase_error
        return torch.stack((phase.cos(), phase.sin()), dim=-1) * (1 + sign * self.level_error)[..., None]

    def predict_flow(self, latent, t, conditions):
        self._check_tokens("latents", latent, self.latent_seq_len)
        return (self.target(conditions.first_frame) - latent) / (1 - t)[:, None, None]

    def unnormalize(self, x):
        return x


def numbered(duration: float, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    whole = sequence_config("16k", duration)
    clip, sync = (torch.arange(float(n))[None, :, None] for n in (whole.clip_seq_len, whole.sync_seq_len))
    return clip.expand(batch, -1, -1), sync.expand(batch, -1, -1), torch.zeros(batch, 77, 1)


ROTOR = SamplingConfig(6, cfg_strength=0.0)
GEOMETRY = dict(mode="16k", duration_sec=15.0, window_sec=4.0, overlap_sec=1.5)


def single_pass(duration: float) -> Tensor:
    generator, whole = Rotor(), sequence_config("16k", duration)
    generator.set_sequence(whole.latent_seq_len, whole.clip_seq_len, whole.sync_seq_len)
    return sample_latents(generator, *numbered(duration), [0], ROTOR)


def hard_concatenation(generator: Rotor, grid: WindowGrid) -> Tensor:
    """Return windows sampled on their own and cut together in the middle of their overlaps."""
    window, features, parts = grid.window, numbered(grid.whole.duration_sec), []
    generator.set_sequence(window.latent_seq_len, window.clip_seq_len, window.sync_seq_len)
    joins = [0, *cuts(grid), grid.whole.latent_seq_len]
    for i in range(len(grid.segments)):
        start = grid.latents(i).start
        part = sample_latents(generator, features[0][:, grid.clip_frames(i)], features[1][:, grid.sync_tokens(i)],
                              features[2], [0], ROTOR)
        parts.append(part[:, joins[i] - start : joins[i + 1] - start])
    return torch.cat(parts, dim=1)


def cuts(grid: WindowGrid) -> list[int]:
    """Return the latent frame in the middle of each overlap."""
    return [(grid.latents(i).start + grid.latents(i - 1).stop) // 2 for i in range(1, len(grid.segments))]


def phase_steps(latents: Tensor) -> Tensor:
    """Return (N - 1,) radians by which the phase turns too far from frame to frame."""
    z = torch.complex(latents[0, :, 0], latents[0, :, 1])
    return (z[1:] / z[:-1] * torch.exp(torch.tensor(-1j * TURN))).angle().abs()


def level_db(latents: Tensor) -> Tensor:
    return 10 * latents[0].square().sum(dim=-1).log10()


def test_windows_that_agree_give_the_single_pass():
    found = sample_long(Rotor(), *numbered(15.0), [0], ROTOR, **GEOMETRY)
    torch.testing.assert_close(found, single_pass(15.0), rtol=0, atol=1e-4)
    assert phase_steps(found).max() < 1e-3


@pytest.mark.parametrize("solver", ["euler", "midpoint", "ab2"])
def test_no_seam_where_windows_disagree(solver):
    """Phase and level around the joins, beside a single pass and beside windows that are cut together.

    Neighbours differ by 0.6 rad and 1.7 dB. Cut together, all of it falls on one frame. Blended, it spreads over the
    overlap of 47 frames, where sin² turns at most pi / 2 / 47 as fast: 0.02 rad and 0.06 dB a frame.
    """
    config = SamplingConfig(6, cfg_strength=0.0, solver=solver)
    generator, grid = Rotor(phase_error=0.3, level_error=0.1), window_grid(**GEOMETRY)
    assert [segment % 2 for segment in grid.segments] == [0, 1, 0, 1, 0, 1]  # neighbours do differ
    blended = sample_long(generator, *numbered(15.0), [0], config, **GEOMETRY)
    hard, single = hard_concatenation(generator, grid), single_pass(15.0)
    assert phase_steps(single).max() < 1e-3 and level_db(single).abs().max() < 0.01

    at = torch.tensor(cuts(grid)) - 1
    assert (phase_steps(hard)[at] > 0.5).all() and (level_db(hard).diff().abs()[at] > 1.5).all()
    assert phase_steps(blended).max() < 0.03 and level_db(blended).diff().abs().max() < 0.1
    around = torch.cat([torch.arange(cut - 30, cut + 30) for cut in cuts(grid)])
    assert level_db(blended)[around].abs().max() < 1.3  # the errors of the windows themselves are 0.9 dB


# ---------------------------------------------------------------------------------------------------------------
# the tiny network
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load_generator("tiny_16k").eval()


def random_features(duration: float, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    whole, rng = sequence_config("16k", duration), torch.Generator().manual_seed(2)
    shapes = ((whole.clip_seq_len, 64), (whole.sync_seq_len, 64), (77, 64))
    return tuple(torch.randn(batch, *shape, generator=rng) / scale for shape, scale in zip(shapes, (8, 1, 8),
                                                                                           strict=True))


@pytest.mark.parametrize("duration", [0.64, 1.7, 2.0])
def test_up_to_a_window_it_is_plain_sampling_bit_for_bit(generator, duration):
    features, whole = random_features(duration, 2), sequence_config("16k", duration)
    found = sample_long(generator, *features, [1, 2], STEPS, mode="16k", duration_sec=duration, window_sec=2.0,
                        overlap_sec=0.5)
    generator.set_sequence(whole.latent_seq_len, whole.clip_seq_len, whole.sync_seq_len)
    assert torch.equal(found, sample_latents(generator, *features, [1, 2], STEPS))


@pytest.mark.parametrize("windows_per_pass", [1, 3, 100])
def test_windows_per_pass_changes_memory_only(generator, windows_per_pass):
    """And the items of a batch do not see each other, each with its own negative prompt."""
    features, negative = random_features(4.5, 2), torch.randn(2, 77, 64) / 8
    settings = dict(mode="16k", duration_sec=4.5, window_sec=2.0, overlap_sec=0.5)
    found = sample_long(generator, *features, [1, 2], STEPS, **settings, negative_text=negative,
                        windows_per_pass=windows_per_pass)
    second = sample_long(generator, *(x[1:] for x in features), [2], STEPS, **settings, negative_text=negative[1:])
    torch.testing.assert_close(found[1:], second, rtol=1e-3, atol=1e-3)
    assert torch.equal(found, sample_long(generator, *features, [1, 2], STEPS, **settings, negative_text=negative,
                                          windows_per_pass=windows_per_pass))


def test_every_step_is_the_weighted_mean_of_the_windows(generator):
    """The Euler loop written out, window after window, on the network itself."""
    clip, sync, text = random_features(4.5, 1)
    settings = dict(mode="16k", duration_sec=4.5, window_sec=2.0, overlap_sec=0.5)
    found = sample_long(generator, clip, sync, text, [3], STEPS, **settings)

    grid = window_grid(**settings)
    x = draw_noise(generator, [3], grid.whole.latent_seq_len)
    lengths, fns = grid.window, []
    generator.set_sequence(lengths.latent_seq_len, lengths.clip_seq_len, lengths.sync_seq_len)
    for i in range(len(grid.segments)):
        conditions = generator.preprocess_conditions(clip[:, grid.clip_frames(i)], sync[:, grid.sync_tokens(i)], text)
        fns.append(guided_velocity(generator, conditions, generator.empty_conditions(1), STEPS.cfg_strength))
    with torch.no_grad():
        for step in range(4):
            moved = torch.zeros_like(x)
            for i, fn in enumerate(fns):
                part = x[:, grid.latents(i)]
                moved[:, grid.latents(i)] += grid.weights()[i, :, None] * (part + fn(torch.tensor(step / 4), part) / 4)
            x = moved
    torch.testing.assert_close(found, generator.unnormalize(x), rtol=1e-3, atol=1e-3)


def test_nothing_given_means_the_learned_nothing(generator):
    text, whole = random_features(4.5, 2)[2], sequence_config("16k", 4.5)
    settings = dict(mode="16k", duration_sec=4.5, window_sec=2.0, overlap_sec=0.5)
    empty = (generator.empty_clip_feat.expand(2, whole.clip_seq_len, -1),
             generator.empty_sync_feat.expand(2, whole.sync_seq_len, -1))
    found = sample_long(generator, None, None, text, [1, 2], STEPS, **settings)
    assert torch.equal(found, sample_long(generator, *empty, text, [1, 2], STEPS, **settings))


def test_lengths_steps_and_errors(generator):
    clip, sync, text = random_features(4.5, 1)
    settings = dict(mode="16k", duration_sec=4.5, window_sec=2.0, overlap_sec=0.5)
    generator.set_sequence(100, 25, 80)
    done = []
    assert sample_long(generator, clip, sync, text, [1], STEPS, **settings, on_step=done.append).shape == (1, 141, 20)
    assert done == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"sync features have 96 tokens, expected 104 for 4\.5 s"):
        sample_long(generator, clip, sync[:, 8:], text, [1], STEPS, **settings)
    with pytest.raises(ValueError, match=r"clip features have 35 tokens, expected 36 for 4\.5 s"):
        sample_long(generator, clip[:, 1:], sync, text, [1], STEPS, **settings)
    with pytest.raises(ValueError, match=r"for \[1, 1, 1\] of the seeds, expected 2, one per seed"):
        sample_long(generator, clip, sync, text, [1, 2], STEPS, **settings)
    with pytest.raises(ValueError, match="windows_per_pass is 0"):
        sample_long(generator, clip, sync, text, [1], STEPS, **settings, windows_per_pass=0)
    assert (generator.latent_seq_len, generator.clip_seq_len, generator.sync_seq_len) == (100, 25, 80)
