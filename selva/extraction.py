"""From a video and a prompt to the features that the generator reads.

    video --8 fps--> CLIP image tower --> clip_features (1, T, ·)
          --25 fps-> TextSynch (SelVA, with T5 of the prompt) or Synchformer (MMAudio) --> sync_features (1, S, ·)
    prompt --------> CLIP text tower --> text_features (1, 77, ·)

Encoders are loaded when first needed. Texts are encoded for all clips at once, so that their towers can be freed before
the picture encoders are loaded.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selva.features import FeatureBundle
from selva.media import SELVA_FILL_SEC, MaskSettings, VideoFrames, read_video
from selva.models.zoo import Variant
from selva.sequence import DEFAULT_DURATION_SEC
from selva.weights import load_clip_image, load_clip_text, load_t5, load_video_encoder

log = logging.getLogger(__name__)

# Overlapping 16-frame segments per pass of the video encoder: more only need more memory, and on a CPU are slower.
SEGMENTS_PER_PASS = {"cpu": 2, "cuda": 8, "mps": 4}

# Part of the settings that decide whether existing features are current; raise it when the features change.
EXTRACTION_VERSION = 1


def source_hash(path: Path) -> str:
    """Return the SHA-256 of a file's whole content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def frames_to_sync_input(frames: Tensor) -> Tensor:
    """Return uint8 frames (F, 3, H, W) as the (1, F, 3, H, W) float32 input in [-1, 1] of the video encoders."""
    return (frames.float() / 255 - 0.5)[None] / 0.5


class FeatureExtractor:
    """The encoders of one variant, loaded on first use.

    Args:
        variant: whose encoders. selva_dir: where their weights are; None for the built-in model.
        device: where they run.
        precision: dtype of their weights; float32 is what the base models were trained on. T5, which overflows in
            float16, then runs in float32.
    """

    def __init__(
        self, variant: Variant, selva_dir: Path | None, device: torch.device, precision: torch.dtype = torch.float32
    ) -> None:
        self.variant, self.selva_dir, self.device, self.precision = variant, selva_dir, device, precision
        self._texts: dict[str, Tensor] = {}  # prompt -> (1, 77, text_dim)
        self._t5: dict[str, tuple[Tensor, Tensor]] = {}  # prompt -> (1, L, ·) and its mask
        self._clip_image = None
        self._video_encoder = None

    @torch.no_grad()
    def prepare_texts(self, prompts: Sequence[str], sync: bool = True) -> None:
        """Encode the prompts that are not known yet; the text encoders are loaded, used and freed.

        Args:
            sync: also encode them for the text-conditioned video encoder.
        """
        new = sorted(set(prompts) - set(self._texts))
        if new:
            encoder = load_clip_text(self.variant.name, self.selva_dir, self.device, self.precision)
            self._texts.update((p, encoder.encode([p]).float().cpu()) for p in new)
        new = sorted(set(prompts) - set(self._t5))
        if new and sync and self.variant.t5 is not None:
            dtype = torch.float32 if self.precision == torch.float16 else self.precision
            encoder = load_t5(self.variant.name, self.selva_dir, self.device, dtype)
            self._t5.update((p, tuple(x.cpu() for x in encoder.encode([p]))) for p in new)

    def text_features(self, prompt: str) -> Tensor:
        """Return (1, 77, text_dim) float32 on the CPU."""
        self.prepare_texts([prompt], sync=False)
        return self._texts[prompt]

    @torch.no_grad()
    def clip_features(self, frames: Tensor) -> Tensor:
        """Return (1, T, clip_dim) float32 on the CPU from uint8 frames (T, 3, H, W) at 8 per second."""
        if self._clip_image is None:
            self._clip_image = load_clip_image(self.variant.name, self.selva_dir, self.device, self.precision)
        return self._clip_image.encode(frames)[None].float().cpu()

    @torch.no_grad()
    def sync_features(self, frames: Tensor, prompt: str) -> Tensor:
        """Return (1, S, sync_dim) float32 on the CPU from uint8 frames (F, 3, H, W) at 25 per second."""
        self.prepare_texts([prompt])
        if self._video_encoder is None:
            self._video_encoder = load_video_encoder(
                self.variant.name, self.selva_dir, self.device, self.precision
            )
        pictures = frames_to_sync_input(frames).to(self.device, self.precision)
        segments = SEGMENTS_PER_PASS[self.device.type]
        if self.variant.t5 is None:
            return self._video_encoder.encode(pictures, segment_batch=segments).float().cpu()
        text, mask = self._t5[prompt]
        text, mask = text.to(self.device, self.precision), mask.to(self.device)
        return self._video_encoder.encode(pictures, text, mask, segment_batch=segments).float().cpu()

    def read(
        self, path: Path, duration_sec: float = DEFAULT_DURATION_SEC, start_sec: float = 0.0,
        mask: MaskSettings | None = None,
    ) -> VideoFrames:
        """Return the frames of a video in the sizes of this variant's encoders, with the mask laid on them.

        The last frame is held for up to 0.125 s, as in SelVA's training data, so that a video of exactly 8 s, whose
        last frame begins before its end, makes a clip of 8 s.
        """
        return read_video(
            path, duration_sec, start_sec, clip_size=self.variant.clip_image_size,
            sync_size=self.variant.sync_image_size, sync_crop=self.variant.sync_crop, fill_sec=SELVA_FILL_SEC,
            mask=mask,
        )

    def extract(self, frames: VideoFrames, prompt: str, settings: dict[str, Any] | None = None) -> FeatureBundle:
        """Return the bundle of one clip; ``settings`` are stored in it."""
        return FeatureBundle(
            clip_features=self.clip_features(frames.clip_frames),
            sync_features=self.sync_features(frames.sync_frames, prompt),
            duration=frames.duration_sec,
            prompt=prompt,
            variant=self.variant.name,
            text_features=self.text_features(prompt),
            settings=settings,
        )

    def settings(self, path: Path, prompt: str, duration_sec: float, start_sec: float) -> dict[str, Any]:
        """Return everything that decides the features of a clip; equal settings mean that they need not be redone."""
        return {
            "extraction_version": EXTRACTION_VERSION,
            "source": path.name,
            "source_sha256": source_hash(path),
            "prompt": prompt,
            "start_sec": start_sec,
            "duration_sec": duration_sec,
            "encoders": self.variant.encoders,
            "precision": str(self.precision).removeprefix("torch."),
        }

    def free(self) -> None:
        """Let go of the picture encoders."""
        self._clip_image = self._video_encoder = None
