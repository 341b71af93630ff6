"""Sounds that the user wants to hear while a run goes on, and figures of sounds made for held-out clips.

    name    prompt          video         features         seed   strength   guidance
    dog     a dog barks     new/dog.mp4                    7      1.0        4.5
    cat     a cat meows                   new/cat.npz      7      1.0        4.5
    rain    rain falls                                     7      0.5        4.5

``features`` are made by ``extract_features.py``, those of a ``video`` at the start of the run; without both a sound is
made from the prompt alone. The sounds are those of the adapter as it stands, before the first step too, where it is the
base model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selva.data.dataset import ClipDataset, TrainingClip
from selva.data.latents import load_waveform
from selva.evaluation.sounds import pair_figures
from selva.features import FeatureBundle, load_features
from selva.flow import SamplingConfig
from selva.inputs.delimited import Numbers, find_delimiter, read_text_table, refuse_long_rows
from selva.inputs.file_names import names_that_collide
from selva.inputs.suffixes import VIDEO_SUFFIXES
from selva.lora.layers import lora_layers
from selva.lora.state import adapter_off
from selva.media import write_audio
from selva.models.variants import Variant
from selva.sampling import decode_latents
from selva.sequence import sequence_config
from selva.training.config import RunConfig
from selva.training.memorisation import spread
from selva.training.run import TrainingRun
from selva.training.sample import clip_latents
from selva.utils.errors import UserError
from selva.utils.text import counted
from selva.weights.load import load_clip_text, load_vae, load_vocoder

log = logging.getLogger(__name__)

COLUMNS = ("name", "prompt", "video", "features", "seed", "strength", "guidance")
EXPECTED = "a table of sounds to make, with the column prompt, video or features"
SOUND_FOLDER = "sample_prompts"
EVAL_CLIPS, EVAL_STEPS = 4, 10
EVAL_FIGURES = {"log_spectral_distance_db": "eval_lsd_db", "mel_cepstral_distortion_db": "eval_mcd_db",
                "onset_f1": "eval_onset_f1"}


@dataclass(frozen=True)
class AskedSound:
    """One row: a sound to make at every checkpoint, for a video, for features of one, or for the prompt alone."""

    name: str
    prompt: str
    video: Path | None
    features: Path | None
    seed: int
    strength: float
    guidance: float


def read_sample_prompts(path: Path, seed: int, output_dir: Path) -> list[AskedSound]:
    """Return the rows of a table; videos and features are relative to it or to the working folder.

    Args:
        seed: of rows that give none. output_dir: of the run, which may not tell upper and lower case apart.

    Raises:
        UserError: names every row that cannot be meant.
    """
    table = read_text_table(path, find_delimiter(path), (), EXPECTED)
    unknown = [column for column in table.columns if column not in COLUMNS]
    if unknown or not {"prompt", "video", "features"} & set(table.columns):
        raise UserError(f"{path}: has the columns {', '.join(table.columns)}; expected {EXPECTED}, and of "
                        f"{', '.join(COLUMNS)} what is wanted")
    refuse_long_rows(path, table)
    asked, problems, numbers = [], [], table.numbers("strength", "guidance")
    for line, cells in table.rows:
        given = {str(key): (value or "").strip() for key, value in cells.items()}
        try:
            asked.append(_asked(given, path.parent, seed, len(asked) + 1, numbers))
            if any(other.name == asked[-1].name for other in asked[:-1]):
                raise UserError(f"the name {asked[-1].name!r} is used twice")
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    problems += [f"upper and lower case are the same in {output_dir}, so the sound {name!r} would replace {first!r}; "
                 "rename one of them" for first, name in names_that_collide((one.name for one in asked), output_dir)]
    if not asked and not problems:
        problems.append("it has no rows")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return asked


def _asked(cells: dict[str, str], folder: Path, seed: int, number: int, numbers: Numbers) -> AskedSound:
    def value(key: str, default: float, kind: Callable[[str], float] = numbers.read) -> float:
        try:
            return kind(cells[key]) if cells.get(key) else default
        except ValueError as error:
            expected = "a whole number" if kind is int else error
            raise UserError(f"{key} is {cells[key]!r}, expected {expected}") from error

    def file(key: str, suffixes: Sequence[str], hint: str) -> Path | None:
        if not cells.get(key):
            return None
        given = Path(cells[key])
        if given.suffix.lower() not in suffixes:
            raise UserError(f"{given}: expected {hint} in the column {key}")
        found = next((path for path in (folder / given, given) if path.is_file()), None)
        if found is None:
            raise UserError(f"{given}: no such file, neither beside the table nor in the working folder; the column "
                            f"{key} takes {hint}")
        return found

    video = file("video", VIDEO_SUFFIXES, f"a video ({' '.join(VIDEO_SUFFIXES)})")
    features = file("features", (".npz",), "features (.npz), which extract_features.py makes from a video")
    if video and features:
        raise UserError(f"{video} and {features}: give a video or features, not both")
    if not cells.get("prompt") and not video and not features:
        raise UserError("neither a prompt nor a video nor features")
    name = cells.get("name") or f"{number:02d}"
    if not re.fullmatch(r"[\w][\w .-]*", name):
        raise UserError(f"the name {name!r} cannot name a file; use letters, digits, - and _")
    return AskedSound(name, cells.get("prompt", ""), video, features, int(value("seed", seed, int)),
                      value("strength", 1.0), value("guidance", SamplingConfig().cfg_strength))


@contextmanager
def at_strength(run: TrainingRun, strength: float) -> Iterator[None]:
    """Return a context in which the adapter has another strength, as ``--strength`` of ``infer.py`` gives it.

    Raises:
        UserError: another strength than 0 or 1 of a DoRA adapter, whose lengths of rows have no strength.
    """
    if strength == 1:
        yield
    elif strength == 0:
        with adapter_off(run.generator):
            yield
    else:
        layers = [layer for _, layer in lora_layers(run.generator)]
        if any(layer.lora_magnitude is not None for layer in layers):
            raise UserError(f"strength {strength:g} of a DoRA adapter can only be heard from infer.py; use 0 or 1 here")
        scales = [layer.lora_scale for layer in layers]
        try:
            for layer in layers:
                layer.lora_scale *= strength
            yield
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer.lora_scale = scale


class SoundMaker:
    """Maker of sounds in the middle of a training; VAE and vocoder are loaded for the moment only."""

    def __init__(self, run: TrainingRun, variant: Variant, selva_dir: Path | None) -> None:
        self.run, self.variant, self.selva_dir = run, variant, selva_dir

    def sounds(self, wanted: Sequence[tuple[TrainingClip, int, float, SamplingConfig]]) -> list[Tensor]:
        """Return (samples,) for (clip, seed, strength, sampling) each; the model is back in training then."""
        run, latents = self.run, []
        try:
            with run.evaluated():
                for clip, seed, strength, sampling in wanted:
                    with at_strength(run, strength):
                        latents.append(clip_latents(run.generator, clip, seed, sampling, precision=run.precision,
                                                    clip_features=run.config.clip_features))
        finally:
            run.generator.train()
        vae = load_vae(self.variant.name, self.selva_dir, run.device).drop_encoder()
        vocoder = load_vocoder(self.variant.name, self.selva_dir, run.device)
        return [decode_latents(one, vae, vocoder)[0].cpu() for one in latents]


class SamplePrompts:
    """The sounds of ``--sample_prompts``: ``sample_prompts/dog_step00500.wav`` and so on.

    Args:
        pictures: {name: features} of the rows with a video, see :mod:`selva.training.sample_videos`.
        on_sound: called with name, (samples,), rate and step of every sound.

    Raises:
        UserError: the table or a feature file cannot be used.
    """

    def __init__(
        self, asked: Sequence[AskedSound], pictures: Mapping[str, FeatureBundle], config: RunConfig, run: TrainingRun,
        variant: Variant, on_sound: Callable[[str, np.ndarray, int, int], None],
    ) -> None:
        self.asked, self.on_sound, self.run = asked, on_sound, run
        self.maker = SoundMaker(run, variant, config.model.selva_dir)
        bundles = [load_features(one.features) if one.features else pictures.get(one.name) for one in asked]
        prompts = [one.prompt or (bundle.prompt if bundle else "") for one, bundle in zip(asked, bundles, strict=True)]
        text_f = load_clip_text(variant.name, config.model.selva_dir, run.device).encode(prompts).float().cpu()
        self.clips = [
            _clip(one, prompts[i], bundles[i], text_f[i], variant, config.duration, run) for i, one in enumerate(asked)
        ]

    def are_there(self, step: int, folder: Path) -> bool:
        """Return True if all sounds of a step were written."""
        return all(_sound_path(folder, one, step).is_file() for one in self.asked)

    def write(self, folder: Path) -> None:
        """Write the sounds of the adapter as it stands; a failure is said and ends nothing."""
        step, target = self.run.step, folder / SOUND_FOLDER
        wanted = [(clip, one.seed, one.strength, SamplingConfig(cfg_strength=one.guidance))
                  for clip, one in zip(self.clips, self.asked, strict=True)]
        try:
            target.mkdir(exist_ok=True)
            for one, clip, sound in zip(self.asked, self.clips, self.maker.sounds(wanted), strict=True):
                write_audio(_sound_path(folder, one, step), sound, clip.sequence.sampling_rate)
                self.on_sound(one.name, sound.numpy(), clip.sequence.sampling_rate, step)
        except Exception as error:  # hours of training are worth more than a sound
            log.warning("no sounds of --sample_prompts at step %d: %s", step, str(error).split("\n")[0])
            return
        log.info("step %d: %s in %s", step, counted(len(self.asked), "sound"), target)


def _sound_path(folder: Path, one: AskedSound, step: int) -> Path:
    return folder / SOUND_FOLDER / f"{one.name}_step{step:05d}.wav"


def _clip(
    one: AskedSound, prompt: str, bundle: FeatureBundle | None, text_f: Tensor, variant: Variant, duration: float,
    run: TrainingRun,
) -> TrainingClip:
    sequence = sequence_config(variant.mode, bundle.duration if bundle else duration)
    generator = run.generator.config
    expected = ((sequence.clip_seq_len, generator.clip_dim), (sequence.sync_seq_len, generator.sync_dim))
    if bundle is None:
        clip_f, sync_f = (torch.full(shape, torch.nan) for shape in expected)
    else:
        clip_f, sync_f = bundle.clip_features[0], bundle.sync_features[0]
        found = (tuple(clip_f.shape), tuple(sync_f.shape))
        if found != expected:
            raise UserError(f"{one.features}: its features are {found}, expected {expected} for {variant.name}; "
                            f"extract them with --variant {variant.name}")
    nothing = torch.zeros(sequence.latent_seq_len, generator.latent_dim)
    return TrainingClip(one.name, prompt, None, sequence, nothing, nothing, clip_f, sync_f, text_f,
                        has_video=bundle is not None and bundle.has_video)


class HeldOutEvaluation:
    """Figures of ``--eval_every``: sounds made for held-out clips against their recordings, without any network."""

    def __init__(self, clips: ClipDataset, config: RunConfig, run: TrainingRun, variant: Variant) -> None:
        self.maker, self.run, self.seed = SoundMaker(run, variant, config.model.selva_dir), run, config.training.seed
        chosen = [clips.clip(i) for i in spread(len(clips), EVAL_CLIPS)]
        self.clips = [
            (clip, load_waveform(clip.audio_path, clip.sequence, config.normalize_audio))
            for clip in chosen if clip.audio_path is not None
        ]
        if not self.clips:
            log.warning("--eval_every: the held-out clips have no sound files to compare with; nothing is evaluated")

    def row(self) -> dict[str, Any] | None:
        """Return a row of metrics with the means of :data:`EVAL_FIGURES`; None if there is none, for a reason told."""
        if not self.clips:
            return None
        sampling = SamplingConfig(num_steps=EVAL_STEPS)
        try:
            sounds = self.maker.sounds(
                [(clip, self.seed + i, 1.0, sampling) for i, (clip, _) in enumerate(self.clips)])
            figures = [pair_figures(sound, recorded, clip.sequence.sampling_rate)
                       for sound, (clip, recorded) in zip(sounds, self.clips, strict=True)]
        except Exception as error:  # as above
            log.warning("no evaluation at step %d: %s", self.run.step, str(error).split("\n")[0])
            return None
        row: dict[str, Any] = {"step": self.run.step}
        for key, name in EVAL_FIGURES.items():
            known = [one[key] for one in figures if one[key] is not None]
            row[name] = sum(known) / len(known) if known else None
        log.info("step %d: %s", row["step"], ", ".join(f"{name} {value:.3g}" for name, value in row.items()
                                                       if name != "step" and value is not None))
        return row
