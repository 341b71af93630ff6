"""Sample in the middle of training: a sound generated the way ``infer.py`` does it, beside the recorded one."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from selva.audio.config import Normalize
from selva.data.dataset import TrainingClip
from selva.data.latents import load_waveform
from selva.flow import SamplingConfig
from selva.media import write_audio
from selva.models.generator import Generator
from selva.models.variants import Variant
from selva.sampling import decode_latents, sample_latents
from selva.training.run import TrainingRun
from selva.utils.device import is_out_of_memory
from selva.utils.plots import plot_spectrograms
from selva.utils.text import counted
from selva.weights.load import load_vae, load_vocoder

log = logging.getLogger(__name__)


def clip_latents(
    generator: Generator, clip: TrainingClip, seed: int, sampling: SamplingConfig, *, precision: torch.dtype,
    clip_features: str,
) -> Tensor:
    """Return (1, N, C) latents for what a clip shows and its prompt; leaves the generator in eval mode."""
    device = generator.latent_mean.device
    generator.eval()
    generator.set_sequence(*clip.lengths)
    empty_clip, empty_sync, _ = generator.empty_features(1)
    use_clip = clip.has_video and clip_features == "use"
    return sample_latents(
        generator,
        clip.clip_f[None].to(device) if use_clip else empty_clip,
        clip.sync_f[None].to(device) if clip.has_video else empty_sync,
        clip.text_f[None].to(device), [seed], sampling, precision=precision,
    )


def generate_sound(
    generator: Generator, clip: TrainingClip, variant: Variant, selva_dir: Path | None, seed: int,
    sampling: SamplingConfig, *, precision: torch.dtype, clip_features: str, decode_on: torch.device,
) -> Tensor:
    """Return the sound (samples,) of one clip, on the CPU; leaves the generator in eval mode.

    VAE and vocoder are loaded for this moment only: training needs the memory more.
    """
    latents = clip_latents(generator, clip, seed, sampling, precision=precision, clip_features=clip_features)
    vae = load_vae(variant.name, selva_dir, decode_on).drop_encoder()
    return decode_latents(latents.to(decode_on), vae, load_vocoder(variant.name, selva_dir, decode_on))[0].cpu()


class TrainingSample:
    """Generator of the sound of one clip, with guidance and always the same noise.

    Args:
        clip: best one that is held out, see ``held_out``. normalize: how the recorded sound is shown.
    """

    def __init__(
        self, clip: TrainingClip, held_out: bool, variant: Variant, selva_dir: Path | None, normalize: Normalize,
        seed: int,
    ) -> None:
        self.clip, self.variant, self.selva_dir, self.seed = clip, variant, selva_dir, seed
        self.name = f"{clip.id} ({'held out' if held_out else 'a training clip: none is held out'})"
        self.recorded = load_waveform(clip.audio_path, clip.sequence, normalize) if clip.audio_path else None
        self._decode_on_cpu = False  # after a first lack of memory
        self._given_up = False  # after a second one

    def try_write(self, run: TrainingRun, folder: Path) -> bool:
        """Write the sample of the run as it stands; say why if that fails, which must not end a run.

        After a lack of device memory the next sample is decoded on the CPU; if there is not enough for that either,
        samples are left out from then on. The model is back in training in any case.
        """
        if self._given_up:
            return False
        try:
            with run.evaluated():
                self.write(run, folder)
            return True
        except Exception as error:  # whatever it is: hours of training are worth more than a sample
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            if not is_out_of_memory(error):
                log.warning("no sample at step %d: %s", run.step, reason)
                return False
        finally:
            run.generator.train()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        self._given_up = self._decode_on_cpu or run.device.type == "cpu"
        self._decode_on_cpu = True
        log.warning("no sample at step %d: out of memory (%s); %s", run.step, reason,
                    "samples are left out from now on" if self._given_up else "the next one is decoded on the CPU")
        return False

    def is_there(self, step: int, folder: Path) -> bool:
        """Return True if the sample of a step was written, its picture last."""
        return (folder / f"sample_step{step:05d}.png").exists()

    def write(self, run: TrainingRun, folder: Path) -> None:
        """Write ``sample_step00500.wav`` and ``.png`` of the run as it stands; leaves the model in eval mode."""
        clip, sampling = self.clip, SamplingConfig()
        waveform = generate_sound(
            run.generator, clip, self.variant, self.selva_dir, self.seed, sampling, precision=run.precision,
            clip_features=run.config.clip_features,
            decode_on=torch.device("cpu") if self._decode_on_cpu else run.device)
        stem, rate = folder / f"sample_step{run.step:05d}", clip.sequence.sampling_rate
        write_audio(stem.with_suffix(".wav"), waveform, rate)
        panels = [(f"generated, guidance {sampling.cfg_strength}, {counted(sampling.num_steps, 'step')}", waveform)]
        if self.recorded is not None:
            panels.append(("recorded", self.recorded))
        plot_spectrograms(panels, rate, stem.with_suffix(".png"), f"step {run.step}: {self.name}, {clip.prompt!r}")
        log.info("sample: %s", stem.with_suffix(".wav"))
