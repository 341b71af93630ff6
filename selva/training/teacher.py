"""Prior preservation by a teacher: the base model itself says in every step what it would do for other prompts.

In place of sounds that are made before the training (:mod:`selva.training.prior_preservation`), a part of each batch is
taken on the way from noise to a sound that the base model is just making, and the adapted model is taught the velocity
that the base model has there (distillation as in Learning without Forgetting, arXiv:1606.09282). That velocity also
moves the sound on, by an Euler step: the teacher's answers are the steps of its own sampling. So nothing is sampled
before the training, the points are where the base model really goes, and the targets have no noise: as long as the
adapter changes nothing, they teach nothing.

    lesson n:  points x, times t, conditions --frozen model--> velocity = target;  x + dt velocity -> lesson n + 1

What a lesson is depends on its number, the seed and the base model only; after a restart the few steps that lead to it
are repeated.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selva.data.dataset import ClipDataset, Lengths
from selva.lora.layers import base_only
from selva.models.generator import Generator
from selva.training.config import TrainConfig
from selva.training.prior_preservation import prompt_shares, turns
from selva.utils.distributed import World
from selva.utils.text import counted

log = logging.getLogger(__name__)

ROUNDS = 20  # through all prompts until the turns of the prompts repeat, where some come more often than others
PHASES = 16  # lessons that one sound gives, from noise on; its Euler steps are one less


@dataclass(frozen=True)
class Lesson:
    """Points between noise and sounds of the base model, and where it goes from there; on its device.

    Attributes:
        latent: (R, N, C) normalised. t: (R,). velocity: (R, N, C) float32 of the base model.
        clip_f: (R, T, clip_dim). sync_f: (R, S, sync_dim). text_f: (R, 77, text_dim); the empty ones where dropped.
        lengths: (N, T, S).
    """

    latent: Tensor
    t: Tensor
    velocity: Tensor
    clip_f: Tensor
    sync_f: Tensor
    text_f: Tensor
    lengths: Lengths


@dataclass
class _Sound:
    """A sound in the making: the number of its first lesson, the size of its first step, and its conditions."""

    first: int
    jitter: float
    features: tuple[Tensor, Tensor, Tensor]
    latent: Tensor  # (N, C)

    def time(self, number: int) -> float:
        """Return t at a lesson: 0 at the first, then in even steps from a time that differs between sounds."""
        phase = number - self.first
        return 0.0 if phase == 0 else (phase - 1 + self.jitter) / (PHASES - 1)


class Teacher:
    """The base model under an adapter, and the sounds that it is making.

    Args:
        generator: with its adapter, on its device.
        clips: training clips, which lend their sync and CLIP features; those of the most frequent length.
        prompts: (P, 77, text_dim) features of the prompts to keep, taken in turn. near: share of the sounds for those
            that are most similar to the prompts of the clips.
        rows: lessons of this process in every batch, see :func:`num_lessons`.
        config: its seed; how often conditions are dropped; whether CLIP features are used.
        precision: autocast dtype of the network.
    """

    def __init__(
        self, generator: Generator, clips: ClipDataset, prompts: Tensor, rows: int, config: TrainConfig,
        precision: torch.dtype, world: World, near: float = 0.0,
    ) -> None:
        self.generator, self.clips, self.prompts, self.rows = generator, clips, prompts.float().cpu(), rows
        self.config, self.precision, self.world = config, precision, world
        lengths = [clips.lengths(index) for index in range(len(clips))]
        self.lengths = max(dict.fromkeys(lengths), key=lengths.count)
        self.lenders = [index for index, own in enumerate(lengths) if own == self.lengths]
        self.turns = turns(prompt_shares(prompts, clips, near), len(prompts) * (ROUNDS if near else 1))
        self._sounds: list[_Sound] = []
        self._number = -1  # of the lesson that the sounds stand at

    def lesson(self, number: int) -> Lesson:
        """Return lesson ``number``, counted from 0; that after the last one takes one pass of the base model."""
        if number != self._number:
            self._sounds = []
            for earlier in range(max(0, number - PHASES + 1), number):
                self._next(earlier)
        return self._next(number)

    @torch.no_grad()
    def _next(self, number: int) -> Lesson:
        if not self._sounds:
            self._sounds = [self._begun(row, number) for row in range(self.rows)]
        for row in range(self.rows):
            if (number + self._delay(row)) % PHASES == 0:
                self._sounds[row] = self._begun(row, number)
        sounds, device, generator = self._sounds, self.generator.latent_mean.device, self.generator
        generator.set_sequence(*self.lengths)
        latent = torch.stack([sound.latent for sound in sounds])
        times = torch.tensor([sound.time(number) for sound in sounds])
        clip_f, sync_f, text_f = (torch.stack([sound.features[i] for sound in sounds]) for i in range(3))
        with base_only(generator), generator.computing_in(self.precision):
            conditions = generator.preprocess_conditions(clip_f, sync_f, text_f)
            velocity = generator.predict_flow(latent, times.to(device), conditions).float()
        for sound, own in zip(sounds, velocity, strict=True):
            sound.latent = sound.latent + (sound.time(number + 1) - sound.time(number)) * own
        self._number = number + 1
        return Lesson(latent, times.to(device), velocity, clip_f, sync_f, text_f, self.lengths)

    def _delay(self, row: int) -> int:
        """Return by how many lessons a row is ahead of the first one, so that a batch has early and late times."""
        total = self.rows * self.world.size
        return (self._global(row) * PHASES) // total

    def _global(self, row: int) -> int:
        return self.world.rank * self.rows + row

    def _begun(self, row: int, number: int) -> _Sound:
        """Return the noise and the conditions of the sound of a row that has its first lesson at ``number``."""
        config, device, generator = self.config, self.generator.latent_mean.device, self.generator
        # The sound of a row that is under way at a lesson has the same name wherever the repetition began.
        which, row = (number + self._delay(row)) // PHASES, self._global(row)
        asked = which * self.rows * self.world.size + row
        rng = torch.Generator().manual_seed(zlib.crc32(f"lesson {config.seed} {row} {which}".encode()))
        noise = torch.randn(self.lengths[0], generator.config.latent_dim, generator=rng)
        jitter, drop_video, drop_text, lender = torch.rand(4, generator=rng).tolist()
        clip = self.clips.clip(self.lenders[int(lender * len(self.lenders))])
        generator.set_sequence(*self.lengths)
        empty_clip, empty_sync, empty_text = (x[0].detach() for x in generator.empty_features(1))
        seen = clip.has_video and drop_video >= config.null_prob
        # As with sounds that are made before: every other one has the looks of a clip, not always for the same prompt.
        cycle, place = divmod(asked, len(self.turns))
        turn = self.turns[place]
        looks = seen and config.clip_features == "use" and turn.has_looks ^ bool(cycle % 2)
        text = self.prompts[turn.prompt].to(device) if drop_text >= config.null_prob else empty_text
        clip_f, sync_f = clip.clip_f.to(device) if looks else empty_clip, clip.sync_f.to(device) if seen else empty_sync
        return _Sound(number, jitter, (clip_f, sync_f, text), noise.to(device))


def lesson_loss(generator: Generator, lesson: Lesson, precision: torch.dtype) -> Tensor:
    """Return the (R,) mean squared errors of the adapted model's velocities, in float32."""
    generator.set_sequence(*lesson.lengths)
    with generator.computing_in(precision):
        conditions = generator.preprocess_conditions(lesson.clip_f, lesson.sync_f, lesson.text_f)
        velocity = generator.predict_flow(lesson.latent, lesson.t, conditions)
    return (velocity.float() - lesson.velocity).square().mean(dim=(1, 2))


def num_lessons(batch_size: int, share: float) -> int:
    """Return the number of lessons in a batch of at least two: its share, one at least, and not all."""
    return min(batch_size - 1, max(1, round(batch_size * share)))


def teacher_for(
    generator: Generator, clips: ClipDataset, prompts: Sequence[str], text_features: Tensor, share: float,
    near: float, config: TrainConfig, precision: torch.dtype, world: World,
) -> Teacher:
    """Return the teacher of a run, and say in the log what a batch will be made of."""
    rows = num_lessons(config.batch_size, share)
    log.info("lessons by the base model in every batch of %d: %d, for %s (%.0f %%, --preserve_share %g)",
             config.batch_size, rows, counted(len(prompts), "prompt"), 100 * rows / config.batch_size, share)
    return Teacher(generator, clips, text_features, rows, config, precision, world, near)
