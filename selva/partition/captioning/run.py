"""One captioning from its settings to the files; behind ``scripts/caption.py``.

    recordings --Whisper--> <name>.json (partition_clips.py --segments), <name>.txt
    clips      --CLAP-----> clap_scores.tsv, <name>.txt of those that are beyond doubt
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selva.evaluation.encoders import CLAP_RATE, Clap
from selva.evaluation.sounds import at_rate, read_mono, sounds_in
from selva.partition.captioning import labels as clap_labels
from selva.partition.captioning.config import TEXT, CaptionConfig
from selva.partition.captioning.labels import Choice, LabelChooser, read_labels
from selva.partition.captioning.sidecars import CaptionFiles
from selva.partition.captioning.whisper import EXAMPLE, WHISPER_RATE, SpokenSegment, Whisper, merge_short
from selva.partition.pieces import WrittenFiles
from selva.partition.windows import write_table
from selva.utils.device import resolve_device
from selva.utils.errors import UserError
from selva.utils.files import atomic_write_text, check_can_write, real_path, source_hash
from selva.utils.progress import Progress
from selva.utils.text import counted, listed
from selva.weights.find import content_mark
from selva.weights.transformers_folder import model_folder

log = logging.getLogger(__name__)

SCORES_FILE, CHOICES_FILE = "clap_scores.tsv", ".clap_choices.jsonl"
SCORE_COLUMNS = ("file", "outcome", "caption", "score", "second", "second_score", "remark")
WHOLE_SEC = 10.0  # longer recordings are to be cut; what is said in all of them is no caption of a clip
CLAP_SEC = 10.0  # as much of a sound as CLAP hears
FORMAT = 1  # of the .json files; raised when they are made in another way


@dataclass
class Captioned:
    """Outcome of a captioning.

    Attributes:
        paths: the files to go on with: .json files of speech, or the table of scores.
        failed: names of what could not be read.
    """

    paths: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def caption_recordings(config: CaptionConfig) -> Captioned:
    """Caption the recordings or clips of a folder.

    Raises:
        FileNotFoundError: no such folder, model or list of captions; says what to download.
        UserError: no sounds, a model of another kind, or not a single sound could be read.
    """
    sounds = sounds_in(config.data_dir)
    output_dir = config.data_dir if config.output_dir is None else config.output_dir
    for folder in {output_dir, config.data_dir if config.prompts is None else config.prompts.parent}:
        check_can_write(folder)
    beside = WrittenFiles(config.data_dir, "captions")
    in_output = beside if real_path(output_dir) == real_path(config.data_dir) else WrittenFiles(output_dir, "captions")
    captions = CaptionFiles(beside, config.prompts)
    run = _Run(config, output_dir, in_output, captions)
    result = run.by_whisper(sounds) if config.whisper is not None else run.by_clap(sounds)
    captions.close()
    if len(result.failed) == len(sounds):
        raise UserError(f"{config.data_dir}: not a single one of {counted(len(sounds), 'sound')} could be used")
    return result


class _Run:
    """The parts that both ways of captioning share."""

    def __init__(
        self, config: CaptionConfig, output_dir: Path, in_output: WrittenFiles, captions: CaptionFiles
    ) -> None:
        self.config, self.output_dir, self.in_output, self.captions = config, output_dir, in_output, captions
        self.result = Captioned()

    def _each(self, sounds: Mapping[str, Path], what: str) -> Iterator[tuple[str, Path]]:
        with Progress(len(sounds), what, "sounds") as progress:
            for number, (name, path) in enumerate(sounds.items(), 1):
                yield name, path
                progress.update(number, name)

    def _fail(self, name: str, path: Path, error: Exception) -> None:
        log.error("left out: %s: %s", path, str(error).removeprefix(f"{path}: "))
        self.result.failed.append(name)

    # -- speech --------------------------------------------------------------------------------------------------------

    def by_whisper(self, sounds: Mapping[str, Path]) -> Captioned:
        """Write down what is said, a .json file for each recording."""
        assert self.config.whisper is not None
        folder = model_folder(self.config.whisper, EXAMPLE)
        model = _identity(folder)
        whisper: Whisper | None = None
        done, edited, wordless, long = 0, [], [], []
        for name, path in self._each(sounds, "transcribing"):
            target = self.output_dir / f"{name}.json"
            if not self.in_output.may_write(target):
                edited.append(target.name)
                self.result.paths.append(target)
                continue
            recipe = {"format": FORMAT, "sound": source_hash(path), "model": model, "language": self.config.language,
                      "merge_below_sec": self.config.merge_below_sec, "seed": self.config.seed}
            content = before = _content(target)
            if before.get("made_by") == recipe:
                done += 1
            else:
                whisper = whisper or Whisper(folder, resolve_device(self.config.device), self.config.language)
                try:
                    content = self._transcribe(whisper, path, recipe)
                except (UserError, OSError) as error:
                    self._fail(name, path, error)
                    continue
            self._write(target, self._with_captions(content), before)
            if not content["segments"]:
                wordless.append(name)
            elif self.config.to_captions is not None and content["duration_sec"] > WHOLE_SEC:
                long.append(name)
            elif self.config.to_captions is not None:
                try:
                    self.captions.write(path, self._caption(content["text"]))
                except UserError as error:
                    self._fail(name, path, error)
        for names, text in (
            (edited, "left as they are, as they are yours or were edited; move them away to have them made anew"),
            (wordless, "nothing is said in"),
            (long, f"longer than {WHOLE_SEC:g} s, so without a text of their own; partition_clips.py --segments gives "
                   "the captions to their clips"),
        ):
            if names:
                log.warning("%s: %s", text, listed(names))
        if done:
            log.info("done before: %d of %s", done, counted(len(sounds), "recording"))
        return self.result

    def _transcribe(self, whisper: Whisper, path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
        sound, rate = read_mono(path)
        found = whisper.transcribe(at_rate(sound, rate, WHISPER_RATE), self.config.seed)
        merged = merge_short(found.segments, self.config.merge_below_sec)
        return {
            "text": " ".join(segment.text for segment in merged), "language": found.language,
            "segments": [_row(number, segment) for number, segment in enumerate(merged)],
            "duration_sec": round(len(sound) / rate, 3), "made_by": recipe,
        }

    def _caption(self, words: str) -> str:
        return (self.config.to_captions or TEXT).replace(TEXT, words)

    def _with_captions(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return a transcript whose segments have captions as their texts; the words stay beside them."""
        segments = [{**row, "text": self._caption(row["words"])} for row in content["segments"]]
        return {**content, "segments": segments}

    def _write(self, target: Path, content: dict[str, Any], before: dict[str, Any]) -> None:
        if content != before:
            atomic_write_text(target, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
            self.in_output.add(target)
        self.result.paths.append(target)

    # -- other sounds --------------------------------------------------------------------------------------------------

    def by_clap(self, sounds: Mapping[str, Path]) -> Captioned:
        """Give every clip the best of the captions, or leave it to the user."""
        config = self.config
        assert config.clap is not None and config.labels is not None
        table = self.output_dir / SCORES_FILE
        if not self.in_output.may_write(table):
            raise FileExistsError(f"{table}: is not, or no longer, what caption.py has written, and would be written "
                                  "anew; move it away, or choose another --output_dir")
        labels = read_labels(config.labels)
        folder = model_folder(config.clap, clap_labels.EXAMPLE)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        chooser = LabelChooser(Clap(folder, resolve_device(config.device)), labels, self.output_dir / CHOICES_FILE,
                               _identity(folder))
        rows, doubtful, long = [], [], []
        for name, path in self._each(sounds, "listening"):
            try:
                content = source_hash(path)
                choice = chooser.known(content)
                if choice is None:
                    sound, rate = read_mono(path)
                    choice = chooser.choose(at_rate(sound, rate, CLAP_RATE), content)
                    if len(sound) > CLAP_SEC * rate:
                        long.append(name)
                doubt = choice.doubt(config.min_score, config.min_margin)
                outcome = "left to you" if doubt else self.captions.write(path, choice.caption)
            except (UserError, OSError) as error:
                self._fail(name, path, error)
                continue
            if doubt:
                earlier = self.captions.caption_of(path)
                doubtful.append(f"{path.name}: {doubt}" + (f" (it has the caption {earlier!r})" if earlier else ""))
            rows.append(_score_row(path, outcome, choice, doubt))
        write_table(table, SCORE_COLUMNS, rows)
        self.in_output.add(table)
        self.result.paths.append(table)
        if long:
            log.warning("longer than %g s, of which CLAP heard the beginning: %s", CLAP_SEC, listed(long))
        if doubtful:
            log.warning("%s left to you; write a <name>.txt beside each, or see %s:\n  %s",
                        counted(len(doubtful), "clip is", "clips are"), table, listed(doubtful, separator="\n  "))
        return self.result


def _row(number: int, segment: SpokenSegment) -> dict[str, Any]:
    return {"id": number, "start": segment.start_sec, "end": segment.end_sec, "text": segment.text,
            "words": segment.text}


def _score_row(path: Path, outcome: str, choice: Choice, doubt: str) -> tuple[str, ...]:
    second = "" if choice.second_score is None else f"{choice.second_score:.4f}"
    return (path.name, outcome, choice.caption, f"{choice.score:.4f}", choice.second or "", second, doubt)


def _content(path: Path) -> dict[str, Any]:
    """Return the content of a .json file of an earlier run, {} if there is none."""
    if not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))  # as it was written, as its hash says


def _identity(folder: Path) -> str:
    """Return a text that tells models apart by the content of their files."""
    if not folder.is_dir():
        return ""
    return "+".join(content_mark(file) for file in sorted(folder.iterdir()) if file.is_file())
