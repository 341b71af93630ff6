"""Recordings that belong to videos: a folder of clean sound, paired with the videos by name.

    audio/dog.wav            the sound of clips/dog.mp4
    audio/Monday/dog.wav     the sound of clips/Monday/dog.mp4, where subfolders are taken

A recording begins when its video does. Names are compared without their endings and without regard to case.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from selva.inputs.file_names import same_name
from selva.inputs.media_files import say_not_taken, visible_files
from selva.inputs.suffixes import AUDIO_SUFFIXES
from selva.utils.errors import UserError
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)


def pair_recordings(folder: Path | None, videos: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """Return {id: recording} for the videos that have one, and say which have none, and which recordings are left over.

    Args:
        folder: of the recordings, with its subfolders; None pairs nothing.
        videos: (id, video); the recording is called like the id or like the video.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a single recording belongs to a video, or two recordings could belong to one.
    """
    if folder is None:
        return {}
    if not folder.is_dir():
        raise FileNotFoundError(f"--audio_dir {folder}: no such folder")
    files = list(visible_files(folder, recursive=True))
    recordings = sorted(path for path in files if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())
    say_not_taken(folder, files, AUDIO_SUFFIXES, recursive=True)
    by_name: dict[str, list[Path]] = {}
    for path in recordings:
        relative = path.relative_to(folder).with_suffix("")
        for name in {_key("_".join(relative.parts)), _key(path.stem)}:
            by_name.setdefault(name, []).append(path)
    found: dict[str, Path] = {}
    ambiguous, without = [], []
    for clip_id, video in videos:
        candidates = by_name.get(_key(clip_id)) or by_name.get(_key(video.stem), [])
        if len(candidates) > 1:
            ambiguous.append(f"{video}: {' or '.join(map(str, candidates))}")
        elif candidates:
            found[clip_id] = candidates[0]
        else:
            without.append(str(video))
    if ambiguous:
        raise UserError(f"--audio_dir {folder}: several recordings could belong to one video; rename or remove one of "
                        f"them: {listed(ambiguous, separator='; ')}")
    if not found:
        raise UserError(f"--audio_dir {folder}: none of {counted(len(recordings), 'recording')} in it is called like "
                        f"one of the videos, such as {Path(videos[0][1]).stem}.wav")
    if without:
        log.warning("--audio_dir %s: no recording for %d of %s, whose own sound is taken: %s", folder, len(without),
                    counted(len(videos), "video"), listed(without))
    used = set(found.values())
    if unused := [path.name for path in recordings if path not in used]:
        log.warning("--audio_dir %s: no video for %s", folder, listed(unused))
    return found


def _key(name: str) -> str:
    return same_name(name).casefold()
