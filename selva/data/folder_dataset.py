"""Training clips of a data folder.

    folder of clip.npz + clip.wav --mel, VAE, CLIP text--> FolderDataset     (encoded once, kept in the folder's cache)
    TensorDict memmap of MMAudio  -----------------------> MemmapDataset     (encoded already)

Preparing a folder reads every file once, encodes what the cache does not hold yet, and frees the encoders. Clips longer
than the longest allowed one are trained on in windows; shorter ones keep their length. Sound that is shorter than its
features is padded with silence, see :mod:`selva.data.padding`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selva.audio.config import Normalize
from selva.data.cache import DataCache, Settings
from selva.data.dataset import ClipDataset, Lengths, TrainingClip
from selva.data.folder import FolderClip, FolderScan, scan_folder
from selva.data.latents import FRONT_END, encode_latents, load_windows, silence_latent
from selva.data.memmap.reader import MemmapDataset, is_memmap
from selva.data.padding import Padding
from selva.data.plan import PlannedClip, Problems, plan_clips
from selva.data.texts import TextFeatures, weights_mark
from selva.features import load_features
from selva.inputs.suffixes import VIDEO_SUFFIXES
from selva.models.prompt_length import warn_of_cut_prompts
from selva.models.variants import Variant
from selva.models.zoo import build_mel
from selva.sequence import DEFAULT_DURATION_SEC, SYNC_TOKENS_PER_SEGMENT, first_clip_frame, sequence_config
from selva.utils.errors import UserError
from selva.utils.progress import Progress
from selva.utils.text import counted, listed
from selva.weights.load import load_vae

log = logging.getLogger(__name__)

NAMED = 20  # padded clips in a message
RECENT_WINDOWS = 256  # kept in memory, about 300 MB: reading a clip takes milliseconds, which short steps would notice


def load_clip_dataset(
    data_dir: Path,
    variant: Variant,
    selva_dir: Path | None,
    device: torch.device,
    *,
    max_duration_sec: float = DEFAULT_DURATION_SEC,
    normalize_audio: Normalize = "peak",
    use_cache: bool = True,
) -> tuple[ClipDataset, Problems]:
    """Return the clips of a data folder, ready for training, and (path, reason) for everything that cannot be used.

    :func:`open_clip_dataset` and :meth:`FolderDataset.prepare` in one.

    Args:
        data_dir: a folder of ``.npz`` and sounds, or a TensorDict memmap with its TSV beside it.
        device: where sound and texts are encoded, if the cache does not hold them.
        max_duration_sec: longer clips are trained on in windows of this length.
        normalize_audio: "peak" or "none", see :func:`selva.media.prepare_audio`.
        use_cache: False leaves the data folder as it is and encodes everything anew.

    Raises:
        FileNotFoundError: no such folder, or weights are missing.
        ValueError: the folder is of neither kind, or a memmap is damaged or made for another variant.
    """
    clips, problems = open_clip_dataset(
        data_dir, variant, selva_dir, max_duration_sec=max_duration_sec, normalize_audio=normalize_audio,
        use_cache=use_cache)
    if isinstance(clips, FolderDataset):
        problems += clips.prepare(device)
    return clips, problems


def open_clip_dataset(
    data_dir: Path,
    variant: Variant,
    selva_dir: Path | None,
    *,
    max_duration_sec: float = DEFAULT_DURATION_SEC,
    normalize_audio: Normalize = "peak",
    use_cache: bool = True,
) -> tuple[ClipDataset, Problems]:
    """Return the clips of a data folder before anything is encoded; arguments as of :func:`load_clip_dataset`."""
    data_dir = Path(data_dir)
    if is_memmap(data_dir):
        if max_duration_sec < DEFAULT_DURATION_SEC:
            raise UserError(f"{data_dir}: holds latents of {DEFAULT_DURATION_SEC:g} s, which cannot be cut to "
                             f"{max_duration_sec:g} s; leave out --duration")
        return MemmapDataset(data_dir, variant), []
    scan = scan_folder(data_dir)
    if not scan.clips and not scan.skipped:
        raise UserError(f"{data_dir}: holds neither feature files (.npz) with their sound (.wav, .flac or another) "
                        f"nor a TensorDict memmap (meta.json); {_meant(data_dir)}")
    cache = DataCache(data_dir, use_cache)
    clips, problems = plan_clips(scan, cache, variant, max_duration_sec)
    cache.flush()
    return FolderDataset(scan, clips, cache, variant, selva_dir, normalize_audio), [*scan.skipped, *problems]


# ---------------------------------------------------------------------------------------------------------------
# the set
# ---------------------------------------------------------------------------------------------------------------


def _meant(folder: Path) -> str:
    """Return a guess at the folder that was meant, from the content of one that is no data set."""
    inside = sorted(folder.iterdir())
    if sets := [str(path) for path in inside if (path / "meta.json").is_file() and path.is_dir()]:
        return f"give one of the memmaps in it: {listed(sets, 5)}"
    if any(path.suffix.lower() in VIDEO_SUFFIXES for path in inside):
        return "it holds videos, of which extract_features.py makes features"
    if any(path.is_dir() and any(path.glob("*.npz")) for path in inside):
        return f"give its subfolder: {listed([str(p) for p in inside if p.is_dir() and any(p.glob('*.npz'))], 5)}"
    return "extract_features.py writes both"


class FolderDataset(ClipDataset):
    """Clips of a folder: features from their ``.npz``, latents and text features from the cache.

    Args:
        scan: content of the folder. clips: those to train on. normalize_audio: "peak" or "none".
    """

    def __init__(
        self,
        scan: FolderScan,
        clips: Sequence[PlannedClip],
        cache: DataCache,
        variant: Variant,
        selva_dir: Path | None,
        normalize_audio: Normalize,
    ) -> None:
        self.scan, self.clips, self.cache, self.variant = scan, list(clips), cache, variant
        self.selva_dir = selva_dir
        self.normalize_audio: Normalize = normalize_audio
        self.texts = TextFeatures(cache, variant, selva_dir)
        self._latents_hashes: dict[Path, str] = {}  # sound file -> hash of the latents of all its windows
        self._silence: Tensor | None = None  # (C,) latent of silence, where a clip is padded
        self._recent = functools.lru_cache(maxsize=RECENT_WINDOWS)(self._read_clip)

    @property
    def ids(self) -> list[str]:
        return [clip.files.id for clip in self.clips]

    def __len__(self) -> int:
        return len(self.clips)

    def lengths(self, index: int) -> Lengths:
        sequence = self.clips[index].sequence
        return sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len

    def num_windows(self, index: int) -> int:
        return len(self.clips[index].starts)

    def clip(self, index: int, window: int = 0) -> TrainingClip:
        return self._recent(index, window)

    def origins(self, index: int) -> tuple[str, ...]:
        """Return the video and the sound of a clip, the sound by its file and, whatever the format, by its latents."""
        clip = self.clips[index]
        pairs = (("source", clip.files.source_sha256), ("sound", clip.audio_hash),
                 ("latents", self._latents_hashes.get(clip.files.audio_path, "")))
        return tuple(f"{what} {value}" for what, value in pairs if value)

    def content(self, index: int) -> dict[str, str]:
        clip = self.clips[index]
        return {
            "features": clip.files.features_hash,
            "sound": clip.audio_hash,
            "latents": self._latents_hashes.get(clip.files.audio_path, ""),
            "prompt": repr(clip.files.prompt),
            "windows": f"{self.lengths(index)} {clip.starts}",
        }

    def _read_clip(self, index: int, window: int) -> TrainingClip:
        clip = self.clips[index]
        bundle, sequence, start = load_features(clip.files.features_path), clip.sequence, clip.starts[window]
        clip_start, sync_start = first_clip_frame(start), start * SYNC_TOKENS_PER_SEGMENT
        clip_f = bundle.clip_features[0, clip_start : clip_start + sequence.clip_seq_len]
        sync_f = bundle.sync_features[0, sync_start : sync_start + sequence.sync_seq_len]
        latents = self._latents(clip, window)
        if self._has_own_text(clip.files):
            text_f = None if bundle.text_features is None else bundle.text_features[0]
        else:
            text_f = self.texts.find(clip.files.prompt)
        if (len(clip_f), len(sync_f)) != self.lengths(index)[1:] or latents is None or text_f is None:
            raise UserError(f"{clip.files.features_path}: this file or the cache of its folder was changed during the "
                            "training; start again, and leave both alone meanwhile")
        return TrainingClip(
            id=clip.files.id, prompt=clip.files.prompt, audio_path=clip.files.audio_path, sequence=sequence,
            mean=latents["mean"], std=latents["std"], text_f=text_f,
            clip_f=_counting(clip_f, clip), sync_f=_counting(sync_f, clip), has_video=clip.files.has_video,
            padding=self._padding(clip, window),
        )

    def _padding(self, clip: PlannedClip, window: int) -> Padding | None:
        num_sound, num_frames = clip.num_sound_frames(window), clip.sequence.latent_seq_len
        if num_sound == num_frames:
            return None
        assert self._silence is not None  # prepare() has it of every set with such clips
        return Padding(torch.arange(num_frames) >= num_sound, self._silence)

    # -- preparing -----------------------------------------------------------------------------------------------------

    def encode_share(self, rank: int, size: int, device: torch.device) -> None:
        """Encode the sounds of every ``size``-th clip, beginning with ``rank``, that the cache of the folder lacks.

        Every entry is a file of its own, so processes need not know of each other. What fails here fails again, and
        is reported, in :meth:`prepare`.
        """
        if self.cache.is_shared:
            missing = [clip for clip in self.clips[rank::size] if not self._has_latents(clip)]
            if missing:
                self._encode_missing(missing, device)

    def prepare(self, device: torch.device) -> Problems:
        """Encode what the cache lacks, drop the clips whose sound cannot be used, and return them with the reason."""
        self._encode_texts(device)
        problems = self._encode_sounds(device)
        unusable = {path for path, _ in problems}
        self.clips = [clip for clip in self.clips if clip.files.audio_path not in unusable]
        if padded := [clip for clip in self.clips if clip.is_padded]:
            self._silence = self._silence_latent(device)
            log.warning(
                "%d of %s: the sound is shorter than the features and is padded with silence (--padded_loss decides "
                "whether the silence is trained on): %s; check that each has the sound of its own video",
                len(padded), counted(len(self.clips), "clip"),
                listed([f"{c.files.id} ({c.sound_sec:.2f} of {c.files.duration_sec:.2f} s)" for c in padded], NAMED),
            )
        return problems

    def _encode_texts(self, device: torch.device) -> None:
        clips = [clip.files for clip in self.clips]
        warn_of_cut_prompts(((clip.id, clip.prompt) for clip in clips), self.variant.clip)
        if self.variant.family == "selva":
            _warn_of_other_prompts(clips)
        self.texts.encode({clip.prompt for clip in clips if not self._has_own_text(clip)}, device)

    def _encode_sounds(self, device: torch.device) -> Problems:
        """Encode the windows that the cache lacks, after another process that encodes the same folder.

        The mel front end and the VAE run in float32 (pitfall G2).
        """
        missing = [clip for clip in self.clips if not self._has_latents(clip)]
        if not missing:
            return []
        with self.cache.building():
            missing = [clip for clip in missing if not self._has_latents(clip)]
            return self._encode_missing(missing, device) if missing else []

    def _encode_missing(self, missing: Sequence[PlannedClip], device: torch.device) -> Problems:
        """Encode all windows of some clips; the mel front end and the VAE run in float32 (pitfall G2)."""
        problems: Problems = []
        vae = load_vae(self.variant.name, self.selva_dir, device, encoder_only=True)
        mel = build_mel(self.variant.mode).to(device)
        with Progress(len(missing), "encoding sound", "clips") as progress:
            for number, clip in enumerate(missing, 1):
                path = clip.files.audio_path
                starts_sec = [clip.start_sec(window) for window in range(len(clip.starts))]
                try:
                    waveforms = load_windows(path, clip.sequence, starts_sec, self.normalize_audio)
                except (ValueError, OSError) as error:
                    problems.append((path, str(error)))
                    continue
                encoded = []
                for window, waveform in enumerate(waveforms):
                    mean, std = encode_latents(waveform[None].to(device), mel, vae)  # each (1, N, C)
                    encoded.append({"mean": mean[0].cpu(), "std": std[0].cpu()})
                    self.cache.save("latents", self._latent_settings(clip, window), encoded[-1])
                self._latents_hashes[path] = _hash_of_latents(encoded)
                progress.update(number)
        return problems

    def _silence_latent(self, device: torch.device) -> Tensor:
        """Return (C,) the latent of digital silence, from the cache where that has it."""
        settings = {"audio": "digital silence", "mode": self.variant.mode, "front_end": FRONT_END,
                    "vae": self._vae_mark}
        found = (self.cache.load("latents", settings) or {}).get("mean")
        if found is None or found.shape != (self.variant.generator.latent_dim,):
            vae = load_vae(self.variant.name, self.selva_dir, device, encoder_only=True)
            mel = build_mel(self.variant.mode).to(device)
            found = silence_latent(sequence_config(self.variant.mode), mel, vae)
            self.cache.save("latents", settings, {"mean": found})
        return found

    # -- the cache -----------------------------------------------------------------------------------------------------

    def _latents(self, clip: PlannedClip, window: int) -> dict[str, Tensor] | None:
        """Return mean and std, each (N, C), from the cache, or None."""
        found = self.cache.load("latents", self._latent_settings(clip, window))
        expected = (clip.sequence.latent_seq_len, self.variant.generator.latent_dim)
        fits = found is not None and all(name in found and found[name].shape == expected for name in ("mean", "std"))
        return found if fits else None

    def _has_latents(self, clip: PlannedClip) -> bool:
        """Return True where the cache holds the latents of every window of a clip, and remember their hash."""
        found = []
        for window in range(len(clip.starts)):
            latents = self._latents(clip, window)
            if latents is None:
                return False
            found.append(latents)
        self._latents_hashes[clip.files.audio_path] = _hash_of_latents(found)
        return True

    def _has_own_text(self, clip: FolderClip) -> bool:
        """Return True where the feature file holds the text features of the prompt that is trained with."""
        return clip.text_shape == self.texts.shape and clip.extracted_prompt == clip.prompt

    def _latent_settings(self, clip: PlannedClip, window: int) -> Settings:
        return {
            "audio": clip.audio_hash,
            "start_sec": clip.start_sec(window),
            "samples": clip.sequence.num_audio_frames,
            "mode": self.variant.mode,
            "normalize": self.normalize_audio,
            "front_end": FRONT_END,
            "vae": self._vae_mark,
        }

    @functools.cached_property
    def _vae_mark(self) -> Any:
        return weights_mark(self.variant, self.selva_dir, "vae")


def _counting(features: Tensor, clip: PlannedClip) -> Tensor:
    """Return a copy of features, which lets go of the rest of a long clip; NaN where they stand for no pictures."""
    return features.clone() if clip.files.has_video else torch.full_like(features, torch.nan)


def _hash_of_latents(windows: Sequence[dict[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for latents in windows:
        digest.update(latents["mean"].contiguous().numpy().data)
    return digest.hexdigest()


def _warn_of_other_prompts(clips: Sequence[FolderClip]) -> None:
    """Warn of clips that are trained with other words than their sync features were extracted with (pitfall B6)."""
    others = [clip for clip in clips if clip.has_video and clip.prompt != clip.extracted_prompt]
    if others:
        log.warning(
            "extracted with another prompt than now: %d of %s, for example %s: %r, extracted with %r; better extract "
            "again", len(others), counted(len(clips), "clip"), others[0].id,
            others[0].prompt, others[0].extracted_prompt,
        )
