"""One partition from its settings to the tables of clips; behind ``partition_clips.py``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selva.inputs.file_names import FolderNames, names_that_collide, same_name
from selva.inputs.prompts import read_sidecar
from selva.media import audio_length
from selva.partition.config import VAL_FOLDER, CuttingConfig, PartitionConfig
from selva.partition.cut import (
    LeftOut,
    collect_recordings,
    cut_recording,
    forgotten_pieces,
    hold_out,
    put_piece,
    read_piece,
    same_recordings,
    write_left_out,
)
from selva.partition.pieces import WrittenPieces
from selva.partition.segments import Segment, merge_segments, read_segments
from selva.partition.windows import (
    WINDOW_SEC,
    Window,
    captions_of,
    read_captions,
    table_captions,
    write_captions,
    write_clips,
)
from selva.sequence import DEFAULT_DURATION_SEC
from selva.utils.errors import UsageError, UserError
from selva.utils.files import atomic_write_text, real_path, source_hash, why_not_written
from selva.utils.progress import Progress
from selva.utils.settings import settings_text, values_of
from selva.utils.text import counted, listed, text_lines

log = logging.getLogger(__name__)

ROUNDING_SEC = 0.01
NAMED = 20  # of what is left out, on the terminal; left_out.tsv has all


def partition_recordings(config: PartitionConfig) -> tuple[list[Path], bool]:
    """Cut recordings and write the tables; return their paths, and True where a recording could not be read.

    Raises:
        UsageError: no recording is in the range that was asked for.
        ValueError, FileNotFoundError: there are no recordings, no clips, or a table cannot be used.
    """
    recordings, not_taken = collect_recordings(config.data_dir, config.recursive)
    chosen, part = choose_part(recordings, config)
    segments = read_segments(config.segments, recordings) if config.segments else None
    if segments is not None and config.cutting.merge_gap_sec is not None:
        segments = merge_all(segments, config.cutting.merge_gap_sec)
    written = read_captions(config.captions) if config.captions else {}
    of_names = find_captions(recordings, written)

    check_targets(config, part)
    cut = cut_all(chosen, config.cutting, segments)
    cut.left_out += not_taken if config.start == 0 else []
    texts = {s.id: s.text for given in (segments or {}).values() for s in given if s.text}
    of_clips = texts | clip_texts(cut.windows, recordings, written)
    if unused := sorted(set(written) - {same_name(name) for name in (*recordings, *of_clips)}):
        log.warning("%s: no recording and no clip for %s", config.captions, listed(unused))
    report_left_out(cut.left_out, table := config.output_dir / f"left_out{part}.tsv")
    found = captions_of(cut.windows, of_clips, of_names)
    # Before the sound is written, as that of clips to validate on goes into a folder of its own.
    held_out = choose_held_out(cut.windows, chosen, config)
    short = short_clips(cut.windows, chosen, found, config)
    val = {window for window in cut.windows if window.name in held_out} | short
    if config.write_audio is not None and cut.windows:
        write_all_pieces(cut, val, chosen, found, config.write_audio, table, part)
    val, short = val.intersection(cut.windows), short.intersection(cut.windows)
    if not cut.windows:
        raise UserError(no_clips(cut, config, len(chosen)))
    names = {window.name for window in cut.windows}
    held_out &= names
    if segments is not None:
        report_lengths(cut.windows, chosen)
    captions = table_captions(cut.windows, of_clips, of_names)
    if len(val) == len(cut.windows):
        unwritten = ", and the others could not be written" if any(item.unwritten for item in cut.left_out) else ""
        raise UserError(f"no clip would be left to train on: {counted(len(val), 'clip')} held out for validation"
                        + (unwritten or "; lower --val_below_sec or --val_below_text"))
    # First, as it says that the tables are ours; and again with their hashes.
    settings, text = config.output_dir / f"clips{part}_config.yaml", settings_text(values_of(config))
    atomic_write_text(settings, text)
    tables = write_tables(cut, val, captions, config, part)
    present = [config.output_dir / f"{name}{part}.tsv" for name in TABLES]
    lines = [f"{TABLE_LINE}{source_hash(path)} {path.name}\n" for path in present if path.is_file()]
    atomic_write_text(settings, text + "".join(lines))
    failed = {item.path for item in cut.left_out if item.failed}
    unwritten = sum(item.unwritten for item in cut.left_out)
    log.info("%s from %d of %s, %d unreadable%s", counted(len(cut.windows), "clip"), len(names),
             counted(len(chosen), "recording"), len({item.path for item in cut.left_out if item.failed
                                                     and not item.unwritten}),
             f"; {counted(unwritten, 'clip')} not written" if unwritten else "")
    if held_out:
        log.info("held out for validation: %s with %d of the clips: %s", counted(len(held_out), "recording"),
                 sum(window.name in held_out for window in cut.windows), listed(sorted(held_out)))
    if short:
        log.info("%s held out because they or their captions are short", counted(len(short), "clip is", "clips are"))
    missing = [window for window in cut.windows if window.id not in found]
    if captions and missing:
        log.warning("%s without a caption, which a set of sound cannot hold; of the recordings %s",
                    counted(len(missing), "clip is", "clips are"),
                    listed(list(dict.fromkeys(window.name for window in missing))))
    return tables, bool(failed)


def choose_held_out(windows: Sequence[Window], recordings: Mapping[str, Path], config: PartitionConfig) -> set[str]:
    """Return the names of the recordings to validate on; those of the same content stay on one side, which is said."""
    names = {window.name for window in windows}
    if not names or not config.val_fraction:
        return set()
    same = same_recordings({name: path for name, path in recordings.items() if name in names})
    if same:
        log.warning("%s: recordings of the same content, which stay together in training or validation: %s",
                    config.data_dir, listed([" = ".join(group) for group in same]))
    return hold_out(names, config.val_fraction, config.seed, same)


def no_clips(cut: Cut, config: PartitionConfig, number: int) -> str:
    """Return the message of a run of ``number`` recordings that gives no clip: files that failed, or the rules."""
    unwritten = [item for item in cut.left_out if item.unwritten]
    if unwritten:
        return (f"{config.write_audio}: none of {counted(len(unwritten), 'clip')} could be written; the first reason: "
                f"{unwritten[0].reason}")
    failed = [item for item in cut.left_out if item.failed]
    if failed:
        return (f"{config.data_dir}: none of {counted(number, 'recording')} gives a clip, and {len(failed)} could not "
                f"be read; the first: {failed[0]}")
    wanted = "" if config.segments or config.cutting.min_length_sec is not None else f" of {WINDOW_SEC} s"
    shorter = "" if not wanted else "; --min_length_sec takes shorter recordings as one clip each"
    return f"{config.data_dir}: none of {counted(number, 'recording')} gives a clip{wanted}{shorter}"


def merge_all(segments: dict[str, list[Segment]], gap_sec: float) -> dict[str, list[Segment]]:
    """Return segments with close ones in one, and say how many there are now."""
    merged = {name: merge_segments(given, gap_sec) for name, given in segments.items()}
    before, after = (sum(map(len, each.values())) for each in (segments, merged))
    log.info("%s became %d with --merge_gap_sec %g", counted(before, "segment"), after, gap_sec)
    return merged


def report_lengths(windows: Sequence[Window], recordings: Mapping[str, Path]) -> None:
    """Name clips at given times that are longer than the model takes, and say how many are shorter."""
    rates = {name: audio_length(recordings[name])[1] for name in {window.name for window in windows}}
    seconds = {window.id: (window.end_sample - window.start_sample) / rates[window.name] for window in windows}
    long = [f"{id_} ({length:.2f} s)" for id_, length in seconds.items() if length > WINDOW_SEC + ROUNDING_SEC]
    if long:
        log.warning("%s longer than the %g s of a clip: %s; a set of sound takes the first 8 s of each, a folder of "
                    "pairs windows of it", counted(len(long), "clip is", "clips are"), WINDOW_SEC, listed(long))
    short = sum(length < DEFAULT_DURATION_SEC for length in seconds.values())
    if short:
        log.info("%d of %s shorter than %g s: a set of sound (--recordings of extract_features.py) leaves them out; "
                 "its --sound_only takes them, from the files of --write_audio. --merge_gap_sec joins neighbours",
                 short, counted(len(windows), "clip is", "clips are"), DEFAULT_DURATION_SEC)


def clip_texts(
    windows: Sequence[Window], recordings: Mapping[str, Path], written: Mapping[str, str]
) -> dict[str, str]:
    """Return {id: caption} of the clips that a table of captions names by their own ids.

    An id that is also the name of another recording is taken for that recording.
    """
    names = {same_name(name) for name in recordings}
    own = ((window, same_name(window.id)) for window in windows)
    return {window.id: written[key] for window, key in own
            if written.get(key) and (window.id == window.name or key not in names)}


def short_clips(
    windows: Sequence[Window], recordings: Mapping[str, Path], captions: Mapping[str, str], config: PartitionConfig
) -> set[Window]:
    """Return the clips whose sound or caption is shorter than what is trained on.

    Args:
        captions: {id of the clip: caption}.
    """
    short = {w for w in windows if len(captions.get(w.id, "")) < config.val_below_text}
    if config.val_below_sec:
        names = {window.name for window in windows}
        rates = {name: audio_length(recordings[name])[1] for name in names}
        short |= {w for w in windows if w.end_sample - w.start_sample < config.val_below_sec * rates[w.name]}
    return short


def choose_part(recordings: Mapping[str, Path], config: PartitionConfig) -> tuple[dict[str, Path], str]:
    """Return {name: recording} of this process, and the ending of its tables' names after ``clips``."""
    end = len(recordings) if config.end == -1 else min(config.end, len(recordings))
    chosen = dict(list(recordings.items())[config.start : end])
    if not chosen:
        raise UsageError(
            f"--start {config.start} --end {config.end}: no recording in this range, {config.data_dir} has "
            f"{len(recordings)} (0 ... {len(recordings) - 1})"
        )
    whole = config.start == 0 and config.end == -1
    return chosen, "" if whole else f"_{config.start}_{end}"


TABLES = ("clips", "clips_val", "captions", "left_out")


def check_targets(config: PartitionConfig, part: str) -> None:
    """Raise if a table that will be written, or removed, is an input or of somebody else.

    Raises:
        FileExistsError: names the tables.
    """
    targets = [config.output_dir / f"{name}{part}.tsv" for name in TABLES]
    known = written_tables(config.output_dir / f"clips{part}_config.yaml")
    inputs = {real_path(path) for path in (config.captions, *(config.segments or [])) if path is not None}
    ours = (config.output_dir / f"clips{part}_config.yaml").is_file()
    theirs = [str(path) for path in targets if real_path(path) in inputs or (path.exists() and not ours)]
    if theirs:
        raise FileExistsError(f"{listed(theirs)}: would be overwritten, but is an input, or was not written by "
                              "partition_clips.py; choose another --output_dir, or move it away")
    edited = [str(path) for path in targets
              if path.exists() and known.get(path.name, "") not in ("", source_hash(path))]
    if edited:
        raise FileExistsError(f"{listed(edited)}: has been edited since partition_clips.py wrote it, and would be "
                              "overwritten; choose another --output_dir, or move it away"
                              + (", and give it back with --captions to keep what you wrote"
                                 if any(Path(path).name.startswith("captions") for path in edited) else ""))


TABLE_LINE = "# written: "  # of a table, in the settings beside them


def written_tables(settings: Path) -> dict[str, str]:
    """Return {name: hash} of the tables of the last run; those of earlier versions are not known."""
    lines = text_lines(settings.read_text(encoding="utf-8", errors="replace")) if settings.is_file() else []
    words = [line.removeprefix(TABLE_LINE).split() for line in lines if line.startswith(TABLE_LINE)]
    return {name: sha256 for sha256, name in (pair for pair in words if len(pair) == 2)}


@dataclass
class Cut:
    """The clips so far, and the recordings and parts that gave none."""

    windows: list[Window] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def cut_all(
    recordings: Mapping[str, Path], config: CuttingConfig, segments: dict[str, list[Segment]] | None
) -> Cut:
    """Return the clips of all recordings."""
    cut, decodes = Cut(), config.skip_silence or config.trim_silence
    with Progress(len(recordings), "finding silence" if decodes else "reading headers", "files") as bar:
        for number, (name, path) in enumerate(recordings.items(), 1):
            given = None if segments is None else segments.get(name, [])
            windows, left_out = cut_recording(path, config, given, name)
            cut.windows += windows
            cut.left_out += left_out
            bar.update(number)
    return cut


def find_captions(recordings: Mapping[str, Path], written: Mapping[str, str]) -> dict[str, str]:
    """Return {name: caption}: of a table of captions, else of the text file beside a recording."""
    captions, names, several = {}, FolderNames(), []
    for name, path in recordings.items():
        note = names.find(path.with_suffix(".txt"))
        beside = read_sidecar(note) if note and note.is_file() else ()
        listed_caption = written.get(same_name(name))
        if not listed_caption and len(beside) > 1:
            several.append(f"{name}.txt")
        if caption := listed_caption or "".join(beside[-1:]):
            captions[name] = caption
    if several:
        log.warning("several captions, of which the last counts: %s", listed(several))
    return captions


def write_all_pieces(
    cut: Cut, val: set[Window], recordings: Mapping[str, Path], captions: dict[str, str], folder: Path, table: Path,
    part: str,
) -> None:
    """Write the sound of every clip to ``folder``, or to its subfolder ``val`` if it is to be validated on.

    Whoever trains on the folder then does not train on those. Clips that fail leave the table by name.

    Args:
        captions: {id of the clip: caption}. table: of what is left out.
        part: ending of the tables' names; "" if all recordings are cut.
    """
    sides = {folder: [window for window in cut.windows if window not in val],
             folder / VAL_FOLDER: [window for window in cut.windows if window in val]}
    for place, windows in sides.items():
        if together := names_that_collide((window.id for window in windows), place):
            raise UserError(f"{place}: upper and lower case are the same in this folder, so one would "
                            f"replace the other: {listed([' and '.join(pair) for pair in together])}; rename one")
    before = len(cut.left_out)
    written = [write_pieces(cut, windows, recordings, captions, place) for place, windows in sides.items() if windows]
    readable = {window for side in written for window in side}
    cut.windows = [window for window in cut.windows if window in readable]
    report_left_out(cut.left_out[before:], table)
    if val:
        log.info("%s: the sound of %s to validate on, apart from that to train on", folder / VAL_FOLDER,
                 counted(len(val & readable), "clip"))
    if part:
        return
    for place, windows in sides.items():
        on_the_other_side = {f"{window.id}.flac" for window in readable.difference(windows)}
        old = forgotten_pieces(place, windows)
        if moved := [name for name in old if name in on_the_other_side]:
            log.warning("%s: sounds of an earlier run that are now %s: %s; delete them here", place,
                        "held out" if place == folder else "trained on", listed(moved))
        if gone := [name for name in old if name not in on_the_other_side]:
            log.warning("%s: sounds that are no clip of this run: %s; delete them if they are from an earlier one",
                        place, listed(gone))


def write_pieces(
    cut: Cut, windows: Sequence[Window], recordings: Mapping[str, Path], captions: dict[str, str], folder: Path
) -> list[Window]:
    """Write the sound of clips and return those that are there; the others are added to what is left out.

    Args:
        captions: {id of the clip: caption}.
    """
    there, pieces = [], WrittenPieces(folder)
    with Progress(len(windows), "writing sound", "clips") as bar:
        for number, window in enumerate(windows, 1):
            bar.update(number)
            recording = recordings[window.name]
            try:
                piece = read_piece(recording, window)
            except (ValueError, OSError) as error:
                reason = str(error).removeprefix(f"{recording}: ")
                cut.left_out.append(LeftOut(recording, reason, window.id, failed=True))
                continue
            try:
                put_piece(*piece, window, folder, captions.get(window.id, ""), pieces)
            except OSError as error:
                reason = str(error) if error.errno is None else f"{error.filename}: {why_not_written(error)}"
                cut.left_out.append(LeftOut(recording, reason, window.id, failed=True, unwritten=True))
                continue
            there.append(window)
    return there


def report_left_out(left_out: Sequence[LeftOut], table: Path) -> None:
    """Log what was left out, the failures first and the rest up to a limit."""
    for item in sorted(left_out, key=lambda item: not item.failed)[:NAMED]:
        log.log(logging.ERROR if item.failed else logging.WARNING, "skipped %s", item)
    if len(left_out) > NAMED:
        log.warning("... and %d more, see %s", len(left_out) - NAMED, table)


def write_tables(
    cut: Cut, held_out: set[Window], captions: dict[str, str], config: PartitionConfig, part: str
) -> list[Path]:
    """Write all tables of a run and return those with clips and captions; remove those of an earlier run."""
    train, val, texts = (config.output_dir / f"{name}{part}.tsv" for name in ("clips", "clips_val", "captions"))
    written = [train]
    write_clips(train, [window for window in cut.windows if window not in held_out])
    if held_out:
        write_clips(val, [window for window in cut.windows if window in held_out])
        written.append(val)
    if captions:
        write_captions(texts, captions)
        written.append(texts)
    for old in {val, texts}.difference(written):
        if old.exists():
            kept = old.with_name(f"{old.name}.bak")
            old.replace(kept)
            log.warning("%s is now called %s: it is from an earlier run, and this one makes no such table",
                        old, kept.name)
    write_left_out(config.output_dir / f"left_out{part}.tsv", cut.left_out, config.data_dir)
    return written
