"""Settings of ``partition_clips.py``; needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from selva.audio.config import SILENCE_DB
from selva.partition.windows import MAX_WINDOWS, WINDOW_SEC
from selva.utils.errors import UserError
from selva.utils.files import real_path
from selva.utils.settings import required, setting

VAL_FOLDER = "val"  # in the folder of --write_audio: what is not to be trained on
INPUT, CUTTING, SILENCE = "input and output", "where to cut", "silence"
CAPTIONS, PART, GENERAL = "captions and validation", "part of the recordings, for several processes", "general"


@dataclass(frozen=True)
class CuttingConfig:
    """Rules by which recordings are cut.

    Attributes:
        min_length_sec: shorter recordings, or given segments, are left out; None for the published 8.1 s of recordings,
            and for 0.64 s, the shortest clip that the models take, of segments.
        max_segments: windows of one recording; None for the published number.
        skip_silence: move or drop windows that are mostly silent.
        trim_silence: move the borders of clips inwards, past the silence at both ends.
        silence_db: RMS of a block of 50 ms below which it is silent, relative to full scale.
        merge_gap_sec: given segments that are closer together become one; None for none.
        slice_start_offset, slice_end_offset: seconds that the borders of given segments move, later if positive.
    """

    min_length_sec: float | None = setting(
        None, f"leave out shorter recordings (default: {WINDOW_SEC}; a smaller value makes one clip of each recording "
        f"between it and {WINDOW_SEC} s), or shorter segments (default: 0.64)", group=CUTTING)
    max_segments: int | None = setting(None, f"windows of one recording (default: {MAX_WINDOWS}, as published)",
                                       group=CUTTING, metavar="N", at_least_one=True)
    merge_gap_sec: float | None = setting(
        None, "join segments that overlap or have less than this between them; their texts are joined, the first id is "
        "kept", group=CUTTING, metavar="SEC")
    slice_start_offset: float = setting(
        0.0, "move the start of every segment, after merging: negative starts earlier, positive later",
        group=CUTTING, metavar="SEC")
    slice_end_offset: float = setting(
        0.0, "move the end of every segment: negative ends earlier, positive later", group=CUTTING,
        metavar="SEC")
    skip_silence: bool = setting(
        False, "move windows that are more than half silent to the least silent free place; drop those without one, "
        "and silent --segments. Decodes every recording", group=SILENCE)
    trim_silence: bool = setting(
        False, "cut off the silence at both ends of every clip, in steps of 50 ms; what is shorter than 0.64 s then "
        "(of --segments: than --min_length_sec) is left out. Decodes every recording", group=SILENCE)
    silence_db: float = setting(SILENCE_DB, "level below which 50 ms count as silent: RMS, dB of full scale",
                                group=SILENCE)

    def __post_init__(self) -> None:
        if self.min_length_sec is not None and not 0 <= self.min_length_sec < math.inf:
            raise UserError(f"--min_length_sec is {self.min_length_sec}, expected 0 or more seconds")
        if self.max_segments is not None and self.max_segments < 1:
            raise UserError(f"--max_segments is {self.max_segments}, expected at least 1")
        if self.merge_gap_sec is not None and not 0 <= self.merge_gap_sec < math.inf:
            raise UserError(f"--merge_gap_sec is {self.merge_gap_sec}, expected 0 or more seconds")
        for flag in ("slice_start_offset", "slice_end_offset"):
            if not math.isfinite(value := getattr(self, flag)):
                raise UserError(f"--{flag} is {value}, expected seconds")
        if not -200 <= self.silence_db < 0:
            raise UserError(f"--silence_db is {self.silence_db}, expected a level below full scale, such as -60")

    @property
    def of_segments(self) -> list[str]:
        """Return the flags that were given and speak of segments."""
        given = {"merge_gap_sec": self.merge_gap_sec is not None, "slice_start_offset": self.slice_start_offset != 0,
                 "slice_end_offset": self.slice_end_offset != 0}
        return [f"--{flag}" for flag, is_given in given.items() if is_given]

    @property
    def max_windows(self) -> int:
        """Number of windows of one recording at most."""
        return MAX_WINDOWS if self.max_segments is None else self.max_segments


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """Settings of one call of ``partition_clips.py``: recordings, cutting, tables."""

    data_dir: Path = required("folder of recordings", group=INPUT)
    recursive: bool = setting(False, "take its subfolders too; a/b/rain.flac is called a_b_rain", group=INPUT)
    output_dir: Path = required("where clips.tsv goes", group=INPUT)
    write_audio: Path | None = setting(
        None, "also write every clip as DIR/<id>.flac (24 bits, rate, level and channels of the recording), and its "
        "caption as DIR/<id>.txt, those to validate on in DIR/val; what is there already is not written again",
        group=INPUT, metavar="DIR")
    cutting: CuttingConfig = field(default_factory=CuttingConfig)
    segments: list[Path] | None = setting(
        None, "cut here instead of in windows. Tables (.tsv, .csv) with the columns name, start, end in seconds, and "
        "optionally id and text; .json files as whisper writes them, each called like its recording, or a folder of "
        "them; or a metadata.csv like LJSpeech's, whose recordings are taken whole. The text becomes the caption",
        group=CUTTING, nargs="+", metavar="FILE")
    captions: Path | None = setting(
        None, "table with the columns id (name of the recording) and caption, or a metadata.csv like LJSpeech's; where "
        "it says nothing, <name>.txt beside a recording is its caption", group=CAPTIONS, metavar="FILE")
    val_fraction: float = setting(0.0, "share of the recordings to hold out: their clips go into clips_val.tsv "
                                       "instead; chosen by --seed", group=CAPTIONS, metavar="F")
    val_below_sec: float = setting(
        0.0, "clips shorter than this go into clips_val.tsv too", group=CAPTIONS,
        metavar="SEC")
    val_below_text: int = setting(
        0, "clips whose caption has fewer characters than this, or that have none, go into clips_val.tsv too",
        group=CAPTIONS,
        metavar="N")
    start: int = setting(0, "index of the first recording, sorted by file name", group=PART)
    end: int = setting(-1, "index after the last recording, -1 for all; with --start or --end the table is called "
                       "clips_START_END.tsv", group=PART)
    seed: int = setting(42, "seed of everything random", group=GENERAL)

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise UserError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        """Yield a message for every setting, or combination of settings, that is wrong."""
        rules = (
            (self.start < 0 or self.end < -1,
             f"--start {self.start} --end {self.end}: expected 0 or more (--end -1 for all)"),
            (not 0 <= self.val_fraction < 1,
             f"--val_fraction {self.val_fraction}: expected 0 or more and less than 1"),
            (not 0 <= self.val_below_sec < math.inf,
             f"--val_below_sec {self.val_below_sec}: expected 0 or more seconds"),
            (self.val_below_text < 0, f"--val_below_text {self.val_below_text}: expected 0 or more characters"),
            (not self.segments and bool(self.cutting.of_segments),
             f"{' and '.join(self.cutting.of_segments)}: of segments, which --segments gives"),
            (self.segments and self.cutting.max_segments is not None,
             "--max_segments: belongs to windows; with --segments all of these are taken"),
            (self.write_audio is not None and real_path(self.data_dir) in (
                real_path(self.write_audio), real_path(self.write_audio / VAL_FOLDER)),
             f"--write_audio {self.write_audio}: the folder of the recordings is this one, or {VAL_FOLDER} in it; the "
             "clips would be taken for recordings next time"),
            (self.write_audio is not None and self.recursive
             and real_path(self.data_dir) in real_path(self.write_audio).parents,
             f"--write_audio {self.write_audio}: lies in the folder of the recordings, whose subfolders --recursive "
             "takes; the clips would be taken for recordings next time"),
        )
        yield from (message for wrong, message in rules if wrong)
