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
from collections.abc import Sequence

import torch
from torch import Tensor

from selva.data.dataset import ClipDataset, ConcatDataset, ListDataset, TrainingClip
from selva.flow import SamplingConfig
from selva.models.generator import Generator
from selva.sampling import sample_latents
from selva.utils.errors import UserError
from selva.utils.progress import Progress

log = logging.getLogger(__name__)

UNGUIDED = SamplingConfig(cfg_strength=0.0)
SOUNDS_PER_PROMPT = 2  # at least; if there are fewer clips, an epoch uses each of them several times
MOST_SOUNDS = 200  # kept in memory, about 1 MB each; a larger share of a large set uses each of them more than once


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
) -> ClipDataset:
    """Return the clips, and sounds that the generator makes for ``prompts`` as ``share`` of all.

    There are at least :data:`SOUNDS_PER_PROMPT` for every prompt; a small set of clips is repeated to keep the share.
    Each sound borrows the sync features of one of the clips, with the prompts in turn, so that something happens in it
    at certain moments, and every other sound the clip's CLIP features. If no sound had CLIP features, the model would
    learn that they always mean the new sound; if all had them, it would learn to ignore them. Depends on nothing but
    the arguments.

    Args:
        generator: the base model, on its device; its adapter, if there is one, must not have learned anything.
        text_features: (prompts, 77, text_dim).
        seed: of the noise. precision: autocast dtype of the network.
        use_clip_features: the training passes CLIP features; if not, no sound is made with them either.

    Raises:
        ValueError: ``share`` is not between 0 and 1.
    """
    repeats, wanted = mixture(len(clips), len(prompts), share)
    shift_after = math.lcm(len(clips), len(prompts))  # then each prompt meets other clips than before
    made, count = [], min(wanted, max(MOST_SOUNDS, len(prompts)))
    was_training = generator.training
    generator.eval()
    with Progress(count, "sounds to preserve", "sounds") as progress:
        for number in range(count):
            which = number % len(prompts)
            clip = clips.clip((number + number // shift_after) % len(clips))
            clip = clip if use_clip_features and (number + number // len(prompts)) % 2 else _unseen(generator, clip)
            made.append(_as_made(generator, clip, prompts[which], text_features[which], seed + number, precision))
            progress.update(number + 1)
    generator.train(was_training)
    preserved = ListDataset(made)
    repeated = clips if repeats == 1 else clips.subset(i for _ in range(repeats) for i in range(len(clips)))
    return ConcatDataset(repeated, preserved.subset(i % len(preserved) for i in range(wanted)))


def _unseen(generator: Generator, clip: TrainingClip) -> TrainingClip:
    """Return the clip with the empty features in place of its CLIP features."""
    generator.set_sequence(*clip.lengths)
    return dataclasses.replace(clip, clip_f=generator.empty_features(1)[0][0].detach().float().cpu())


def _as_made(
    generator: Generator, clip: TrainingClip, prompt: str, text_f: Tensor, seed: int, precision: torch.dtype
) -> TrainingClip:
    """Return a clip with the features of this one, another prompt, and the sound that the generator makes for both."""
    device = generator.latent_mean.device
    generator.set_sequence(*clip.lengths)
    clip_f, sync_f, _ = generator.empty_features(1)
    if clip.has_video:
        clip_f, sync_f = clip.clip_f[None].to(device), clip.sync_f[None].to(device)
    latents = sample_latents(
        generator, clip_f, sync_f, text_f[None].to(device), [seed], UNGUIDED, precision=precision
    )[0].cpu()
    return dataclasses.replace(
        clip, id=f"{clip.id}, preserved with {prompt!r}", prompt=prompt, audio_path=None, mean=latents,
        std=torch.zeros_like(latents), text_f=text_f.float().cpu(), padding=None,
    )
