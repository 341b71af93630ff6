"""Sample in the middle of training: a sound generated the way ``infer.py`` does it, beside the recorded one."""

from __future__ import annotations

import logging
from pathlib import Path

from selva.audio.config import Normalize
from selva.data.dataset import TrainingClip
from selva.data.latents import load_waveform
from selva.flow import SamplingConfig
from selva.media import write_audio
from selva.models.variants import Variant
from selva.sampling import decode_latents, sample_latents
from selva.training.run import TrainingRun
from selva.utils.plots import plot_spectrograms
from selva.weights.load import load_vae, load_vocoder

log = logging.getLogger(__name__)


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

    def write(self, run: TrainingRun, folder: Path) -> None:
        """Write ``sample_step00500.wav`` and ``.png`` of the run as it stands."""
        clip, generator, device = self.clip, run.generator, run.device
        generator.eval()
        generator.set_sequence(*clip.lengths)
        empty_clip, empty_sync, _ = generator.empty_features(1)
        use_clip = clip.has_video and run.config.clip_features == "use"
        sampling = SamplingConfig()
        latents = sample_latents(
            generator,
            clip.clip_f[None].to(device) if use_clip else empty_clip,
            clip.sync_f[None].to(device) if clip.has_video else empty_sync,
            clip.text_f[None].to(device), [self.seed], sampling, precision=run.precision,
        )
        generator.train()
        # Loaded for this moment only: training needs the memory more.
        vae = load_vae(self.variant.name, self.selva_dir, device).drop_encoder()
        waveform = decode_latents(latents, vae, load_vocoder(self.variant.name, self.selva_dir, device))[0].cpu()
        stem, rate = folder / f"sample_step{run.step:05d}", clip.sequence.sampling_rate
        write_audio(stem.with_suffix(".wav"), waveform, rate)
        panels = [(f"generated, guidance {sampling.cfg_strength}, {sampling.num_steps} steps", waveform)]
        if self.recorded is not None:
            panels.append(("recorded", self.recorded))
        plot_spectrograms(panels, rate, stem.with_suffix(".png"), f"step {run.step}: {self.name}, {clip.prompt!r}")
        log.info("sample: %s", stem.with_suffix(".wav"))
