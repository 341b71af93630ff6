"""Sounds of held-out rows in the middle of a base training, with the averaged weights, beside the recorded ones.

    samples/step_00020000/01.flac 01.png    made, and its spectrogram
    samples/recorded/01.flac                what the stored latents of the row stand for
    samples/captions.tsv                    the prompts

so that ``scripts/evaluate.py`` reads them too; what it computes of them goes to the metrics of the run.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from selva.data.dataset import ClipDataset, TrainingClip
from selva.evaluation.config import EvaluationConfig
from selva.evaluation.run import evaluate
from selva.flow import SamplingConfig
from selva.media import write_audio
from selva.models.generator import Generator
from selva.models.variants import Variant
from selva.models.zoo import build_generator
from selva.sampling import decode_latents
from selva.training.base.run import BaseRun
from selva.training.sample import generate_sound
from selva.utils.device import is_out_of_memory
from selva.utils.files import atomic_write_text
from selva.utils.plots import plot_spectrograms
from selva.utils.text import counted
from selva.weights.load import load_vae, load_vocoder

log = logging.getLogger(__name__)

FOLDER = "samples"
RECORDED, CAPTIONS, COMPARED = "recorded", "captions.tsv", "evaluation"  # in it


class BaseSamples:
    """Writer of the same few held-out rows again and again, with guidance and always the same noise.

    Args:
        rows: to choose from; those that are taken are spread over all of them. count: how many.
    """

    def __init__(self, rows: ClipDataset, count: int, variant: Variant, selva_dir: Path | None, folder: Path) -> None:
        self.variant, self.selva_dir, self.folder = variant, selva_dir, folder / FOLDER
        count = min(count, len(rows))
        self.clips = [rows.clip(index * len(rows) // count) for index in range(count)]
        self._given_up = False  # after a lack of memory
        self._recorded: dict[int, torch.Tensor] = {}

    def write(self, run: BaseRun) -> dict[str, Any] | None:
        """Write the sounds of the run as it stands, which must not end it. All processes have to come here together.

        Returns:
            The row for ``metrics.jsonl``: the figures of the evaluator, in the process that writes; None elsewhere, and
            where a sound is missing.
        """
        row = None
        weights = run.weights(track=0)
        if run.world.is_main and not self._given_up:
            try:
                generator = self._with(weights, run)
                for number, clip in enumerate(self.clips, 1):
                    self._write_one(generator, number, clip, run)
                row = self._compare(run)
            except Exception as error:  # whatever it is: days of training are worth more than a sample
                self._given_up = is_out_of_memory(error)
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                log.warning("samples of step %d are incomplete: %s%s", run.step, reason,
                            "; they are left out from now on" if self._given_up else "")
        run.world.wait()
        return row

    def _with(self, weights: dict[str, torch.Tensor], run: BaseRun) -> Generator:
        """Return a generator of its own with these weights, whole in this process."""
        with torch.device("meta"):
            generator = build_generator(run.generator.config)
        return generator.to_empty(device="cpu").load_published(weights).to(run.device).requires_grad_(False)

    def _write_one(self, generator: Generator, number: int, clip: TrainingClip, run: BaseRun) -> None:
        sampling = SamplingConfig()
        waveform = generate_sound(
            generator, clip, self.variant, self.selva_dir, run.config.seed + number, sampling, precision=run.precision,
            clip_features=run.config.clip_features, decode_on=run.device)
        path = self._of_step(run) / f"{number:02d}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_audio(path, waveform, clip.sequence.sampling_rate)
        title = f"step {run.step}: {clip.id} (held out), {clip.prompt!r}"
        panels = [(f"generated, guidance {sampling.cfg_strength}, {counted(sampling.num_steps, 'step')}", waveform),
                  ("recorded, as the VAE gives it back", self._sound_of(number, clip, run.device))]
        plot_spectrograms(panels, clip.sequence.sampling_rate, path.with_suffix(".png"), title)
        log.info("sample: %s", path)

    def _of_step(self, run: BaseRun) -> Path:
        return self.folder / f"step_{run.step:08d}"

    def _sound_of(self, number: int, clip: TrainingClip, device: torch.device) -> torch.Tensor:
        """Return the sound that the stored latents stand for, (samples,); written beside the samples the first time."""
        if number not in self._recorded:
            vae = load_vae(self.variant.name, self.selva_dir, device).drop_encoder()
            vocoder = load_vocoder(self.variant.name, self.selva_dir, device)
            with torch.no_grad():
                waveform = decode_latents(clip.mean[None].to(device), vae, vocoder)[0].cpu()
            folder = self.folder / RECORDED
            folder.mkdir(exist_ok=True)
            write_audio(folder / f"{number:02d}.flac", waveform, clip.sequence.sampling_rate)
            self._recorded[number] = waveform
        return self._recorded[number]

    def _compare(self, run: BaseRun) -> dict[str, Any]:
        """Return the row of metrics with the evaluator's figures of the sounds of this step."""
        captions = self.folder / CAPTIONS
        lines = [f"{number:02d}\t{' '.join(clip.prompt.split())}" for number, clip in enumerate(self.clips, 1)]
        atomic_write_text(captions, "\n".join(["id\tcaption", *lines]) + "\n")
        found = evaluate(EvaluationConfig(
            generated=self._of_step(run), reference=self.folder / RECORDED, captions=captions, clap=run.config.clap,
            ast=run.config.ast, output_dir=self.folder / COMPARED, device=str(run.device)))
        figures = {f"eval_{key}": figure.value for key, figure in found.figures.items()}
        log.info("step %d, samples (%d): %s", run.step, len(found.pairs),
                 ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
        return {"step": run.step, **figures}
