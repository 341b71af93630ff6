"""Settings of ``extract_features.py``; needs no PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from selva.media.mask_settings import MaskOptions
from selva.models.variants import get_variant
from selva.sequence import DEFAULT_DURATION_SEC, sequence_config
from selva.utils.device import PRECISIONS
from selva.utils.errors import UserError
from selva.utils.files import real_path
from selva.utils.settings import required, setting
from selva.weights.config import GENERAL, ModelConfig

INPUT, CLIPS, RUNNING = "input and output", "clips", "running"
SOUND_ONLY = "sound without pictures"
ENCODER_PARTS = ("clip_text", "clip_image", "t5", "video_encoder")
# Settings without a meaning for sound without pictures.
VIDEO_ONLY = ("video_dir", "audio", "audio_dir", "latents", "name", "preview", "overwrite", "prune",
              "prompt", "prompts", "start", "windows", "overlap", "sound_only")


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """Settings of one call of ``extract_features.py``: clips, encoders, output."""

    inputs: list[Path] = setting(
        [], "videos (with --sound_only recordings too), folders of them, or tables (.tsv, .csv) with the columns id, "
        "and optionally path, start, duration, prompt, label or caption, mask", group=INPUT, positional=True, nargs="*",
        metavar="INPUT")
    recursive: bool = setting(False, "take the subfolders of folders too, those of --recordings included", group=INPUT)
    video_dir: Path | None = setting(None, "folder of the files of a table, if not the table's own", group=INPUT,
                                     metavar="DIR")
    output_dir: Path = required("folder for the features; with --format memmap the data set itself, with its table "
                                "beside it", group=INPUT)
    format: str = setting("npz", "npz: one file per clip; memmap: the packed format of MMAudio's own training, for "
                          "clips of 8 s with sound", group=INPUT, choices=("npz", "memmap"))
    audio: str | None = setting(
        None, "the sound beside each .npz: extract decodes it to .flac (default); copy keeps the stream as it is (MP3, "
        "Vorbis, Opus, FLAC, PCM); none: you put your own there", group=INPUT,
        choices=("extract", "copy", "none"))
    audio_dir: Path | None = setting(
        None, "folder of recordings (with its subfolders) to use instead of the sound in the videos: each is called "
        "like its video, and begins when it does", group=INPUT, metavar="DIR")
    latents: bool = setting(False, "encode the sound with the VAE too and store mean and deviation in the .npz",
                            group=INPUT)
    name: str | None = setting(None, "name the clips NAME_001, NAME_002 ... instead of after their files; clips that "
                                     "are in the output folder already keep their numbers", group=INPUT)
    preview: Path | None = setting(None, "write a picture per clip that shows what each encoder saw", group=INPUT,
                                   metavar="DIR")
    overwrite: bool = setting(False, "extract everything again, and replace files that are in the way", group=INPUT)
    prune: bool = setting(False, "delete the output of earlier runs for clips that are no longer listed, or that fail "
                                 "now", group=INPUT)
    prompt: str = setting("", "what is to be heard: the prompt of all clips that have none of their own", group=CLIPS)
    prompts: Path | None = setting(None, "prompts.txt with lines `name.npz: prompt` that go before --prompt",
                                   group=CLIPS, metavar="FILE")
    start: float = setting(0.0, "seconds into the video where the clip begins", group=CLIPS)
    duration: float = setting(DEFAULT_DURATION_SEC, "seconds to use; a shorter video makes a shorter clip",
                              group=CLIPS)
    windows: bool = setting(False, "cut all of every video into clips of --duration, called <video>_000, <video>_001 "
                            "...", group=CLIPS)
    overlap: float = setting(0.0, "seconds by which one of these windows overlaps the next", group=CLIPS)
    masks: MaskOptions = field(default_factory=MaskOptions)
    sound_only: bool = setting(
        False, "INPUT are recordings, or videos whose pictures do not count: .npz files with what the model takes for "
        "no pictures, from 0.64 s up. From them an adapter learns how a sound is, not when it comes", group=SOUND_ONLY)
    recordings: Path | None = setting(
        None, "folder of the recordings; INPUT is then a clips.tsv of partition_clips.py, which says how they are cut. "
        "Makes a memmap, of clips of 8 s", group=SOUND_ONLY, metavar="DIR")
    captions: Path | None = setting(
        None, "table with the columns id (name of a recording, or id of a clip) and caption, or a metadata.csv like "
        "LJSpeech's", group=SOUND_ONLY, metavar="FILE")
    workers: int | None = setting(
        None, "processes that read videos while others are encoded; 0: read in the main process (default: by the "
        "number of cores)", group=RUNNING)
    shard: str | None = setting(
        None, "extract only part I of N (I from 1): for N independent jobs, in any order, on any machines that share "
        "the output folder. Under torchrun its processes share this part", group=RUNNING, metavar="I/N")
    strict: bool = setting(False, "stop at the first clip that fails", group=RUNNING)
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = setting(42, "seed of everything random", group=GENERAL)
    # The base models were trained on float32 features; half precision saves time on a GPU and rounds them.
    precision: str = setting("fp32", "number format of the networks", group=GENERAL, choices=PRECISIONS)

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise UserError("; ".join(problems))

    @property
    def part(self) -> tuple[int, int]:
        """Number of the part of the work that ``shard`` names, from 0, and the number of all parts."""
        if self.shard is None:
            return 0, 1
        index, count = map(int, self.shard.split("/"))
        return index - 1, count

    @property
    def weight_parts(self) -> tuple[str, ...]:
        """Parts of the base model that encode what the settings ask for."""
        if self.recordings:
            return "clip_text", "vae"
        if self.sound_only:
            return "clip_text", "generator", *(("vae",) if self.latents else ())
        return (*ENCODER_PARTS, *(("vae",) if self.latents or self.format == "memmap" else ()))

    def _problems(self) -> Iterator[str]:
        """Yield a message for every setting, or combination of settings, that is wrong."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            yield f"--shard: {self.shard!r} is not a part like 2/8, from 1/8 to 8/8"
        try:
            sequence_config(get_variant(self.model.variant).mode, self.duration)
        except ValueError as error:
            yield f"--duration: {error}"
        yield from (f"{path}: no such file or folder" for path in self.inputs if not path.exists())
        given = [f"--{name}" for name in VIDEO_ONLY if getattr(self, name) not in (None, False, "", 0.0)]
        given += ["--mask"] if self.masks.mask else []
        rules = (
            (self.workers is not None and self.workers < 0, f"--workers is {self.workers}, expected 0 or more"),
            ((self.recordings is None) != (self.captions is None) or (self.recordings and len(self.inputs) != 1),
             "sound without pictures needs one table of clips, --recordings and --captions"),
            (self.recordings and given,
             f"{', '.join(given)}: only for videos, not for sound without pictures; leave it out"),
            (self.format == "memmap" and self.audio is not None,
             "--audio: a memmap holds the encoded sound, it has no sound files; leave --audio out"),
            (self.audio == "none" and self.audio_dir is not None,
             "--audio none leaves the sound to you and --audio_dir says where it is; give one of them"),
            (self.sound_only and (self.masks.mask or self.preview),
             "--mask and --preview: with --sound_only pictures do not count; leave them out"),
            (self.preview and self.masks.mask and real_path(self.preview) == real_path(self.masks.mask),
             f"--preview {self.preview}: is the folder of the masks, where the pictures would be taken for masks next "
             "time; give another"),
            (self.sound_only and self.audio_dir is not None,
             "--audio_dir: with --sound_only the recordings themselves are the INPUT; leave it out"),
            (self.sound_only and self.audio == "none",
             "--audio none: with --sound_only there would be nothing to train on; leave it out"),
            (self.sound_only and any(real_path(path) == real_path(self.output_dir) for path in self.inputs),
             f"--output_dir {self.output_dir}: is the folder of the recordings, beside which there would be two sounds "
             "of one name; give another"),
            (self.sound_only and self.recursive
             and any(real_path(path) in real_path(self.output_dir).parents for path in self.inputs),
             f"--output_dir {self.output_dir}: lies in the folder of the recordings, whose subfolders --recursive "
             "takes; the sounds beside the features would be taken for recordings next time; give another"),
            (self.sound_only and self.format == "memmap",
             "--sound_only makes .npz files; for a memmap of sound cut the recordings with partition_clips.py and give "
             "--recordings and --captions"),
            (self.format == "memmap" and self.prune,
             "--prune: a memmap holds the clips of its list only; leave it out"),
            (self.format == "memmap" and self.duration != DEFAULT_DURATION_SEC,
             f"--duration is {self.duration:g}, but the rows of a memmap are {DEFAULT_DURATION_SEC:g} s; leave "
             "--duration out, or use --format npz"),
        )
        yield from (message for wrong, message in rules if wrong)
