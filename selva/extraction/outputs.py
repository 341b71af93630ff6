"""Outputs of an extraction: feature files with their sound beside them, or the rows of a memmap.

Both outputs have the same methods, so that the run (:mod:`selva.extraction.pipeline`) need not know which one it feeds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from selva.data.memmap.writer import MemmapWriter
from selva.extraction.manifest import MANIFEST_FILE
from selva.extraction.pairs import PairFolder
from selva.extraction.reader import STATE_FOLDER, ReadClip
from selva.features import FeatureBundle
from selva.inputs.jobs import ClipJob
from selva.models.variants import Variant
from selva.utils.text import counted

log = logging.getLogger(__name__)


def beside_memmap(folder: Path, name: str) -> Path:
    """Return the path of a file about a memmap: not in it, whose files belong to its format."""
    return folder.with_name(f"{folder.name}.{name}")


def memmap_manifest(folder: Path) -> tuple[Path, Path]:
    """Return the manifest of a memmap, and the folder for its journals."""
    return beside_memmap(folder, MANIFEST_FILE), folder.with_name(f".{folder.name}.extract")


@dataclass(frozen=True)
class EncodedClip:
    """Features of one clip as the encoders made them, all float32 on the CPU.

    Attributes:
        clip_features: (T, clip_dim). sync_features: (1, S, sync_dim). text_features: (1, 77, text_dim).
        latents: mean and deviation, each (1, N, C); None if the clip was read without sound.
    """

    clip_features: Tensor
    sync_features: Tensor
    text_features: Tensor
    latents: tuple[Tensor, Tensor] | None


class FeatureFiles:
    """One ``.npz`` per clip in a folder, with the sound that the reader of the clip has made ready beside it.

    Args:
        folder: of the files. variant: stored in them, for information. weights: identity of those of the encoders.
    """

    def __init__(self, folder: Path, variant: Variant, weights: str = "") -> None:
        self.folder, self.variant, self.weights = folder, variant, weights
        self.manifest, self.state = folder / MANIFEST_FILE, folder / STATE_FOLDER
        self.state.mkdir(parents=True, exist_ok=True)
        self.pairs = PairFolder(folder, self.state)
        self.digests: dict[int, str] = {}  # the readers look into the files instead

    def beside(self, name: str) -> Path:
        """Return the path of a file about the whole output."""
        return self.folder / name

    def confirm(self, index: int, digest: str) -> bool:
        """Return True where a clip that its reader found to be current still is."""
        return True

    def write(self, job: ClipJob, clip: ReadClip, encoded: EncodedClip) -> None:
        """Place the features of a clip with its sound, both or neither."""
        assert clip.duration_sec is not None  # READY, so it was decoded
        mean, std = encoded.latents or (None, None)
        bundle = FeatureBundle(
            clip_features=encoded.clip_features[None],
            sync_features=encoded.sync_features,
            duration=clip.duration_sec,
            prompt=job.prompt,
            variant=self.variant.name,
            text_features=encoded.text_features,
            latent_mean=mean,
            latent_std=std,
            fps=clip.fps or None,
            source_sha256=clip.settings["source_sha256"],
            settings=clip.settings,
            origin={"sound": clip.sound.file, "sound_sha256": clip.sound.sha256, "weights": self.weights},
        )
        self.pairs.place(job, bundle, clip.sound)

    def leave_out(self, clip: ReadClip) -> None:
        """Let go of the sound of a clip without features; a memmap has to record it."""
        self.pairs.drop(clip.sound)

    def files_of(self, job: ClipJob, clip: ReadClip) -> list[str]:
        """Return the names of a clip's files, in the folder of the manifest."""
        return [f"{job.id}.npz", *([clip.sound.file] if clip.sound.file else [])]

    def path_of(self, job: ClipJob) -> Path:
        """Return the file of a clip's features."""
        return self.folder / f"{job.id}.npz"

    def finish(self) -> list[Path]:
        """Return the paths that exist only after the last clip."""
        return []

    def close(self) -> None:
        self.pairs.close()


def publish(writer: MemmapWriter) -> bool:
    """Move a memmap into place if all of its rows are accounted for, else say how many are not; return True if so."""
    if writer.publish_if_complete():
        return True
    log.info("%s: %d of %s still to come from other parts of the work; until all parts have run, the data set of "
             "before stays", writer.files.folder, writer.num_missing, counted(len(writer.ids), "row"))
    return False


class MemmapRows:
    """One row per clip in the memmap ``folder``, with ``folder.tsv`` beside it; readable once all rows are there.

    Args:
        folder: of the memmap. variant: whose latents and features. jobs: the whole work list.
        settings: everything that decides the content of all rows alike. recipe: everything else, see the writer.
    """

    def __init__(
        self, folder: Path, variant: Variant, jobs: Sequence[ClipJob], settings: Any, recipe: str = ""
    ) -> None:
        self.folder = folder
        self.manifest, self.state = memmap_manifest(folder)
        rows = [(job.id, job.prompt) for job in jobs]
        self.writer = MemmapWriter(folder, variant, rows, video=True, settings=settings, recipe=recipe)
        self.digests = self.writer.digests()
        self.pairs = None

    def beside(self, name: str) -> Path:
        return beside_memmap(self.folder, name)

    def confirm(self, index: int, digest: str) -> bool:
        return self.writer.is_current(index, digest)

    def write(self, job: ClipJob, clip: ReadClip, encoded: EncodedClip) -> None:
        assert encoded.latents is not None  # clips of a memmap are read with sound
        mean, std = encoded.latents
        rows = {"mean": mean[0], "std": std[0], "text_features": encoded.text_features[0],
                "clip_features": encoded.clip_features, "sync_features": encoded.sync_features[0]}
        self.writer.write(clip.index, rows, clip.digest)

    def leave_out(self, clip: ReadClip) -> None:
        self.writer.skip(clip.index)

    def files_of(self, job: ClipJob, clip: ReadClip) -> list[str]:
        return [self.folder.name]

    def path_of(self, job: ClipJob) -> Path | None:
        """Return None: a row has no file of its own."""
        return None

    def finish(self) -> list[Path]:
        return [self.folder] if publish(self.writer) else []

    def close(self) -> None:
        self.writer.close()
