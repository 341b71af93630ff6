"""Prior preservation: a model keeps what it knows, as its own sounds are mixed into the training clips.

A few dozen clips of one sound teach a model that everything sounds like that. Beside them it is therefore trained on
what it makes itself, before any training, for prompts of sounds that shall stay (as DreamBooth keeps a class,
arXiv:2208.12242). They are sampled without guidance: on a model's own samples the flow matching loss has its minimum
where nothing changes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selva.data.dataset import ClipDataset, ConcatDataset, Lengths, ListDataset, TrainingClip, collate
from selva.flow import SamplingConfig
from selva.models import winograd_conv
from selva.models.generator import Generator
from selva.sampling import sample_latents
from selva.utils.errors import UserError
from selva.utils.progress import Progress

log = logging.getLogger(__name__)

# Without guidance the way from noise is so smooth that 12 steps of ab2 come nearer to its end than 25 of Euler (-40 dB
# off instead of -29 dB, on tiny_16k; benchmarks/few_steps.py --unguided).
UNGUIDED = SamplingConfig(num_steps=12, cfg_strength=0.0, solver="ab2")
EARLIER_UNGUIDED = SamplingConfig(num_steps=25, cfg_strength=0.0)  # of runs whose adapters do not say how
SOUNDS_PER_PROMPT = 2  # in the mean, one at the least; if there are fewer clips, an epoch uses each several times
MOST_SOUNDS = 200  # kept in memory, about 1 MB each; a larger share of a large set uses each of them more than once
MOST_CLIPS = 1000  # whose prompts are compared with those to preserve
# Latent frames that go through the generator at once: 8 sounds of 8 s at 16 kHz, 5 at 44.1 kHz; longer ones one by one.
# More are hardly faster on a CPU. It is no setting, so that the sounds of a run depend on nothing but its seed.
FRAMES_AT_ONCE = 2048


def mixture(num_clips: int, num_prompts: int, share: float) -> tuple[int, int]:
    """Return (uses of each clip, preserved sounds) in an epoch; the preserved sounds are ``share`` of all.

    Raises:
        ValueError: ``share`` is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise UserError(f"preserve_share is {share}, expected more than 0 and less than 1")
    per_repeat = num_clips * share / (1 - share)
    repeats = max(1, math.ceil(SOUNDS_PER_PROMPT * num_prompts / per_repeat))
    return repeats, round(repeats * per_repeat)


@dataclass(frozen=True)
class Turn:
    """The ``time``-th sound, from 0, of a prompt, by its number."""

    prompt: int
    time: int

    @property
    def has_looks(self) -> bool:
        """True for every other of the sounds that are made for prompts in turn, and of those of every prompt."""
        return (self.prompt + self.time) % 2 == 1


def turns(shares: Sequence[float], count: int) -> list[Turn]:
    """Return the prompts of ``count`` sounds: each prompt once, then so that all come as near their shares as can be.

    Args:
        shares: of the prompts, 1 in all. If they are equal, the prompts are taken in turn.
    """
    used, order = [0] * len(shares), []
    for number in range(count):
        if number < len(shares):
            which = number
        else:
            which = max(range(len(shares)), key=lambda i: (number + 1) * shares[i] - used[i])
        order.append(Turn(which, used[which]))
        used[which] += 1
    return order


def num_nearest(num_prompts: int) -> int:
    """Return the size of a quarter of the prompts, at least one."""
    return max(1, round(num_prompts / 4))


def prompt_shares(text_features: Tensor, clips: ClipDataset, near: float) -> list[float]:
    """Return the share of every prompt in the preserved sounds: ``near`` of all goes to the nearest quarter beside.

    The nearest are those whose text features, as means over their tokens, are closest to those of any training clip.
    What is taught for a prompt reaches the ones beside it, so their sounds are the first to be lost.

    Args:
        text_features: (P, 77, text_dim). near: 0 to 1.
    """
    count = len(text_features)
    if near == 0:
        return [1 / count] * count
    step = max(1, len(clips) // MOST_CLIPS)
    means = text_features.float().cpu().mean(dim=1)
    own = torch.stack([clips.prompt(index, number)[1].float().cpu().mean(dim=0)
                       for index in range(0, len(clips), step) for number in range(clips.num_prompts(index))])
    nearest = torch.cdist(means, own).min(dim=1).values.argsort(stable=True)[: num_nearest(count)]
    shares = torch.full((count,), (1 - near) / count, dtype=torch.float64)
    shares[nearest] += near / len(nearest)
    return shares.tolist()


def with_preserved(
    generator: Generator,
    clips: ClipDataset,
    prompts: Sequence[str],
    text_features: Tensor,
    share: float,
    *,
    seed: int,
    precision: torch.dtype,
    use_clip_features: bool = True,
    near: float = 0.0,
    sampling: SamplingConfig = UNGUIDED,
) -> ClipDataset:
    """Return the clips, and sounds that the generator makes for ``prompts`` as ``share`` of all.

    There are at least :data:`SOUNDS_PER_PROMPT` for every prompt in the mean; a small set of clips is repeated to keep
    the share. Each sound borrows the sync features of one of the clips, with the prompts in turn, so that something
    happens in it at certain moments, and every other sound the clip's CLIP features. If no sound had CLIP features, the
    model would learn that they always mean the new sound; if all had them, it would learn to ignore them. Depends on
    nothing but the arguments.

    Args:
        generator: the base model, on its device; without an adapter, or with one that has not learned anything.
        text_features: (prompts, 77, text_dim).
        seed: of the noise. precision: autocast dtype of the network.
        use_clip_features: the training passes CLIP features; if not, no sound is made with them either.
        near: share of the sounds for the prompts that are most similar to those of the clips.
        sampling: how the sounds are made.

    Raises:
        ValueError: ``share`` is not between 0 and 1.
    """
    repeats, wanted = mixture(len(clips), len(prompts), share)
    shift_after = math.lcm(len(clips), len(prompts))  # then each prompt meets other clips than before
    count = min(wanted, max(MOST_SOUNDS, len(prompts)))
    sources = [(number + number // shift_after) % len(clips) for number in range(count)]  # the clip of each sound
    order = turns(prompt_shares(text_features, clips, near), count)
    if near:
        most = Counter(turn.prompt for turn in order).most_common(num_nearest(len(prompts)))
        log.info("preserved most, as their prompts are most like those of the clips (--preserve_near %g): %s", near,
                 ", ".join(f"{prompts[which]!r} x {times}" for which, times in most))
    made: dict[int, TrainingClip] = {}
    was_training = generator.training
    generator.eval()
    with Progress(count, "sounds to preserve", "sounds") as progress:
        for numbers in _together(clips.lengths(source) for source in sources):
            asked = []
            for number in numbers:
                which = order[number].prompt
                clip = clips.clip(sources[number])
                if not (use_clip_features and order[number].has_looks):
                    clip = _unseen(generator, clip)
                asked.append(dataclasses.replace(
                    clip, id=f"{clip.id}, preserved with {prompts[which]!r}", prompt=prompts[which], audio_path=None,
                    text_f=text_features[which].float().cpu(),
                ))
            sounds = _as_made(generator, asked, [seed + number for number in numbers], precision, sampling)
            made.update(zip(numbers, sounds, strict=True))
            progress.update(len(made))
    generator.train(was_training)
    winograd_conv.forget()  # layers that get an adapter would not use them again
    preserved = ListDataset(made[number] for number in range(count))
    repeated = clips if repeats == 1 else clips.subset(i for _ in range(repeats) for i in range(len(clips)))
    return ConcatDataset(repeated, preserved.subset(i % len(preserved) for i in range(wanted)))


def _together(lengths: Iterable[Lengths]) -> Iterator[list[int]]:
    """Yield the numbers of sounds of one length, in their order, as many as go through the generator at once."""
    groups: dict[Lengths, list[int]] = {}
    for number, of_sound in enumerate(lengths):
        groups.setdefault(of_sound, []).append(number)
    for (num_frames, _, _), numbers in groups.items():
        size = max(1, FRAMES_AT_ONCE // num_frames)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _unseen(generator: Generator, clip: TrainingClip) -> TrainingClip:
    """Return the clip with the empty features in place of its CLIP features."""
    generator.set_sequence(*clip.lengths)
    return dataclasses.replace(clip, clip_f=generator.empty_features(1)[0][0].detach().float().cpu())


@torch.no_grad()
def _as_made(
    generator: Generator, clips: Sequence[TrainingClip], seeds: Sequence[int], precision: torch.dtype,
    sampling: SamplingConfig,
) -> list[TrainingClip]:
    """Return clips of one length with the sounds that the generator makes for their features, from these seeds."""
    device = generator.latent_mean.device
    batch = collate(clips).to(device)
    generator.set_sequence(*batch.lengths)
    empty_clip, empty_sync, _ = generator.empty_features(len(clips))
    seen = batch.has_video[:, None, None]
    latents = sample_latents(
        generator, torch.where(seen, batch.clip_f, empty_clip), torch.where(seen, batch.sync_f, empty_sync),
        batch.text_f, seeds, sampling, precision=precision,
    ).cpu()
    # Rows of their own: each sound is kept for itself, and dropped for itself.
    return [
        dataclasses.replace(clip, mean=row.clone(), std=torch.zeros_like(row), padding=None)
        for clip, row in zip(clips, latents, strict=True)
    ]
