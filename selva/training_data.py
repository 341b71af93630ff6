"""From a scanned data folder to what a training step eats: latents, features and text of every clip, in batches.

    clip.npz + clip.wav --mel, VAE--> posterior mean and deviation (N, C), CLIP (T, ·), sync (S, ·), text (77, ·)

Everything here happens once, before the first step; the encoders are freed again. Clips keep their true length (up to
``max_duration_sec``) and are batched with clips of the same length, so nothing is padded in feature space (pitfall B1).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selva.datasets import Clip, EpochSampler
from selva.features import FeatureBundle, load_features
from selva.media import prepare_audio, read_audio
from selva.models.mel import MelSpectrogram
from selva.models.vae import VAE
from selva.models.zoo import Variant, build_mel
from selva.report import Progress
from selva.sequence import DEFAULT_DURATION_SEC, SequenceConfig, sequence_config
from selva.weights import load_clip_text, load_vae

log = logging.getLogger(__name__)

# A video's sound may end a little before its picture; silence of up to this length is appended to the waveform.
MAX_AUDIO_SHORTFALL_SEC = 0.25


@dataclass(frozen=True)
class TrainingClip:
    """One clip as the generator is trained on it; all tensors float32 on the CPU, without a batch axis.

    Attributes:
        mean, std: (N, C) VAE posterior of the sound.
        clip_f: (T, clip_dim). sync_f: (S, sync_dim). text_f: (77, text_dim).
        lengths: (N, T, S), which all clips of a batch share.
    """

    id: str
    prompt: str
    audio_path: Path
    sequence: SequenceConfig
    mean: Tensor
    std: Tensor
    clip_f: Tensor
    sync_f: Tensor
    text_f: Tensor

    @property
    def lengths(self) -> tuple[int, int, int]:
        return self.mean.shape[0], self.clip_f.shape[0], self.sync_f.shape[0]


@dataclass(frozen=True)
class Batch:
    """Clips of one length stacked: ``mean``, ``std`` (B, N, C), features (B, ·, ·), and where they came from."""

    mean: Tensor
    std: Tensor
    clip_f: Tensor
    sync_f: Tensor
    text_f: Tensor
    ids: tuple[str, ...]

    @property
    def lengths(self) -> tuple[int, int, int]:
        return self.mean.shape[1], self.clip_f.shape[1], self.sync_f.shape[1]

    def to(self, device: torch.device) -> Batch:
        moved = (x.to(device, non_blocking=True) for x in (self.mean, self.std, self.clip_f, self.sync_f, self.text_f))
        return Batch(*moved, self.ids)


def collate(clips: Sequence[TrainingClip]) -> Batch:
    """Return clips of equal lengths as one batch."""
    fields = ("mean", "std", "clip_f", "sync_f", "text_f")
    return Batch(*(torch.stack([getattr(c, f) for c in clips]) for f in fields), tuple(c.id for c in clips))


class BucketBatches:
    """Endless batches of clips of equal length; every epoch visits each clip once, in a seeded order.

    Clips are drawn one by one from shuffled epochs and wait in the bucket of their length until a batch is full. A
    bucket with fewer clips than a batch is filled over several epochs, with new noise for every visit.
    """

    def __init__(self, clips: Sequence[TrainingClip], batch_size: int, seed: int) -> None:
        self.clips, self.batch_size = list(clips), batch_size
        self.sampler = EpochSampler(len(self.clips), 1, seed)
        self.waiting: dict[tuple[int, int, int], list[int]] = {}

    def __next__(self) -> Batch:
        while True:
            (index,) = next(self.sampler)
            bucket = self.waiting.setdefault(self.clips[index].lengths, [])
            bucket.append(index)
            if len(bucket) >= self.batch_size:
                batch, self.waiting[self.clips[index].lengths] = bucket[: self.batch_size], bucket[self.batch_size :]
                return collate([self.clips[i] for i in batch])

    def state_dict(self) -> dict:
        """Return plain numbers and tensors from which :meth:`load_state_dict` continues exactly."""
        waiting = [{"lengths": list(k), "clips": list(v)} for k, v in self.waiting.items()]
        return {"sampler": self.sampler.state_dict(), "waiting": waiting}

    def load_state_dict(self, state: dict) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.waiting = {tuple(entry["lengths"]): list(entry["clips"]) for entry in state["waiting"]}


# ---------------------------------------------------------------------------------------------------------------
# preparation
# ---------------------------------------------------------------------------------------------------------------


def clip_sequence(bundle: FeatureBundle, variant: Variant, path: Path, max_duration_sec: float) -> SequenceConfig:
    """Return the lengths at which a bundle is trained: its own duration, cut to ``max_duration_sec``.

    Raises:
        ValueError: the widths are not those of the variant, or the features are shorter than their duration says.
    """
    lengths = sequence_config(variant.mode, min(bundle.duration, max_duration_sec))
    config = variant.generator
    for name, features, tokens, width in (
        ("clip_features", bundle.clip_features, lengths.clip_seq_len, config.clip_dim),
        ("sync_features", bundle.sync_features, lengths.sync_seq_len, config.sync_dim),
    ):
        if features.shape[2] != width:
            raise ValueError(
                f"{path}: {name} are {features.shape[2]} wide, but {variant.name} takes {width}; "
                f"extract again with --variant {variant.name}"
            )
        if features.shape[1] < tokens:
            raise ValueError(
                f"{path}: {name} is {tuple(features.shape)}, expected at least (1, {tokens}, {width}) for "
                f"{lengths.duration_sec:g} s; extract again"
            )
    return lengths


def load_waveform(path: Path, sequence: SequenceConfig, normalize: str) -> Tensor:
    """Return the (samples,) float32 sound of a clip at the model's rate and exactly its length.

    Raises:
        ValueError: unreadable, silent, not finite, or more than ``MAX_AUDIO_SHORTFALL_SEC`` too short.
    """
    waveform, rate = read_audio(path)
    seconds, needed = waveform.shape[-1] / rate, sequence.num_audio_frames / sequence.sampling_rate
    if seconds < needed - MAX_AUDIO_SHORTFALL_SEC:
        raise ValueError(
            f"{path}: {seconds:.2f} s of sound, but the features of this clip cover {needed:.2f} s; "
            f"use the sound that belongs to the video, or extract again with --duration {seconds:.2f}"
        )
    return prepare_audio(
        waveform, rate, sequence.sampling_rate, sequence.num_audio_frames, normalize=normalize, pad=True
    )


@torch.no_grad()
def encode_latents(waveform: Tensor, mel: MelSpectrogram, vae: VAE) -> tuple[Tensor, Tensor]:
    """Return mean and deviation, each (B, N, C) float32, of the VAE posterior of ``waveform`` (B, samples)."""
    mean, std = vae.encode(mel(waveform))  # each (B, C, N)
    return mean.mT, std.mT


def prepare_clips(
    clips: Sequence[Clip],
    variant: Variant,
    selva_dir: Path | None,
    device: torch.device,
    *,
    max_duration_sec: float = DEFAULT_DURATION_SEC,
    normalize_audio: str = "peak",
) -> tuple[list[TrainingClip], list[tuple[Path, str]]]:
    """Return the clips ready for training, and ``(path, reason)`` for every one that cannot be used.

    The mel front-end and the VAE encoder run in float32 (pitfall G2). Prompts are encoded only where the bundle does
    not already hold the text features of the same prompt.
    """
    usable, problems = [], []
    for clip in clips:  # cheap checks of every clip before any weights are read
        try:
            bundle = load_features(clip.features_path)
            sequence = clip_sequence(bundle, variant, clip.features_path, max_duration_sec)
        except (ValueError, OSError) as error:
            problems.append((clip.features_path, str(error)))
            continue
        usable.append((clip, bundle, sequence))
    texts = _text_features(usable, variant, selva_dir, device)
    ready = []
    if not usable:
        return ready, problems
    vae = load_vae(variant.name, selva_dir, device).drop_decoder()
    mel = build_mel(variant.mode).to(device)
    with Progress(len(usable), "encoding sound", "clips") as progress:
        for number, (clip, bundle, sequence) in enumerate(usable, 1):
            try:
                waveform = load_waveform(clip.audio_path, sequence, normalize_audio)
            except (ValueError, OSError) as error:
                problems.append((clip.audio_path, str(error)))
                continue
            mean, std = encode_latents(waveform[None].to(device), mel, vae)  # each (1, N, C)
            ready.append(TrainingClip(
                id=clip.id, prompt=clip.prompt, audio_path=clip.audio_path, sequence=sequence,
                mean=mean[0].cpu(), std=std[0].cpu(),
                clip_f=bundle.clip_features[0, : sequence.clip_seq_len],
                sync_f=bundle.sync_features[0, : sequence.sync_seq_len],
                text_f=texts[clip.id],
            ))
            progress.update(number)
    return ready, problems


def _text_features(
    usable: Sequence[tuple[Clip, FeatureBundle, SequenceConfig]],
    variant: Variant,
    selva_dir: Path | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return (77, text_dim) per clip id, encoding each distinct prompt at most once."""
    config = variant.generator
    expected = (1, config.text_seq_len, config.text_dim)
    found, missing = {}, {}
    for clip, bundle, _ in usable:
        if bundle.prompt != clip.prompt and variant.family == "selva":
            log.warning(
                "%s: the prompt is %r, but the sync features were extracted with %r; better extract again",
                clip.id, clip.prompt, bundle.prompt,
            )
        stored = bundle.text_features
        if stored is not None and stored.shape == expected and bundle.prompt == clip.prompt:
            found[clip.id] = stored[0]
        else:
            missing[clip.id] = clip.prompt
    if missing:
        prompts = sorted(set(missing.values()))
        log.info("encoding %d prompts", len(prompts))
        encoded = load_clip_text(variant.name, selva_dir, device).encode(prompts).cpu()
        features = dict(zip(prompts, encoded, strict=True))
        found.update({clip_id: features[prompt] for clip_id, prompt in missing.items()})
    return found
