"""Verdict at the end of a run: did it work? Sounds with and without the adapter, from the same seeds, in figures.

    held-out clips (training clips if there are none)   how far the sound moved, whether nearer to the recordings
    five foreign prompts                                whether they have come to sound like what was taught
    losses of training and held-out clips               learned, or learned by heart

All limits are here. They are rules of thumb: listen to the sounds on the page of the run.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selva.audio.config import Normalize
from selva.audio.metrics import compare_sounds, is_silent, long_term_spectrum
from selva.data.dataset import ClipDataset, TrainingClip
from selva.data.latents import load_waveform
from selva.flow import SamplingConfig
from selva.lora.state import adapter_off
from selva.models.variants import Variant
from selva.sampling import decode_latents
from selva.training.config import RunConfig, TrainConfig
from selva.training.memorisation import NO_EFFECT, Watch, spread
from selva.training.run import TrainingRun
from selva.training.sample import clip_latents
from selva.utils.text import clock, counted, listed
from selva.weights.load import load_clip_text, load_vae, load_vocoder

log = logging.getLogger(__name__)

# What the verdict may take, from the most thorough down: clips, solver steps. Foreign prompts are always five.
PLANS = ((4, 25), (4, 10), (2, 10))
NUM_FOREIGN = 5
PASSES_OF_A_STEP = 3.0  # a forward and a backward pass, per clip, in forward passes
PASSES_TO_DECODE = 10.0  # VAE, vocoder and figures of a sound, likewise

INAUDIBLE_DB = 1.0  # a log-spectral distance that ears hardly notice (Paliwal and Atal, 1993)
TAKEN_OVER = 0.2  # foreign sounds went so much of their way to the taught one, or more
BY_HEART = 0.25  # held-out clips improved by less than this part of what training clips improved by
LEAST_DROP = 0.01  # of the loss of training clips, below which there is nothing to know by heart

FOREIGN_PROMPTS = ("rain falls", "a dog barks", "a bell rings", "a drum is beaten", "a siren wails", "water drips",
                   "a person speaks", "a car drives past")
ADVICE = {
    "learned": "",
    "hardly any effect": "more --steps, a higher --lr (3 to 10 times), --lora_plus_ratio 8, or more layers (--target "
                         "attn+mlp)",
    "is silent": "a lower --lr (a third) or fewer --steps; listen to the samples of earlier steps; are the recordings "
                 "audible?",
    "got worse": "a lower --lr (a third), fewer --steps, adapter_best; are the sounds those of the videos?",
    "has taken over": "--preserve with prompts of sounds to keep, --preserve_near 0.5 if it is sounds with similar "
                      "prompts, a lower --strength when generating, or fewer --steps",
    "learned by heart": "adapter_best, fewer --steps or --patience 5, more and more varied clips",
}


@dataclass(frozen=True)
class VerdictPlan:
    """Number of clips to hear, solver steps of their sounds, and the estimated share of the training's time."""

    num_clips: int
    num_steps: int
    share: float


@dataclass(frozen=True)
class HeardClip:
    """Sounds of a clip or a foreign prompt, (samples,) each at ``rate``; ``recorded`` is None for a prompt."""

    name: str
    prompt: str
    rate: int
    before: Tensor
    after: Tensor
    recorded: Tensor | None = None


@dataclass(frozen=True)
class VerdictFigures:
    """Means over clips; None where there was nothing to measure.

    Attributes:
        held_out: the clips were held out. num_clips: of them.
        moved_db, foreign_moved_db: log-spectral distance of the sounds without and with the adapter.
        foreign_drawn: share by which foreign sounds came nearer to the taught one, see :func:`drawn_towards`.
        nearer_db: by how much the log-spectral distance to the recordings fell; negative: it rose.
        onset_f1_before, onset_f1_after: share of events at the moments of the recordings.
        train_drop, val_drop: share by which the losses fell below the base model's.
        velocity_change: relative change of what the network predicts.
        silent_after: of the clips, those whose sound is silent with the adapter.
    """

    held_out: bool
    num_clips: int
    moved_db: float | None
    nearer_db: float | None
    onset_f1_before: float | None
    onset_f1_after: float | None
    foreign_moved_db: float | None
    train_drop: float
    val_drop: float | None
    velocity_change: float
    foreign_drawn: float | None = None
    silent_after: int = 0


@dataclass(frozen=True)
class Verdict:
    """Outcome of a run in a word, what to try, the figures behind it, and the sounds."""

    word: str
    advice: str
    figures: VerdictFigures
    clips: tuple[HeardClip, ...]
    foreign: tuple[HeardClip, ...]
    seconds: float

    def line(self) -> str:
        """Return the verdict with its figures in one line."""
        f = self.figures
        parts = [f"{counted(f.num_clips, 'held-out clip' if f.held_out else 'training clip')}"
                 + (f" moved {f.moved_db:.1f} dB" if f.moved_db is not None else "")]
        if f.nearer_db is not None:
            parts.append(f"{abs(f.nearer_db):.1f} dB {'nearer to' if f.nearer_db >= 0 else 'further from'} the "
                         "recordings")
        if f.onset_f1_before is not None and f.onset_f1_after is not None:
            parts.append(f"onset F1 {f.onset_f1_before:.2f} -> {f.onset_f1_after:.2f}")
        if f.foreign_moved_db is not None:
            parts.append(f"foreign prompts moved {f.foreign_moved_db:.1f} dB")
        if f.foreign_drawn is not None:
            parts.append(f"{max(0.0, 100 * f.foreign_drawn):.0f} % of their way to the taught sound")
        held_out = f", of held-out clips {-100 * f.val_drop:+.1f} %" if f.val_drop is not None else ""
        parts.append(f"loss of training clips {-100 * f.train_drop:+.1f} %{held_out}")
        if f.val_drop is None:
            parts.append("nothing was held out, so learning by heart would not be seen")
        return f"verdict: {self.word}: {', '.join(parts)}" + (f"; try {self.advice}" if self.advice else "")

    def to_json(self) -> dict[str, Any]:
        """Return word, advice and figures."""
        return {"verdict": self.word, "advice": self.advice, **dataclasses.asdict(self.figures)}


def judge(f: VerdictFigures) -> str:
    """Return the word for these figures, a key of :data:`ADVICE`; the first that applies."""
    if f.silent_after and f.silent_after == f.num_clips:  # the losses may have fallen all the same
        return "is silent"
    silent_change = f.moved_db is not None and f.moved_db < INAUDIBLE_DB
    if f.velocity_change < NO_EFFECT or silent_change:
        return "hardly any effect"
    if f.train_drop <= 0:
        return "got worse"
    if f.val_drop is not None and f.train_drop >= LEAST_DROP and f.val_drop < BY_HEART * f.train_drop:
        return "learned by heart"
    if f.foreign_drawn is not None and f.foreign_drawn >= TAKEN_OVER:
        return "has taken over"
    return "learned"


def plan_verdict(
    config: TrainConfig, num_clips: int, most_share: float, recomputes: bool = False
) -> VerdictPlan | None:
    """Return the most thorough plan that costs less than ``most_share`` of the training; None if none does.

    Counted in passes of one clip through the generator, so that it is known before the first step.

    Args:
        num_clips: there are to hear. recomputes: blocks are computed again in the backward pass.
    """
    training = config.steps * config.batch_size * config.grad_accum * (PASSES_OF_A_STEP + recomputes)
    for most_clips, num_steps in PLANS:
        sounds = 2 * (min(most_clips, num_clips) + NUM_FOREIGN)
        share = sounds * (2 * num_steps + PASSES_TO_DECODE) / training  # guidance takes two passes
        if share < most_share:
            return VerdictPlan(min(most_clips, num_clips), num_steps, share)
    return None


def foreign_prompts(preserved: Sequence[str], taught: Sequence[str]) -> list[str]:
    """Return prompts of other sounds: five of those to preserve, evenly chosen, filled up from a list.

    Prompts that share a word of four letters or more with what is taught are left out.
    """
    words = {word for prompt in taught for word in prompt.lower().split() if len(word) > 3}
    own = [preserved[i] for i in spread(len(preserved), NUM_FOREIGN)]
    others = [prompt for prompt in FOREIGN_PROMPTS if prompt not in own and not words & set(prompt.split())]
    return [*own, *others][:NUM_FOREIGN]


def reach_verdict(
    run: TrainingRun, clips: ClipDataset, config: RunConfig, plan: VerdictPlan, variant: Variant,
    row: Mapping[str, float] | None = None,
) -> Verdict:
    """Generate, measure and judge; the model is left in eval mode.

    Args:
        clips: training clips, without sounds to preserve.
        row: of the metrics, of a validation at this step; what it would say is computed if there is none.
    """
    started = time.monotonic()
    held_out = len(run.val_clips) > 0
    shown = run.val_clips if held_out else clips
    numbers = spread(len(shown), plan.num_clips)
    chosen = [shown.clip(i) for i in numbers]
    taught = [clips.clip(i).prompt for i in spread(len(clips), 20)]
    prompts = foreign_prompts(config.preserve, taught)
    text_f = load_clip_text(variant.name, config.model.selva_dir, run.device).encode(prompts).float().cpu()
    foreign = [
        dataclasses.replace(chosen[0], id=prompt, prompt=prompt, text_f=text_f[i], has_video=False, audio_path=None)
        for i, prompt in enumerate(prompts)
    ]
    with run.evaluated():
        if row is None or "train_drop" not in row:
            row = Watch(run.generator, clips, shown.subset(numbers), run.config, run.precision).now()
        heard = hear(run, [*chosen, *foreign], plan.num_steps, variant, config.model.selva_dir,
                     config.normalize_audio, config.training.seed)
    of_clips, of_prompts = heard[: len(chosen)], heard[len(chosen) :]
    _warn_of_silence(heard)
    figures = _figures(of_clips, of_prompts, row, held_out)
    word = judge(figures)
    return Verdict(word, ADVICE[word], figures, tuple(of_clips), tuple(of_prompts), time.monotonic() - started)


def hear(
    run: TrainingRun, clips: Sequence[TrainingClip], num_steps: int, variant: Variant, selva_dir: Path | None,
    normalize: Normalize, seed: int,
) -> list[HeardClip]:
    """Return the sounds of clips without and with the adapter, each clip from a seed of its own, the same for both."""
    sampling = SamplingConfig(num_steps=num_steps)

    def latents_now() -> list[Tensor]:
        return [
            clip_latents(run.generator, clip, seed + i, sampling, precision=run.precision,
                         clip_features=run.config.clip_features).cpu()
            for i, clip in enumerate(clips)
        ]

    after = latents_now()
    with adapter_off(run.generator):
        before = latents_now()
    vae = load_vae(variant.name, selva_dir, run.device).drop_encoder()
    vocoder = load_vocoder(variant.name, selva_dir, run.device)

    def sound(latents: Tensor) -> Tensor:
        return decode_latents(latents.to(run.device), vae, vocoder)[0].cpu()

    return [
        HeardClip(
            clip.id, clip.prompt, clip.sequence.sampling_rate, sound(old), sound(new),
            load_waveform(clip.audio_path, clip.sequence, normalize) if clip.audio_path else None,
        )
        for clip, old, new in zip(clips, before, after, strict=True)
    ]


def _warn_of_silence(heard: Sequence[HeardClip]) -> None:
    for words, silent in (("without", [clip.name for clip in heard if is_silent(clip.before)]),
                          ("with", [clip.name for clip in heard if is_silent(clip.after)])):
        if silent:
            log.warning("the verdict leaves out distances of silent sounds, made %s the adapter: %s", words,
                        listed(silent))


def _figures(
    clips: Sequence[HeardClip], foreign: Sequence[HeardClip], row: Mapping[str, float], held_out: bool
) -> VerdictFigures:
    lsd, f1 = "log_spectral_distance_db", "onset_f1"
    to_recorded = [
        (compare_sounds(heard.before, heard.recorded, heard.rate),
         compare_sounds(heard.after, heard.recorded, heard.rate))
        for heard in clips if heard.recorded is not None
    ]
    moved = {id(heard): compare_sounds(heard.after, heard.before, heard.rate)[lsd] for heard in (*clips, *foreign)}
    return VerdictFigures(
        held_out=held_out,
        num_clips=len(clips),
        moved_db=_mean([moved[id(heard)] for heard in clips]),
        nearer_db=_mean([None if old[lsd] is None or new[lsd] is None else old[lsd] - new[lsd]
                         for old, new in to_recorded]),
        onset_f1_before=_mean([old[f1] for old, _ in to_recorded]),
        onset_f1_after=_mean([new[f1] for _, new in to_recorded]),
        foreign_moved_db=_mean([moved[id(heard)] for heard in foreign]),
        train_drop=row["train_drop"],
        val_drop=row["val_drop"] if held_out else None,
        velocity_change=row["velocity_change"],
        silent_after=sum(is_silent(heard.after) for heard in clips),
        foreign_drawn=drawn_towards(
            [heard.after if heard.recorded is None else heard.recorded for heard in clips],
            [(heard.before, heard.after) for heard in foreign], clips[0].rate),
    )


def drawn_towards(taught: Sequence[Tensor], foreign: Sequence[tuple[Tensor, Tensor]], rate: int) -> float | None:
    """Return the share of their distance to the taught sound that foreign sounds have lost; negative if it grew.

    0: they are as far from it as before, 1: they have become it. Distances are between long-term spectra, which know
    what a sound is like, but not when it sounds: a sound of the same kind that comes at other moments has not moved.

    Args:
        taught: (samples,) sounds at ``rate``. foreign: pairs of sounds, without and with the adapter.

    Returns:
        None where all taught or all foreign sounds are silent.
    """
    spectra = [x for x in (long_term_spectrum(sound, rate) for sound in taught) if x is not None]
    pairs = [(old, new) for old, new in ((long_term_spectrum(old, rate), long_term_spectrum(new, rate))
                                         for old, new in foreign) if old is not None and new is not None]
    if not spectra or not pairs:
        return None
    centre = torch.stack(spectra).mean(dim=0)
    before, after = (sum(float((x - centre).square().mean().sqrt()) for x in side) for side in zip(*pairs, strict=True))
    return 1 - after / before if before > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def log_verdict(verdict: Verdict, training_seconds: float) -> None:
    """Log the verdict, as a warning unless something was learned, and what it took."""
    (log.info if verdict.word == "learned" else log.warning)("%s", verdict.line())
    if training_seconds > 0:
        log.info("the verdict took %s, %.0f %% of the training's %s", clock(verdict.seconds),
                 100 * verdict.seconds / training_seconds, clock(training_seconds))
