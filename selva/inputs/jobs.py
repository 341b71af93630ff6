"""Jobs of a batch: videos, folders and tables -> one job per clip, in an order that never depends on chance.

    clips/dog.mp4                    -> dog
    clips/  (recursive) a/dog.mp4    -> a_dog
    clips.tsv, row "dog_3"           -> dog_3
    talk.mp4 with windows            -> talk_000, talk_001 ...
    anything with a name "dog"       -> dog_001, dog_002 ...

Order: the inputs as they are given; in a folder by path, a folder's own videos mixed with its subfolders by name; in a
table by row; the windows of a video by time.

The prompt of a clip, the more specific one first: the table's column ``prompt``; prompts.txt; ``<stem>.txt`` beside
the video; the prompt for all clips; the table's ``label`` or ``caption``. (Labels are often classes rather than
descriptions, so whoever also gives a prompt for all wants that one.)

Only what is wrong with the request is an error here. A single video that is missing or damaged stays in the list: the
work on it fails by name, and the other clips get done.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from selva.inputs.file_names import FolderNames, same_name
from selva.inputs.media_files import first_of_each_name, say_not_taken, visible_files
from selva.inputs.names import numbered_names
from selva.inputs.pairing import pair_recordings
from selva.inputs.prompts import PROMPTS_FILE, read_all_prompts, read_sidecar, warn_of_other_spelling
from selva.inputs.suffixes import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from selva.inputs.table import TABLE_SUFFIXES, TableRow, read_clip_table, unsafe_id
from selva.media import MASK_SUFFIXES, audio_seconds, video_length
from selva.sequence import DEFAULT_DURATION_SEC, SHORTEST_SEC
from selva.utils.errors import UserError
from selva.utils.text import counted, listed

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

_HEADER_READERS = 8  # threads; reading headers waits for the disk


@dataclass(frozen=True)
class ClipJob:
    """One clip to be made.

    Attributes:
        id: unique in the list; stem of every file that is written for this clip.
        path: the video, which may be missing or damaged.
        start_sec: where in the video the clip begins.
        duration_sec: seconds wanted; a video that ends earlier makes a shorter clip.
        prompt: "" if there is none.
        label: from the table, for information; "" if there is none.
        mask: image, video or .npy; None for the whole picture.
        sound: a recording to be used instead of the sound in the video, both beginning at the same moment.
        prompt_from: where the prompt comes from, for information; "" if there is none.
        is_beginning: nobody has chosen this stretch, it is simply the beginning of the video.
        other_prompts: further prompts, where a list or a text file has several lines; training draws one at each use.
    """

    id: str
    path: Path
    start_sec: float
    duration_sec: float
    prompt: str
    label: str = ""
    mask: Path | None = None
    sound: Path | None = None
    prompt_from: str = field(default="", compare=False)
    is_beginning: bool = field(default=False, compare=False)
    other_prompts: tuple[str, ...] = ()


def collect_jobs(
    inputs: Sequence[PathLike],
    *,
    recursive: bool = False,
    prompt: str = "",
    prompts: PathLike | None = None,
    start_sec: float = 0.0,
    duration_sec: float = DEFAULT_DURATION_SEC,
    windows: bool = False,
    overlap_sec: float = 0.0,
    mask: PathLike | None = None,
    name: str | None = None,
    name_dir: PathLike | None = None,
    video_dir: PathLike | None = None,
    audio_dir: PathLike | None = None,
    sound_only: bool = False,
) -> list[ClipJob]:
    """Return the clips that the inputs ask for, in the order that the module describes.

    Args:
        inputs: videos of any suffix; folders, of which the files in ``VIDEO_SUFFIXES`` that are not hidden are taken;
            tables (.tsv, .csv; see :mod:`selva.inputs.table`).
        recursive: take the subfolders of a folder too; their names become part of the id.
        prompt: for the clips that have none of their own.
        prompts: a prompts.txt. Its names are ids; that of a whole video stands for all its windows.
        start_sec, duration_sec: of every clip; columns of a table win over them.
        windows: cut everything from ``start_sec`` to the end of the video (or, in a table, to the end of the row's
            ``duration``) into pieces of ``duration_sec``, ids ``<stem>_000`` ... What remains at the end becomes one
            more full window, moved back so that it ends with the video, if it is at least half a window; else it is
            left out and logged. A video shorter than a window is one shorter clip. Only headers are read.
        overlap_sec: seconds that a window shares with the one before it.
        mask: image, video or .npy for all clips, or a folder with ``<id>.*`` or ``<video stem>.*``, where pictures and
            .npy go before videos; a table's column ``mask`` wins over it. A clip is never a mask.
        name: call the clips ``name_001``, ``name_002`` ... in the order of the list.
        name_dir: where clips were written before: they keep their numbers, and new ones get the first that are free,
            see :mod:`selva.inputs.names`. Without it, numbers follow from the order alone.
        video_dir: where a table's videos lie, if not beside it.
        audio_dir: folder of recordings that are used instead of the sound in the videos of their names, see
            :mod:`selva.inputs.pairing`.
        sound_only: the pictures do not matter: take recordings as well as videos, and lengths from their sound.

    Raises:
        FileNotFoundError: an input, ``prompts``, ``mask``, ``video_dir`` or ``audio_dir`` does not exist.
        ValueError: nothing to do, a bad table (all its problems at once), two clips with one id, or settings that make
            no sense.
    """
    _check_times(start_sec, duration_sec, windows, overlap_sec)
    if not inputs:
        raise UserError("no inputs; give at least one video, folder or table")
    suffixes = AUDIO_SUFFIXES + VIDEO_SUFFIXES if sound_only else VIDEO_SUFFIXES
    rows: list[TableRow] = []
    for item in inputs:
        rows += _rows_of(Path(item), recursive, None if video_dir is None else Path(video_dir), suffixes)
    rows = _without_repeats(rows)
    folders = FolderNames()
    _warn_of_missing(rows, folders)
    if windows:
        clips = _cut(rows, start_sec, duration_sec, overlap_sec, audio_seconds if sound_only else video_length)
    else:
        clips = [
            (row, row.id, row.start_sec if row.start_sec is not None else start_sec, row.duration_sec or duration_sec)
            for row in rows
        ]
    if name is not None:
        keys = [(row.path.name, start) for row, _, start, _ in clips]
        videos = [row.path for row, *_ in clips]
        ids = numbered_names(name, keys, None if name_dir is None else Path(name_dir), videos)
        clips = [(row, new, start, length) for (row, _, start, length), new in zip(clips, ids, strict=True)]
    _check_ids((id_, row.path) for row, id_, _, _ in clips)
    masks = _Masks(mask, [row for row, *_ in clips])
    names = {name for row, id_, _, _ in clips for name in (row.id, id_, row.path.name, row.path.stem)}
    texts = _Prompts(prompts, prompt, folders, names)
    if prompts is None:
        _point_to_lists([Path(item) for item in inputs])
    sounds = pair_recordings(None if audio_dir is None else Path(audio_dir), [(row.id, row.path) for row in rows])
    jobs = []
    for row, id_, start, length in clips:
        (*others, text), prompt_from = texts.of(row, id_)
        jobs.append(ClipJob(
            id_, row.path, start, length, text, row.label, row.mask or masks.of(row, id_), sounds.get(row.id),
            prompt_from, not windows and start == 0 and row.duration_sec is None and length == DEFAULT_DURATION_SEC,
            tuple(others),
        ))
    masks.report(len(jobs))
    texts.report()
    return jobs


def _check_times(start_sec: float, duration_sec: float, windows: bool, overlap_sec: float) -> None:
    problems = []
    if not (math.isfinite(start_sec) and start_sec >= 0):
        problems.append(f"start is {start_sec} s, expected 0 or more")
    if not (math.isfinite(duration_sec) and duration_sec >= SHORTEST_SEC):
        problems.append(f"duration is {duration_sec} s, expected at least {SHORTEST_SEC} s")
    elif not 0 <= overlap_sec < duration_sec:
        problems.append(f"overlap is {overlap_sec} s, expected 0 to less than the {duration_sec:g} s of a clip")
    if overlap_sec and not windows:
        problems.append(f"overlap is {overlap_sec} s, but only windows overlap; ask for windows too")
    if problems:
        raise UserError("; ".join(problems))


# -- inputs ------------------------------------------------------------------------------------------------------------


def _rows_of(path: Path, recursive: bool, video_dir: Path | None, suffixes: tuple[str, ...]) -> list[TableRow]:
    if path.is_dir():
        found = find_videos(path, recursive, suffixes)
        if suffixes != VIDEO_SUFFIXES:
            found = first_of_each_name(found, suffixes)  # a recording before the video of its name
        return [TableRow(_flat_id(file.relative_to(path)), file) for file in found]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix.lower() in TABLE_SUFFIXES:
        return read_clip_table(path, suffixes, video_dir)
    return [TableRow(path.stem, path)]


def find_videos(
    folder: PathLike, recursive: bool = False, suffixes: tuple[str, ...] = VIDEO_SUFFIXES
) -> list[Path]:
    """Return the videos of a folder in the order of their paths; hidden files and folders are left out.

    Files of unknown kinds, and subfolders with videos that are not searched, are named in a warning.

    Args:
        suffixes: those that are taken; with those of recordings, these are found too.

    Raises:
        ValueError: there is none.
    """
    files = list(visible_files(folder, recursive))
    found = [path for path in files if path.suffix.lower() in suffixes]
    if found:
        say_not_taken(folder, files, suffixes, recursive)
    else:
        where = "this folder and its subfolders" if recursive else (
            "this folder (its subfolders were not searched; --recursive does)")
        what = "videos" if suffixes == VIDEO_SUFFIXES else "recordings or videos"
        others = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
        hint = f"; {counted(len(others), 'recording')} there: extract_features.py --sound_only" if others else ""
        raise UserError(f"{folder}: no {what} in {where}; looked for {' '.join(suffixes)}{hint}")
    return sorted(found, key=lambda path: path.parts)


def _flat_id(relative: Path) -> str:
    """Return "a_b_dog" for "a/b/dog.mp4", so that equal names in two folders stay two clips."""
    return "_".join(relative.with_suffix("").parts)


def _without_repeats(rows: list[TableRow]) -> list[TableRow]:
    """Return the rows without those that ask for the same clip of the same file under the same id once more."""
    kept: dict[tuple, TableRow] = {}
    repeats = []
    for row in rows:
        key = (row.id, os.path.abspath(row.path), row.start_sec, row.duration_sec)
        if key in kept:
            repeats.append(str(row.path))
        kept.setdefault(key, row)
    if repeats:
        log.warning("given more than once, done once: %s", listed(repeats))
    return list(kept.values())


def _warn_of_missing(rows: list[TableRow], folders: FolderNames) -> None:
    def exists(path: Path) -> bool:
        return folders.find(path) == path or path.is_file()  # some systems take DOG.mp4 for dog.mp4

    videos = [str(row.path) for row in rows if not exists(row.path)]
    masks = sorted({str(row.mask) for row in rows if row.mask is not None and not exists(row.mask)})
    if len(videos) == len(rows):
        raise FileNotFoundError(f"none of the {counted(len(rows), 'video')} exists; looked for {listed(videos)}")
    for kind, missing in (("videos", videos), ("masks", masks)):
        if missing:
            log.warning("missing %s, whose clips will fail: %s", kind, listed(missing))


# -- windows and names -------------------------------------------------------------------------------------------------


def window_starts(
    start_sec: float, end_sec: float, duration_sec: float, overlap_sec: float = 0.0
) -> tuple[list[float], float]:
    """Return the starts of the windows of a video, and the seconds at its end that no window covers.

    Windows follow each other at ``duration_sec - overlap_sec``. A remainder of at least half a window becomes one more
    window that ends at ``end_sec``. What is shorter than a window altogether is one window, which is then not full.
    """
    if end_sec - start_sec <= duration_sec:
        return [start_sec], 0.0
    step = duration_sec - overlap_sec
    count = 1 + math.floor((end_sec - start_sec - duration_sec) / step + 1e-6)  # 2.7 / (8 - 5.3) is less than 1
    starts = [round(start_sec + index * step, 6) for index in range(count)]
    rest = end_sec - (starts[-1] + duration_sec)
    if rest < duration_sec / 2:
        return starts, max(0.0, rest)
    return [*starts, math.floor((end_sec - duration_sec) * 1000) / 1000], 0.0


def _cut(
    rows: list[TableRow], start_sec: float, duration_sec: float, overlap_sec: float,
    length_of: Callable[[PathLike], float],
) -> list[tuple[TableRow, str, float, float]]:
    with ThreadPoolExecutor(_HEADER_READERS) as pool:
        lengths = list(pool.map(lambda row: _length(row.path, length_of), rows))
    clips, left_out = [], []
    for row, length in zip(rows, lengths, strict=True):
        start = row.start_sec if row.start_sec is not None else start_sec
        end = math.inf if row.duration_sec is None else start + row.duration_sec
        end = min(end, length) if length is not None else start  # an unreadable video fails once, not per window
        starts, rest = window_starts(start, end, duration_sec, overlap_sec)
        whole = min(duration_sec, row.duration_sec or duration_sec)
        clips += [(row, f"{row.id}_{index:03d}", begin, whole) for index, begin in enumerate(starts)]
        if rest >= 0.1:
            left_out.append(f"{row.id} {rest:.1f} s")
    if left_out:
        log.info("less than half a window remains at the end of %s and is left out: %s",
                 counted(len(left_out), "video"), listed(left_out))
    return clips


def _length(path: Path, length_of: Callable[[PathLike], float]) -> float | None:
    try:
        return length_of(path)
    except (ValueError, OSError) as error:
        log.debug("%s", error)  # the work on this clip will say it again
        return None


def _check_ids(clips: Iterable[tuple[str, Path]]) -> None:
    owner: dict[str, Path] = {}
    problems = []
    for id_, path in clips:
        reason = unsafe_id(id_)
        if reason:
            problems.append(f"{path}: its clip would be called {id_!r}, {reason}; rename it, or name all with --name")
        elif id_ in owner:
            problems.append(f"{owner[id_]} and {path} would both become {id_}.npz; rename one of them")
        owner.setdefault(id_, path)
    if problems:
        raise UserError(listed(problems, separator="; "))


# -- prompts and masks -------------------------------------------------------------------------------------------------


def _point_to_lists(inputs: list[Path]) -> None:
    for item in inputs:
        warn_of_other_spelling(item)
    found = [str(item / PROMPTS_FILE) for item in inputs if (item / PROMPTS_FILE).is_file()]
    if found:
        log.warning("found but not used: %s; to use it, give it with --prompts", listed(found))


class _Prompts:
    """Prompts from all sources, of which a clip takes the most specific."""

    def __init__(self, path: PathLike | None, for_all: str, folders: FolderNames, names: Iterable[str]) -> None:
        self.path, self.for_all, self.folders = path, for_all.strip(), folders
        self.written = read_all_prompts(path, names) if path is not None else {}
        self.used: set[str] = set()
        self.labelled = 0
        self.several: list[str] = []  # clips
        self.sidecars: dict[Path, tuple[str, ...]] = {}  # the windows of a video share one

    def of(self, row: TableRow, id_: str) -> tuple[tuple[str, ...], str]:
        """Return the prompts of a clip, at least one, the last of which is its own; and where they come from."""
        written: tuple[str, ...] = ()
        for stem in (row.id, id_):  # the clip's own id wins over that of its whole video
            key = same_name(f"{stem}.npz")
            if key in self.written:
                self.used.add(key)
                written = self.written[key]
        sources = (((row.prompt,), "table"), (written, str(self.path and Path(self.path).name)),
                   (self._sidecar(row.path), "text file beside it"), ((self.for_all,), "--prompt"))
        for texts, source in sources:
            if any(texts):
                if len(texts) > 1:
                    self.several.append(id_)
                return texts, source
        self.labelled += bool(row.label)
        return (row.label,), "label" if row.label else ""

    def _sidecar(self, video: Path) -> tuple[str, ...]:
        path = video.with_suffix(".txt")
        if path not in self.sidecars:
            file = None if path.name == PROMPTS_FILE else self.folders.find(path)
            self.sidecars[path] = read_sidecar(file) if file is not None and file.is_file() else ()
        return self.sidecars[path]

    def report(self) -> None:
        unused = sorted(set(self.written) - self.used)
        if videos := [name.removesuffix(".npz") for name in unused
                      if Path(name.removesuffix(".npz")).suffix.lower() in VIDEO_SUFFIXES]:
            log.warning("%s: names of videos, expected those of feature files (%s.npz for %s), so these prompts are "
                        "not used: %s", self.path, Path(videos[0]).stem, videos[0], listed(videos))
        if unused and self.used:  # one list often serves the training and the held-out clips
            log.info("%s: %s for clips that are not in this run: %s",
                     self.path, counted(len(unused), "prompt is", "prompts are"),
                     listed(unused))
        elif unused:
            log.warning("%s: no clip for %s", self.path, listed(unused))
        if self.several:
            log.info("%s several prompts (several lines of a name, or in a text file), of which the last is used here; "
                     "training draws one of them at each use: %s",
                     counted(len(self.several), "clip has", "clips have"), listed(self.several))
        if self.labelled:
            log.info("%s their label as their prompt", counted(self.labelled, "clip takes", "clips take"))


def _same_file(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


class _Masks:
    """The mask of a clip whose table does not name one; no video is a mask that is itself a clip."""

    def __init__(self, path: PathLike | None, rows: Iterable[TableRow]) -> None:
        self.path = None if path is None else Path(path)
        self.by_stem: dict[str, list[Path]] | None = None
        self.without = 0
        self.ambiguous: set[str] = set()
        rows = list(rows)
        own = sorted({row.id for row in rows if row.mask is not None and _same_file(row.mask, row.path)})
        if own:
            raise UserError(f"the mask of {listed(own)} is the video itself; name another, or none")
        if self.path is None:
            return
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such mask")
        clips = {os.path.realpath(row.path) for row in rows}
        if self.path.is_dir():
            self.by_stem = {}
            for file in sorted(self.path.iterdir(), key=lambda p: (p.suffix.lower() not in MASK_SUFFIXES, p)):
                if file.name.startswith(".") or file.suffix.lower() not in MASK_SUFFIXES + VIDEO_SUFFIXES:
                    continue
                if os.path.realpath(file) not in clips:
                    self.by_stem.setdefault(same_name(file.stem), []).append(file)
        elif os.path.realpath(self.path) in clips:
            raise UserError(f"{self.path}: is one of the videos, and cannot be their mask; name another")

    def of(self, row: TableRow, id_: str) -> Path | None:
        if self.by_stem is None:
            return self.path
        stems = (same_name(name) for name in (id_, row.id, row.path.stem))
        found = next((self.by_stem[stem] for stem in stems if stem in self.by_stem), None)
        if found is None:
            self.without += 1
            return None
        if len(found) > 1:
            self.ambiguous.add(f"{found[0].name}, not {', '.join(file.name for file in found[1:])}")
        return found[0]

    def report(self, num_clips: int) -> None:
        if self.ambiguous:
            log.warning("%s: several masks of one name, of which pictures and .npy come first; taken: %s",
                        self.path, listed(sorted(self.ambiguous), separator="; "))
        if self.without == num_clips and num_clips:
            raise UserError(f"{self.path}: no mask for any clip; masks are named like the clips, e.g. dog_01.png")
        if self.without:
            log.warning("%s: no mask for %d of %s, which show the whole picture",
                        self.path, self.without, counted(num_clips, "clip"))
