"""Features with their sound in a folder: whose they are, whether they are current, and both placed together.

    <folder>/dog.npz  dog.flac      the pair; the features name the sound that was placed with them, and its hash
    <state>/written.jsonl           a line for every pair, written before it is placed: what an extraction may replace
    <state>/waiting/dog.flac        a sound that waits for its features

Only what an extraction has written is ever replaced. Before a new sound comes, the features of the old one go, so that
a process may be killed at any point and no features lie beside the sound of another moment.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from selva.extraction.manifest import DONE, INCOMPLETE_FILE, MANIFEST_FILE
from selva.features import FeatureBundle, load_features, save_features
from selva.inputs.jobs import ClipJob
from selva.inputs.suffixes import AUDIO_SUFFIXES
from selva.media import read_audio
from selva.utils.errors import UserError
from selva.utils.files import as_utf8, flush_folder, json_lines, real_path, sound_path, source_hash

log = logging.getLogger(__name__)

LEDGER_FILE, WAITING_FOLDER = "written.jsonl", "waiting"
OVERWRITE_ADVICE = "or replace it with --overwrite"


@dataclass(frozen=True)
class StagedSound:
    """A sound that waits to be placed with its features.

    Attributes:
        path: where it waits; None if the one in the folder is the same already.
        file: name in the folder; "" if the features have no sound. sha256: of the file; "" if there is none.
        replaces: hash of the file that it takes the place of; "" if there was none.
        obsolete: names of sounds of an earlier extraction that it takes the place of.
    """

    path: Path | None = None
    file: str = ""
    sha256: str = ""
    replaces: str = ""
    obsolete: tuple[str, ...] = ()


class PairFolder:
    """The pairs of one folder, and what is known about who wrote them. May be copied to other processes.

    Args:
        folder: of the pairs. state: the hidden folder of the extraction in it.
    """

    def __init__(self, folder: Path, state: Path) -> None:
        self.folder, self.ledger, self.waiting = folder, state / LEDGER_FILE, state / WAITING_FOLDER
        self.sources: dict[str, str] = {}  # id -> the video, resolved
        self.sounds: dict[str, set[str]] = {}  # file name -> hashes
        for name in (MANIFEST_FILE, INCOMPLETE_FILE):
            for row in json_lines(folder / name):
                if row.get("status") == DONE and isinstance(row.get("source"), str):
                    self.sources[row["id"]] = str(real_path(row["source"]))
        for row in json_lines(self.ledger):
            if isinstance(row.get("id"), str):
                self.sources[row["id"]] = str(row.get("source", ""))
                if row.get("sound"):
                    self.sounds.setdefault(str(row["sound"]), set()).add(str(row.get("sha256", "")))

    def features(self, clip_id: str) -> FeatureBundle | None:
        """Return the features that a clip has; None if there are none, or they are damaged."""
        path = self.folder / f"{clip_id}.npz"
        if not path.exists():
            return None
        try:
            return load_features(path)
        except (ValueError, OSError) as error:
            log.warning("%s; extracting again", error)
            return None

    # -- whose is it ---------------------------------------------------------------------------------------------------

    def check_features(self, job: ClipJob, bundle: FeatureBundle, sha256: str) -> None:
        """Return if the features of a clip are those of an earlier extraction of the same video.

        Args:
            sha256: of the video.

        Raises:
            ValueError: they are of another video, or of another program.
        """
        path, settings = self.folder / f"{job.id}.npz", bundle.settings or {}
        if "source_sha256" not in settings:
            raise UserError(f"{path}: is in the way, it was not made by extract_features.py; move it, choose another "
                             f"--output_dir, {OVERWRITE_ADVICE}")
        if settings["source_sha256"] == sha256:
            return  # the video may have been moved
        known = self.sources.get(job.id)
        if known != str(real_path(job.path)):
            holds = known or f"another {settings.get('source', 'video')}"
            raise UserError(f"{job.path}: {path} holds {holds}, another video; give each its own name (--name, or a "
                             f"table with ids), choose another --output_dir, {OVERWRITE_ADVICE}")

    def is_ours(self, name: str, sha256: str, bundle: FeatureBundle | None) -> bool:
        """Return True if an extraction has written the sound ``name`` of this hash."""
        origin = (bundle.origin or {}) if bundle is not None else {}
        noted = origin.get("sound"), origin.get("sound_sha256")
        return sha256 in self.sounds.get(name, ()) or (name, sha256) == noted

    def _was_written_by_an_earlier_version(self, job: ClipJob, path: Path, bundle: FeatureBundle | None) -> bool:
        """Return True if a sound is, by its samples, the one that an earlier version took out of the video."""
        settings = (bundle.settings or {}) if bundle is not None else {}
        if bundle is None or bundle.origin is not None or settings.get("source_sha256") != source_hash(job.path):
            return False
        try:
            found, rate = read_audio(path)
            expected, expected_rate = read_audio(job.path, settings["start_sec"], found.shape[1] / rate)
        except (ValueError, OSError, KeyError, TypeError):
            return False
        expected = expected / max(1.0, expected.abs().max().item())
        shortest = min(found.shape[1], expected.shape[1])
        return (
            rate == expected_rate and found.shape[0] == expected.shape[0]
            and abs(found.shape[1] - expected.shape[1]) <= 1
            and bool((found[:, :shortest] - expected[:, :shortest]).abs().max() < 1e-5)
        )

    def _beside(self, clip_id: str) -> Iterator[Path]:
        """Yield the sounds that training could take for a clip."""
        for suffix in AUDIO_SUFFIXES:
            yield from (path for ending in (suffix, suffix.upper())
                        if (path := self.folder / f"{clip_id}{ending}").is_file())

    # -- is it current -------------------------------------------------------------------------------------------------

    def sound_is_current(self, job: ClipJob, name: str, bundle: FeatureBundle) -> tuple[bool, str]:
        """Return True if the sound beside current features may stay, and a remark about it.

        Args:
            name: of the sound that belongs beside the features; "" for none.
        """
        if not name:
            return True, ""
        path, origin = self.folder / name, bundle.origin or {}
        if not path.is_file():
            return False, ""
        if (origin.get("sound") or name) != name:  # of another kind
            return False, ""
        sha256 = source_hash(path)
        if origin.get("sound_sha256", sha256) == sha256:  # earlier versions did not note it
            others = [other.name for other in self._beside(job.id) if other.name != name]
            return True, (f"{path}: training uses this extracted sound, not {', '.join(others)} beside it"
                          if others else "")
        if sha256 in self.sounds.get(name, ()):  # an extraction was killed between the two
            return False, ""
        return True, f"{path}: is your own sound, not the one extracted from {job.path}; it is kept"

    # -- staging, in the process that reads ----------------------------------------------------------------------------

    def staging_path(self, name: str) -> Path:
        """Return the place where a sound waits for its features."""
        return self.waiting / name

    def stage(self, job: ClipJob, name: str, bundle: FeatureBundle | None, overwrite: bool) -> StagedSound:
        """Return the sound that was written to :meth:`staging_path`, ready to be placed.

        Raises:
            ValueError: a sound is in the way that no extraction has written.
        """
        staged, target = self.staging_path(name), self.folder / name
        sha256, replaces, path = source_hash(staged), "", staged
        if target.is_file():
            replaces = source_hash(target)
            if replaces == sha256 or same_samples(staged, target):
                staged.unlink()
                sha256, path = replaces, None
            elif not self.is_ours(name, replaces, bundle) and not self._was_written_by_an_earlier_version(
                job, target, bundle
            ):
                if not overwrite:
                    staged.unlink()
                    raise UserError(
                        f"{target}: is in the way, extract_features.py did not write it; keep it as the sound of the "
                        f"clip with --audio none, move it, {OVERWRITE_ADVICE}")
                log.warning("%s: was not written by extract_features.py and is replaced (--overwrite)", target)
        obsolete = []
        for other in self._beside(job.id):
            if other.name == name:
                continue
            if self.is_ours(other.name, source_hash(other), bundle) or self._was_written_by_an_earlier_version(
                job, other, bundle
            ):
                obsolete.append(other.name)
            elif overwrite:
                log.warning("%s: lies beside the extracted sound, %s, which training uses; to train on your own, use "
                            "--audio none", other, name)
            else:
                staged.unlink(missing_ok=True)
                raise UserError(f"{other}: is in the way of {name}, which training would take instead of it; keep it "
                                "as the sound of the clip with --audio none, move it, or have both with --overwrite")
        return StagedSound(path, name, sha256, replaces, tuple(obsolete))

    def without_sound(self, job: ClipJob, settings: dict[str, Any], bundle: FeatureBundle | None) -> StagedSound:
        """Return the pair of a clip whose sound is not extracted: the one that lies there stays.

        Raises:
            ValueError: it is the sound of an earlier extraction, of another part of the video.
        """
        origin = (bundle.origin or {}) if bundle is not None else {}
        name, sha256 = origin.get("sound"), origin.get("sound_sha256")
        for path in self._beside(job.id):
            found = source_hash(path)
            if not self.is_ours(path.name, found, bundle):
                continue
            old = (bundle.settings or {}) if bundle is not None else {}
            if any(old.get(key) != settings.get(key) for key in ("source_sha256", "start_sec", "duration_sec")):
                raise UserError(f"{path}: is the sound of an earlier extraction, of another part of the video, and "
                                 "would lie beside the new features; delete it, or leave --audio none out")
            if (path.name, found) == (name, sha256):
                return StagedSound(None, path.name, found, found)
        return StagedSound()

    def drop(self, sound: StagedSound) -> None:
        """Remove a sound that waits in vain."""
        if sound.path is not None:
            sound.path.unlink(missing_ok=True)

    # -- placing, in the main process ----------------------------------------------------------------------------------

    def place(self, job: ClipJob, bundle: FeatureBundle, sound: StagedSound) -> None:
        """Put features and sound into the folder, together or not at all.

        Raises:
            ValueError: a sound has come into the way meanwhile.
            OSError: something cannot be written; what was there is untouched.
        """
        target, features = self.folder / sound.file, self.folder / f"{job.id}.npz"
        if sound.path is not None and (source_hash(target) if target.is_file() else "") != sound.replaces:
            raise UserError(f"{target}: another program changed it meanwhile; run again")
        prepared = self.waiting / features.name
        save_features(prepared, bundle)
        try:
            self._note(job, sound)
            if sound.path is not None:
                if features.exists():
                    features.unlink()  # those of the old sound
                    flush_folder(self.folder)
                os.replace(sound.path, target)
            os.replace(prepared, features)
        finally:
            prepared.unlink(missing_ok=True)
        for name in sound.obsolete:
            log.info("%s: removed: the sound of an earlier extraction, now replaced by %s", self.folder / name,
                     sound.file)
            (self.folder / name).unlink(missing_ok=True)
        flush_folder(self.folder)

    def _note(self, job: ClipJob, sound: StagedSound) -> None:
        row = {"id": job.id, "source": str(real_path(job.path)), "sound": sound.file, "sha256": sound.sha256}
        if sound.path is None and self.sources.get(job.id) == row["source"] and (
            not sound.file or sound.sha256 in self.sounds.get(sound.file, ())
        ):
            return  # is known already
        with open(self.ledger, "ab") as file:  # one write, so that lines of several processes do not mix
            file.write(as_utf8(json.dumps(row, ensure_ascii=False) + "\n"))
            file.flush()
            os.fsync(file.fileno())
        self.sources[job.id] = row["source"]
        if sound.file:
            self.sounds.setdefault(sound.file, set()).add(sound.sha256)

    def remove(self, clip_id: str) -> bool:
        """Delete the features of a clip with their sound; return False where not all of it is by an extraction."""
        path, bundle = self.folder / f"{clip_id}.npz", self.features(clip_id)
        sounds = list(self._beside(clip_id))
        if bundle is None or "source_sha256" not in (bundle.settings or {}):
            return False
        if not all(self.is_ours(sound.name, source_hash(sound), bundle) for sound in sounds):
            return False
        for file in (path, *sounds):
            file.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Remove the folder of waiting sounds where nothing waits."""
        with suppress(OSError):  # there is none, or another job has a sound in it
            self.waiting.rmdir()


def same_samples(one: Path, two: Path) -> bool:
    """Return True if two sound files hold the same samples, whatever the encoder that wrote them."""
    try:
        with soundfile.SoundFile(sound_path(one)) as first, soundfile.SoundFile(sound_path(two)) as second:
            if (first.samplerate, first.channels, first.frames) != (second.samplerate, second.channels, second.frames):
                return False
            blocks = zip(first.blocks(1 << 18, dtype="int32"), second.blocks(1 << 18, dtype="int32"), strict=True)
            return all((left == right).all() for left, right in blocks)
    except (RuntimeError, ValueError):  # LibsndfileError is a RuntimeError
        return False
