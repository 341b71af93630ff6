"""Settings of ``infer.py``; needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from selva.audio.config import DEFAULT_TARGETS, LOUDNESS_METHODS
from selva.flow import WHOLE_INTERVAL, SamplingConfig, check_interval
from selva.inputs.suffixes import AUDIO_SUFFIXES, OUTPUT_AUDIO_SUFFIXES, OUTPUT_VIDEO_SUFFIXES, VIDEO_SUFFIXES
from selva.inputs.table import unsafe_id
from selva.media.mask_settings import MaskOptions
from selva.sequence import DEFAULT_DURATION_SEC, SHORTEST_SEC
from selva.utils.device import BASE_DTYPE_CHOICES, BASE_DTYPE_HELP, GRAPH_CHOICES, PRECISION_CHOICES, PRECISION_HELP
from selva.utils.errors import UserError
from selva.utils.settings import setting
from selva.weights.config import GENERAL, GeneratorModelConfig

CLIP_FEATURE_CHOICES = ("auto", "use", "empty")
OFFLOAD_CHOICES = ("auto", "none")
DEFAULT_BATCH_SIZE = 4
WHOLE_VIDEO_SEC = 86_400.0  # longer than any; a video that ends earlier makes a shorter clip

INPUT, OUTPUT, ADAPTERS, SAMPLING = "what to make sound for", "what to write", "adapters", "sampling"
SUFFIXES = OUTPUT_AUDIO_SUFFIXES + OUTPUT_VIDEO_SUFFIXES
KNOWN_SUFFIXES = AUDIO_SUFFIXES + VIDEO_SUFFIXES  # any other ending, as in v0.5, is a part of a folder's name


@dataclass(frozen=True)
class InferenceConfig:
    """Settings of one call of ``infer.py``: inputs, outputs, model, adapters, sampling."""

    inputs: list[Path] = setting(
        [], "videos, folders of videos, or tables (.tsv, .csv) with the columns id, and optionally prompt, path, "
            "start, duration, mask", group=INPUT, positional=True, nargs="*", metavar="INPUT")
    video: list[Path] = setting([], "a video; may be given several times", group=INPUT, repeat=True, metavar="FILE")
    features: list[Path] = setting(
        [], "features from extract_features.py instead: an .npz or a folder of them; may be given several times",
        group=INPUT, repeat=True, metavar="PATH")
    recursive: bool = setting(False, "take the subfolders of a folder too", group=INPUT)
    prompt: str | None = setting(None, "the prompt: what is to be heard (default with --features: theirs); without a "
                                       "video, sound is made from words only", group=INPUT)
    prompts: Path | None = setting(None, "prompts.txt with lines `name.npz: prompt`", group=INPUT, metavar="FILE")
    negative_prompt: str = setting("", "what is not to be heard", group=INPUT)
    start: float = setting(0.0, "seconds into the video where the sound begins", group=INPUT)
    duration: float | None = setting(
        None, f"seconds of sound (default {DEFAULT_DURATION_SEC:g}, or what the features cover; with --long to the end "
        "of the video)", group=INPUT)
    long: bool = setting(False, f"for videos longer than {DEFAULT_DURATION_SEC:g} s: make sound for the whole length, "
                         "in overlapping windows", group=INPUT)
    masks: MaskOptions = field(default_factory=MaskOptions)
    output: Path = setting(Path("output"), "a folder, or for one sound a file name ending in .flac, .wav, .mp4, .mov, "
                           ".mkv or .m4v", group=OUTPUT)
    name: str | None = setting(None, "name of the files of a single sound in the folder, without their endings "
                               "(default: that of the video or the features, or the words)", group=OUTPUT)
    audio_only: bool = setting(False, "write no video", group=OUTPUT)
    normalize: str = setting(
        "none", "bring each sound to a level: its RMS, its loudness or its true peak, which is kept below -1 dBTP in "
        "any case. none: the level that the model makes", group=OUTPUT, choices=LOUDNESS_METHODS)
    target: float | None = setting(
        None, "that level (default " + ", ".join(f"{k} {v:g}" for k, v in DEFAULT_TARGETS.items()) + ")", group=OUTPUT,
        metavar="DB")
    overwrite: bool = setting(False, "generate again what is there already", group=OUTPUT)
    model: GeneratorModelConfig = field(default_factory=GeneratorModelConfig)
    adapter: list[Path] = setting([], "LoRA adapter, ours or one of ComfyUI-SelVA; may be given several times",
                                  group=ADAPTERS, repeat=True, metavar="FILE")
    strength: list[float] = setting([], "strength of the adapter at the same position (default 1; 0 is the base model)",
                                    group=ADAPTERS, repeat=True)
    times: tuple[float, float] = setting(
        WHOLE_INTERVAL, "use the adapters only between these times of sampling; 0 is noise, 1 is sound",
        group=ADAPTERS, nargs=2,
        metavar=("LO", "HI"), default_text="0 1")
    layers: tuple[str, ...] = setting(
        (), "use the adapters only in layers whose names end in, or match, one of these: attn.qkv 'joint_blocks.*'",
        group=ADAPTERS, nargs="+", metavar="PATTERN", default_text="all")
    clip_features: str = setting(
        "auto", "give the model CLIP features of the pictures (use), or the empty ones. auto: as the adapter was "
        "trained, also one in a --generator that says so (.safetensors of adapter.py bake); without an adapter as the "
        "official release, empty for SelVA and use for MMAudio", group=ADAPTERS,
        choices=CLIP_FEATURE_CHOICES)
    compare: Path | None = setting(
        None, "compare adapters: the same clips and seeds with each line of this list, `path strength [label]` or "
        "`base`; writes a sheet of spectrograms and figures", group=ADAPTERS, metavar="FILE")
    reference: Path | None = setting(
        None, "with --compare: sounds named like the clips to compare with (default: the video's own sound, or the one "
        "beside the features)", group=ADAPTERS, metavar="DIR")
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    num_variations: int = setting(
        1, "sounds per clip, with the seeds --seed to --seed + N - 1, called <name>_1 to <name>_N", group=SAMPLING,
        metavar="N", at_least_one=True)
    batch_size: int = setting(DEFAULT_BATCH_SIZE, "sounds of equal length that are generated together", group=SAMPLING,
                              at_least_one=True)
    offload: str = setting(
        "auto", "auto: load one network after the other and free it, which takes the least memory; none: keep all "
        "loaded, which is quicker for many clips", group=SAMPLING, choices=OFFLOAD_CHOICES)
    cuda_graph: str = setting(
        "auto", "on NVIDIA GPUs, start each pass of the generator as a whole instead of kernel by kernel. auto: where "
        "that is possible; on: an error where it is not", group=SAMPLING, choices=GRAPH_CHOICES)
    base_dtype: str = setting("auto", BASE_DTYPE_HELP, group=SAMPLING, choices=BASE_DTYPE_CHOICES)
    seed: int = setting(42, "seed of everything random", group=GENERAL)
    precision: str = setting("auto", PRECISION_HELP, group=GENERAL, choices=PRECISION_CHOICES, shared=True)

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise UserError("; ".join(problems))
        object.__setattr__(self, "times", check_interval("--times", self.times))

    @property
    def weight_parts(self) -> tuple[str, ...]:
        """Parts of the base model that are needed in any case; an adapter may want the CLIP pictures too."""
        pictures = ("video_encoder", "t5", *(["clip_image"] if self.clip_features == "use" else []))
        return ("generator", "vae", "vocoder", "clip_text", *(pictures if self.videos else ()))

    @property
    def videos(self) -> list[Path]:
        """Videos, folders and tables that are to get sound."""
        return [*self.inputs, *self.video]

    @property
    def output_is_file(self) -> bool:
        """True where ``output`` names the file of a single sound, not a folder."""
        return self.output.suffix.lower() in SUFFIXES and not self.output.is_dir()

    def _problems(self) -> Iterator[str]:
        """Yield a message for every setting, or combination of settings, that is wrong."""
        videos, suffix = bool(self.videos), self.output.suffix.lower()
        files = (*self.adapter, self.prompts, self.compare)
        yield from (f"{path}: {_not_a_file(path)}" for path in files if path and not path.is_file())
        yield from (f"{path}: no such file" for path in (*self.videos, *self.features) if not path.exists())
        yield from (f"--output {self.output}: is the video itself" for path in self.videos
                    if self.output.is_file() and path.is_file() and self.output.samefile(path))
        rules = (
            (videos and self.features, "give videos or --features, not both"),
            (not (videos or self.features or self.prompt), "give a video, --features or --prompt"),
            (len(self.strength) > len(self.adapter),
             f"{len(self.strength)} --strength for {len(self.adapter)} --adapter"),
            (self.compare and self.adapter, "with --compare the adapters stand in its list, not in --adapter"),
            (not self.adapter and (tuple(self.times) != WHOLE_INTERVAL or self.layers),
             "--times and --layers belong to --adapter; with --compare they stand in its list, as times=LO-HI and "
             "layers=PATTERN"),
            (self.reference and not self.compare, "--reference belongs to --compare"),
            (suffix in KNOWN_SUFFIXES and suffix not in SUFFIXES and not self.output.is_dir(),
             f"--output {self.output}: {suffix} is not written; expected a name ending in {', '.join(SUFFIXES)}, or a "
             "folder"),
            (self.name is not None and self.output_is_file,
             f"--name {self.name} and --output {self.output}: the file has a name already; give a folder"),
            (self.name is not None and unsafe_id(self.name), f"--name {self.name}: {unsafe_id(self.name or '')}"),
            (self.output_is_file and self.compare, f"--output {self.output}: --compare writes a folder"),
            (suffix in OUTPUT_VIDEO_SUFFIXES and (self.audio_only or not videos),
             f"--output {self.output}: a video is only written with --video and without --audio_only"),
            (self.duration is not None and not SHORTEST_SEC <= self.duration < math.inf,
             f"--duration is {self.duration}, expected at least {SHORTEST_SEC} seconds"),
            (not videos and (self.start or self.masks.mask or self.prompts),
             "--start, --mask and --prompts belong to videos; features have theirs already"),
            (self.target is not None and (self.normalize == "none" or not math.isfinite(self.target)),
             f"--target {self.target or 0:g}: expected a number of dB, together with --normalize"),
        )
        yield from (message for wrong, message in rules if wrong)


def _not_a_file(path: Path) -> str:
    """Return the reason why a path is not the file of an adapter or a list, with a guess at the one that was meant."""
    if not path.is_dir():
        return "no such file"
    if (path / "adapter_config.json").is_file():
        return "is a folder of PEFT; make a file of it: scripts/adapter.py convert FOLDER --output adapter.pt"
    if adapters := sorted(path.glob("adapter_final*")):
        return f"is a folder, expected a file; in it: {', '.join(path.name for path in adapters[-3:])}"
    return "is a folder, expected a file"
