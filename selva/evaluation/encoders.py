"""Networks that evaluation listens with: Synchformer for timing, CLAP for captions, AST for classes. All are optional.

Each takes sounds one by one, so that memory does not depend on their number. CLAP and AST are transformers' own and are
read from a local folder; nothing is downloaded here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selva.media.frames import read_video
from selva.models.config import VideoEncoderConfig
from selva.models.synchformer_av import SynchformerAV
from selva.utils.errors import UserError
from selva.weights.load import read_checkpoint
from selva.weights.transformers_folder import load_from_folder

log = logging.getLogger(__name__)

CLAP_RATE, AST_RATE = 48000, 16000


def load_synchformer(path: Path, device: torch.device, config: VideoEncoderConfig | None = None) -> SynchformerAV:
    """Return the whole Synchformer in eval mode, of the published ``synchformer_state_dict.pth``.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: damaged, or without the audio branch: the file that generation needs may be the visual part alone.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file; MMAudio's release has it as synchformer_state_dict.pth", str(path))
    weights = read_checkpoint(path)
    if not any(name.startswith("afeat_extractor.") for name in weights):
        raise UserError(f"{path}: holds no audio branch (afeat_extractor...), which DeSync needs; use the whole "
                        "synchformer_state_dict.pth of 950 MB from MMAudio's release")
    with torch.device("meta"):
        network = SynchformerAV(config)
    network.to_empty(device="cpu").load_published(weights)
    return network.eval().requires_grad_(False).to(device)


@torch.inference_mode()
def video_features(network: SynchformerAV, path: Path, duration_sec: float) -> Tensor:
    """Return (S, 8, dim) visual features on the CPU of the first ``duration_sec`` seconds of a video.

    Raises:
        UserError: not a video, damaged, or too short for a segment.
    """
    video = read_video(path, duration_sec, clip_size=8, sync_size=network.config.image_size, sync_crop=True)
    device = network.vproj.weight.device
    pictures = video.sync_frames[None].to(device, torch.float32) / 127.5 - 1  # (1, F, 3, H, W) in [-1, 1]
    return network.encode_video(pictures, segment_batch=4)[0].cpu()


@torch.inference_mode()
def sync_audio_features(network: SynchformerAV, sound: Tensor) -> Tensor:
    """Return (S, 6, dim) audio features on the CPU of (samples,) at 16 kHz."""
    return network.encode_audio(sound[None].to(network.vproj.weight.device))[0].cpu()


class Clap:
    """CLAP of a local folder: sounds and captions -> embeddings of one space.

    Raises:
        UserError: the folder holds no CLAP model that transformers can read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.model, self.processor = load_from_folder(folder, "ClapModel", "ClapProcessor", "laion/clap-htsat-unfused")
        self.model.to(device)

    @torch.inference_mode()
    def sound(self, sound: Tensor) -> np.ndarray:
        """Return the (dim,) float32 embedding of (samples,) at 48 kHz, of which the first 10 s are heard."""
        extractor = self.processor.feature_extractor
        # Of longer sounds it would take a random part, another one in every run.
        part = sound[: extractor.nb_max_samples].numpy()
        features = extractor(part, sampling_rate=CLAP_RATE, return_tensors="pt")
        return _vector(self.model.get_audio_features(**features.to(self.device)))

    @torch.inference_mode()
    def text(self, caption: str) -> np.ndarray:
        """Return the (dim,) float32 embedding of a caption."""
        tokens = self.processor.tokenizer(caption, truncation=True, return_tensors="pt")
        return _vector(self.model.get_text_features(**tokens.to(self.device)))


class Ast:
    """Audio spectrogram transformer of a local folder: sounds -> class logits and an embedding.

    Raises:
        UserError: the folder holds no such model that transformers can read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.model, self.extractor = load_from_folder(
            folder, "ASTForAudioClassification", "ASTFeatureExtractor", "MIT/ast-finetuned-audioset-10-10-0.4593")
        self.model.to(device)

    @torch.inference_mode()
    def sound(self, sound: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return the (classes,) logits and the (dim,) embedding, both float32, of (samples,) at 16 kHz."""
        features = self.extractor(sound.numpy(), sampling_rate=AST_RATE, return_tensors="pt").to(self.device)
        output = self.model(**features, output_hidden_states=True)
        # The classifier reads the mean of the class and the distillation token.
        return _vector(output.logits), _vector(output.hidden_states[-1][:, :2].mean(dim=1))


def _vector(output: Any) -> np.ndarray:
    """Return the only row of a batch of one; newer versions of transformers wrap it into an object."""
    tensor = output if isinstance(output, Tensor) else output.pooler_output
    return tensor[0].float().cpu().numpy()

