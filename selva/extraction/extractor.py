"""Features that the generator reads, of a video and a prompt.

    video --8 fps--> CLIP image tower --> clip_features (1, T, ·)
          --25 fps-> TextSynch (SelVA, with T5 of the prompt) or Synchformer (MMAudio) --> sync_features (1, S, ·)
    prompt --------> CLIP text tower --> text_features (1, 77, ·)

Encoders are loaded when first needed. Few texts are encoded at once, so that their towers can be freed before the
picture encoders are loaded; of many texts only the latest stay in memory.

CLIP frames go through their tower in passes of a fixed number of frames, of one clip or of several. Every frame is
computed by itself, and with the shape of a pass its arithmetic is fixed too: the features of a clip do not depend on
which other clips went with it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from selva.features import FeatureBundle
from selva.media import SELVA_FILL_SEC, MaskSettings, VideoFrames, read_video, sample_pictures
from selva.models.clip_t5 import ClipImage
from selva.models.synchformer import Synchformer
from selva.models.textsynch import TextSynch
from selva.models.variants import Variant
from selva.sequence import DEFAULT_DURATION_SEC, sequence_config
from selva.weights.load import load_clip_image, load_clip_text, load_generator, load_t5, load_video_encoder

log = logging.getLogger(__name__)

# Overlapping 16-frame segments per pass of the video encoder: more only need more memory, and on a CPU are slower.
SEGMENTS_PER_PASS = {"cpu": 2, "cuda": 8, "mps": 4}
# Frames per pass of the CLIP tower; 8 s of video are 64.
FRAMES_PER_PASS = {"cpu": 16, "cuda": 64, "mps": 16}
# Encoded prompts kept in memory, half a megabyte each at full size.
CACHED_TEXTS = 256

# Part of the settings that decide whether existing features are current; raise it when the features change.
EXTRACTION_VERSION = 1


def clip_settings(
    path: Path,
    sha256: str,
    prompt: str,
    start_sec: float,
    duration_sec: float,
    encoders: str,
    precision: str,
    mask: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the settings that decide the features of a clip; equal ones mean that they need not be redone.

    Args:
        sha256: of the video's content. encoders: :func:`selva.weights.find.encoders_identity`. precision: "float32" ...
        mask: which one, and how it was used; None without one.
    """
    settings = {
        "extraction_version": EXTRACTION_VERSION,
        "source": path.name,
        "source_sha256": sha256,
        "prompt": prompt,
        "start_sec": start_sec,
        "duration_sec": duration_sec,
        "encoders": encoders,
        "precision": precision,
    }
    return settings if mask is None else {**settings, "mask": dict(mask)}


def frames_to_sync_input(frames: Tensor) -> Tensor:
    """Return uint8 frames (F, 3, H, W) as the (1, F, 3, H, W) float32 input in [-1, 1] of the video encoders."""
    return (frames.float() / 255 - 0.5)[None] / 0.5


Key = TypeVar("Key")


class FramePasses(Generic[Key]):
    """Brings the frames of many clips through an image tower, always the same number at a time.

    Args:
        encode: (frames_per_pass, 3, H, W) uint8 -> (frames_per_pass, D). frames_per_pass: size of every pass.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], frames_per_pass: int) -> None:
        self.encode, self.frames_per_pass = encode, frames_per_pass
        self._waiting: deque[tuple[Key, Tensor]] = deque()  # frames of a clip that were in no pass yet
        self._encoded: dict[Key, list[Tensor]] = {}
        self._num_waiting = 0

    def add(self, key: Key, frames: Tensor) -> Iterator[tuple[Key, Tensor]]:
        """Take (T, 3, H, W) uint8 frames of a clip; yield (key, (T, D)) of the clips that are complete with them."""
        self._waiting.append((key, frames))
        self._num_waiting += len(frames)
        while self._num_waiting >= self.frames_per_pass:
            yield from self._run_pass()

    def flush(self) -> Iterator[tuple[Key, Tensor]]:
        """Yield (key, (T, D)) of the clips that were still waiting for a full pass."""
        if self._num_waiting:
            yield from self._run_pass()

    def _run_pass(self) -> Iterator[tuple[Key, Tensor]]:
        taken: list[tuple[Key, Tensor, bool]] = []  # whose, frames, whether they are the last of the clip
        room = self.frames_per_pass
        while room and self._waiting:
            key, frames = self._waiting.popleft()
            if len(frames) > room:
                self._waiting.appendleft((key, frames[room:]))
            taken.append((key, frames[:room], len(frames) <= room))
            room -= len(taken[-1][1])
        self._num_waiting -= self.frames_per_pass - room
        pictures = torch.cat([frames for _, frames, _ in taken])
        if room:
            pictures = torch.cat([pictures, pictures.new_zeros(room, *pictures.shape[1:])])
        features = self.encode(pictures)
        for key, frames, complete in taken:
            own, features = features[: len(frames)], features[len(frames) :]
            parts = self._encoded.setdefault(key, [])
            parts.append(own)
            if complete:
                yield key, torch.cat(self._encoded.pop(key))


class TextCache:
    """The prompts that a text encoder has encoded lately; the encoder is loaded when one is not among them.

    Args:
        load: returns the encoder. encode: (encoder, prompt) -> tensors on the CPU.
    """

    def __init__(self, load: Callable[[], Any], encode: Callable[[Any, str], Any]) -> None:
        self.load, self.encode = load, encode
        self._encoder: Any = None
        self._known: OrderedDict[str, Any] = OrderedDict()

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encode prompts, and free the encoder."""
        for prompt in sorted(set(prompts) - set(self._known)):
            self[prompt]
        self.free()

    def free(self) -> None:
        """Let go of the encoder; what it has encoded stays."""
        self._encoder = None

    def __getitem__(self, prompt: str) -> Any:
        if prompt in self._known:
            self._known.move_to_end(prompt)
            return self._known[prompt]
        if self._encoder is None:
            self._encoder = self.load()
        self._known[prompt] = self.encode(self._encoder, prompt)
        while len(self._known) > CACHED_TEXTS:
            self._known.popitem(last=False)
        return self._known[prompt]


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
        where = (variant.name, selva_dir, device)
        t5_dtype = torch.float32 if precision == torch.float16 else precision
        # One by one: the length of another prompt in the batch would change the last bits.
        self._texts = TextCache(  # prompt -> (1, 77, text_dim)
            lambda: load_clip_text(*where, precision), lambda encoder, prompt: encoder.encode([prompt]).float().cpu()
        )
        self._t5 = TextCache(  # prompt -> (1, L, ·) and its mask
            lambda: load_t5(*where, t5_dtype), lambda encoder, prompt: tuple(x.cpu() for x in encoder.encode([prompt]))
        )
        self._clip_image: ClipImage | None = None
        self._video_encoder: TextSynch | Synchformer | None = None
        self._empty: tuple[Tensor, Tensor] | None = None  # one token of each

    def prepare_texts(self, prompts: Iterable[str], sync: bool = True) -> None:
        """Encode the prompts that are not known yet; the text encoders are loaded, used and freed.

        More than ``CACHED_TEXTS`` cannot be kept: then the encoders stay, and each prompt is encoded when it is needed.

        Args:
            sync: also encode them for the text-conditioned video encoder.
        """
        prompts = set(prompts)
        if len(prompts) > CACHED_TEXTS:
            return
        self._texts.prepare(prompts)
        if sync and self.variant.t5 is not None:
            self._t5.prepare(prompts)

    @torch.no_grad()
    def text_features(self, prompt: str) -> Tensor:
        """Return (1, 77, text_dim) float32 on the CPU."""
        return self._texts[prompt]

    @torch.no_grad()
    def sync_text(self, prompt: str) -> tuple[Tensor, Tensor] | None:
        """Return (1, L, t5_dim) and mask (1, L) on the CPU for the video encoder; None for one that reads no text."""
        return None if self.variant.t5 is None else self._t5[prompt]

    def clip_features(self, frames: Tensor) -> Tensor:
        """Return (1, T, clip_dim) float32 on the CPU from uint8 frames (T, 3, H, W) at 8 per second."""
        passes: FramePasses[str] = self.clip_passes()
        ((_, features),) = [*passes.add("clip", frames), *passes.flush()]
        return features[None]

    def clip_passes(self) -> FramePasses[Any]:
        """Return the passes of the frames of many clips through the CLIP tower; results are on the CPU, float32."""
        return FramePasses(self._clip_pass, FRAMES_PER_PASS[self.device.type])

    @torch.no_grad()
    def _clip_pass(self, frames: Tensor) -> Tensor:
        if self._clip_image is None:
            self._clip_image = load_clip_image(self.variant.name, self.selva_dir, self.device, self.precision)
            self._clip_image.batch_size = FRAMES_PER_PASS[self.device.type]
        return self._clip_image.encode(frames).float().cpu()

    @torch.no_grad()
    def sync_features(self, frames: Tensor, prompt: str) -> Tensor:
        """Return (1, S, sync_dim) float32 on the CPU from uint8 frames (F, 3, H, W) at 25 per second."""
        encoder = self._video_encoder
        if encoder is None:
            encoder = load_video_encoder(self.variant.name, self.selva_dir, self.device, self.precision)
            self._video_encoder = encoder
        pictures = frames_to_sync_input(frames.to(self.device)).to(self.precision)  # bytes travel four times as fast
        segments = SEGMENTS_PER_PASS[self.device.type]
        known = self.sync_text(prompt)
        if known is None:
            assert isinstance(encoder, Synchformer)
            return encoder.encode(pictures, segment_batch=segments).float().cpu()
        assert isinstance(encoder, TextSynch)
        text, mask = known[0].to(self.device, self.precision), known[1].to(self.device)
        return encoder.encode(pictures, text, mask, segment_batch=segments).float().cpu()

    def read(
        self, path: Path, duration_sec: float = DEFAULT_DURATION_SEC, start_sec: float = 0.0,
        mask: MaskSettings | None = None,
    ) -> VideoFrames:
        """Return the frames of a video in the sizes of this variant's encoders, with the mask laid on them.

        The last frame is held for up to 0.125 s, as in SelVA's training data, so that a video of exactly 8 s, whose
        last frame begins before its end, makes a clip of 8 s.
        """
        return read_video(path, duration_sec, start_sec, mask=mask, **self._frame_sizes())

    def sample(
        self, picture: Callable[[int], Tensor], num_pictures: int, fps: float,
        duration_sec: float = DEFAULT_DURATION_SEC, mask: MaskSettings | None = None, keep: np.ndarray | None = None,
    ) -> VideoFrames:
        """Return the frames that :meth:`read` returns for a video of these pictures; see :func:`sample_pictures`."""
        return sample_pictures(picture, num_pictures, fps, duration_sec, mask=mask, keep=keep, **self._frame_sizes())

    def _frame_sizes(self) -> dict[str, Any]:
        variant = self.variant
        return {"clip_size": variant.clip_image_size, "sync_size": variant.sync_image_size,
                "sync_crop": variant.sync_crop, "fill_sec": SELVA_FILL_SEC}

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

    @torch.no_grad()
    def empty_features(self, duration_sec: float) -> tuple[Tensor, Tensor]:
        """Return (1, T, clip_dim) and (1, S, sync_dim) that the published model takes for no pictures, learned."""
        if self._empty is None:
            generator = load_generator(self.variant.name, self.selva_dir)
            self._empty = generator.empty_clip_feat.clone(), generator.empty_sync_feat.clone()
        lengths = sequence_config(self.variant.mode, duration_sec)
        clip, sync = self._empty
        return clip.expand(1, lengths.clip_seq_len, -1), sync.expand(1, lengths.sync_seq_len, -1)

    def free(self) -> None:
        """Let go of the encoders; encoded prompts stay."""
        self._clip_image = self._video_encoder = None
        self._texts.free()
        self._t5.free()
