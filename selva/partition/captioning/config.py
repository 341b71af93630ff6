"""Settings of ``scripts/caption.py``; needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selva.utils.errors import UserError
from selva.utils.settings import required, setting

INPUT, SPEECH, LISTENING, GENERAL = "input and output", "speech, by Whisper", "other sounds, by CLAP", "general"
TEXT = "{text}"  # stands for the words in a template


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Settings of one call of ``scripts/caption.py``: either ``whisper`` or ``clap`` is given."""

    data_dir: Path = required("folder of recordings or clips, sounds and videos (subfolders are not read)", group=INPUT,
                              metavar="DIR")
    output_dir: Path | None = setting(None, "where the .json files of --whisper and the clap_scores.tsv of --clap go",
                                      group=INPUT, metavar="DIR", default_text="the folder of --data_dir")
    prompts: Path | None = setting(
        None, "add the captions to this prompts.txt, which train_lora.py reads beside features, instead of writing a "
        "<name>.txt beside each clip, which extract_features.py and partition_clips.py read", group=INPUT,
        metavar="FILE")
    whisper: str | None = setting(
        None, "write down what is said, with times: folder of a Whisper model for transformers, or the name of one "
        "that is in the cache of Hugging Face (openai/whisper-small)", group=SPEECH, metavar="DIR_OR_NAME")
    language: str | None = setting(None, "code of the language that is spoken, such as en", group=SPEECH,
                                   metavar="CODE", default_text="heard in the first 30 s of each recording")
    merge_below_sec: float = setting(
        1.0, "a segment shorter than this is joined with the one beside it, if less than a second lies between them "
        "and both fit into 8 s; 0 joins none", group=SPEECH, metavar="SEC")
    to_captions: str | None = setting(
        None, "make captions of the words, such as 'a man says \"{text}\"'; {text} stands for them", group=SPEECH,
        metavar="TEMPLATE")
    clap: str | None = setting(
        None, "give every clip the caption that fits best: folder of a CLAP model for transformers, or the name of one "
        "that is in the cache of Hugging Face (laion/clap-htsat-unfused)", group=LISTENING, metavar="DIR_OR_NAME")
    labels: Path | None = setting(None, "the captions to choose from, one a line", group=LISTENING, metavar="FILE")
    min_score: float = setting(
        0.2, "a clip whose best caption has a lower score than this is left to you; the score is the cosine between "
        "sound and caption, 1 at most and about 0 where they have nothing to do with each other", group=LISTENING,
        metavar="X")
    min_margin: float = setting(
        0.05, "so is one whose second best caption has nearly the same score: less than this below the best",
        group=LISTENING, metavar="X")
    device: str = setting("auto", "where the networks compute; auto takes a GPU if there is one", group=GENERAL,
                          metavar="auto|cpu|cuda|mps")
    seed: int = setting(42, "seed of everything random: where Whisper is unsure, it tries again with chance",
                        group=GENERAL)

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise UserError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        """Yield a message for every setting, or combination of settings, that is wrong."""
        of_speech = {"language": self.language, "to_captions": self.to_captions}
        rules = (
            ((self.whisper is None) == (self.clap is None), "give one of --whisper and --clap"),
            (self.whisper is None and any(of_speech.values()),
             f"{' and '.join(f'--{flag}' for flag, value in of_speech.items() if value)}: belongs to --whisper"),
            (self.clap is not None and self.labels is None, "--clap chooses from the captions of --labels, give both"),
            (self.whisper is not None and self.labels is not None, "--labels: belongs to --clap"),
            (self.whisper is not None and self.prompts is not None and self.to_captions is None,
             "--prompts: with --whisper there are captions only with --to_captions"),
            (self.to_captions is not None and TEXT not in self.to_captions,
             f"--to_captions {self.to_captions!r}: has no {TEXT}, which stands for what is said"),
            (not 0 <= self.merge_below_sec < math.inf,
             f"--merge_below_sec {self.merge_below_sec}: expected 0 or more seconds"),
            (not -1 <= self.min_score <= 1, f"--min_score {self.min_score}: expected -1 to 1"),
            (not 0 <= self.min_margin <= 2, f"--min_margin {self.min_margin}: expected 0 to 2"),
        )
        yield from (message for wrong, message in rules if wrong)
