"""Sounds of held-out rows in the middle of a base training, with the averaged weights, beside the recorded ones."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from selva.data.dataset import ClipDataset, TrainingClip
from selva.flow import SamplingConfig
from selva.media import write_audio
from selva.models.generator import Generator
from selva.models.variants import Variant
from selva.models.zoo import build_generator
from selva.sampling import decode_latents
from selva.training.base.run import BaseRun
from selva.training.sample import generate_sound
from selva.utils.device import is_out_of_memory
from selva.utils.plots import plot_spectrograms
from selva.utils.text import counted
from selva.weights.load import load_vae, load_vocoder

log = logging.getLogger(__name__)

FOLDER = "samples"


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

    def write(self, run: BaseRun) -> None:
        """Write the sounds of the run as it stands, which must not end it. All processes have to come here together."""
        weights = run.weights(track=0)
        if run.world.is_main and not self._given_up:
            generator = self._with(weights, run)
            for number, clip in enumerate(self.clips, 1):
                try:
                    self._write_one(generator, number, clip, run)
                except Exception as error:  # whatever it is: days of training are worth more than a sample
                    self._given_up = is_out_of_memory(error)
                    reason = str(error).strip().split("\n")[0] or type(error).__name__
                    log.warning("no sample %d at step %d: %s%s", number, run.step, reason,
                                "; samples are left out from now on" if self._given_up else "")
                    break
        run.world.wait()

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
        path = self.folder / f"step{run.step:08d}_{number:02d}.flac"
        write_audio(path, waveform, clip.sequence.sampling_rate)
        title = f"step {run.step}: {clip.id} (held out), {clip.prompt!r}"
        panels = [(f"generated, guidance {sampling.cfg_strength}, {counted(sampling.num_steps, 'step')}", waveform),
                  ("recorded, as the VAE gives it back", self._recorded(clip, number, run.device))]
        plot_spectrograms(panels, clip.sequence.sampling_rate, path.with_suffix(".png"), title)
        log.info("sample: %s", path)

    def _recorded(self, clip: TrainingClip, number: int, device: torch.device) -> torch.Tensor:
        """Return the sound that the stored latents stand for, (samples,); written beside the samples the first time."""
        vae = load_vae(self.variant.name, self.selva_dir, device).drop_encoder()
        vocoder = load_vocoder(self.variant.name, self.selva_dir, device)
        with torch.no_grad():
            waveform = decode_latents(clip.mean[None].to(device), vae, vocoder)[0].cpu()
        path = self.folder / f"recorded_{number:02d}.flac"
        if not path.exists():
            write_audio(path, waveform, clip.sequence.sampling_rate)
        return waveform
