"""Settings of a training: the run, the adapter's optimisation and objective, validation; needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from selva import flow
from selva.audio.config import AUDIO_NORMALIZATIONS, Normalize
from selva.data.source import DataSource, missing_folders, parse_sources
from selva.lora.config import LoRAConfig
from selva.sequence import DEFAULT_DURATION_SEC
from selva.utils.device import BASE_DTYPE_CHOICES, BASE_DTYPE_HELP, GRAPH_CHOICES, PRECISION_CHOICES, PRECISION_HELP
from selva.utils.errors import UsageError, UserError
from selva.utils.settings import Removed, required, setting
from selva.utils.text import counted
from selva.weights.config import GENERAL, GeneratorModelConfig

LATENT_MODES = ("sample", "mode")
LR_SCHEDULES = ("constant", "cosine", "multistep", "cosine_restarts")
CLIP_FEATURE_MODES = ("use", "empty")
TRACKERS = ("tensorboard", "wandb", "trackio")
EMA_KINDS = ("exponential", "power")
MAX_SIGMA_REL = 0.288  # of an average over all steps with equal weights
ADAPTER_FORMATS = {"pt": (".pt",), "safetensors": (".safetensors",), "both": (".pt", ".safetensors")}
PADDED_LOSSES = ("masked", "full")
BALANCES = ("clips", "sets")

DATA = "data and output"
OPTIMISATION = "optimisation (a step is one update, whatever --grad_accum is)"
OBJECTIVE = "objective (where nothing else is said, the defaults are how the base models were trained)"
EVALUATION = "evaluation"
PRESERVATION = "keeping what the model knows"
MEMORY = "memory and speed"


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective, which trainings of adapters and of base models share."""

    timestep_mode: str = setting("logit_normal", "how noise levels are drawn; curriculum: logit_normal first, "
                                 "uniform later", group=OBJECTIVE, choices=flow.TIMESTEP_MODES)
    logit_normal_sigma: float = setting(1.0, "spread of logit_normal", group=OBJECTIVE)
    curriculum_switch: float = setting(0.6, "fraction of all steps at which curriculum switches", group=OBJECTIVE)
    null_prob: float = setting(0.1, "how often the video, and separately the text, is replaced by the empty condition",
                               group=OBJECTIVE, similar=("caption_dropout_rate", "caption_dropout", "text_dropout"))
    latent: str = setting("sample", "draw each target from the VAE posterior, or take its mode", group=OBJECTIVE,
                          choices=LATENT_MODES)
    clip_features: str = setting(
        "use", "whether the model sees CLIP image features (use) or not (empty, as official SelVA); infer.py follows "
        "what the adapter was trained with", group=OBJECTIVE, choices=CLIP_FEATURE_MODES)
    seed: int = setting(42, "seed of everything random", group=GENERAL)
    validation_times: ClassVar[int] = 4  # per held-out clip, each in the middle of one of as many bins of [0, 1]
    padded_loss: str = "masked"  # of rows of memmaps it is not known how much of them is padding

    def problems(self) -> list[str]:
        """Return a sentence for every value that is out of range."""
        problems = []
        if not 0 < self.logit_normal_sigma < math.inf:
            problems.append(f"logit_normal_sigma is {self.logit_normal_sigma}, expected a number above 0")
        problems += [
            f"{name} is {getattr(self, name)}, expected 0 to 1"
            for name in ("null_prob", "curriculum_switch")
            if not 0 <= getattr(self, name) <= 1
        ]
        return problems + choice_problems(self, {
            "timestep_mode": flow.TIMESTEP_MODES, "latent": LATENT_MODES, "clip_features": CLIP_FEATURE_MODES})


def least_problems(config: object, least: dict[str, int]) -> list[str]:
    """Return a sentence for every named field of a configuration that is below its least value."""
    return [f"{name} is {getattr(config, name)}, expected at least {value}" for name, value in least.items()
            if getattr(config, name) < value]


def positive_problems(config: object, names: Sequence[str]) -> list[str]:
    """Return a sentence for every named field of a configuration that is no finite number above 0."""
    return [f"{name} is {getattr(config, name)}, expected a number above 0" for name in names
            if not 0 < getattr(config, name) < math.inf]


MILESTONES_HELP = ("where multistep lowers the rate, counted after the warm-up: below 1 a fraction of --steps, else a "
                   "step")
FACTOR_HELP = "what multistep multiplies the rate by at each of them"


def milestone_problems(milestones: Sequence[float], factor: float) -> list[str]:
    """Return a sentence for every setting of the multistep schedule that is out of range."""
    problems = []
    if not milestones or not all(0 < when < math.inf for when in milestones):
        given = " ".join(f"{when:g}" for when in milestones) or "empty"
        problems.append(f"lr_milestones is {given}, expected numbers above 0: fractions of all steps, or steps")
    if not 0 < factor < 1:
        problems.append(f"lr_factor is {factor}, expected more than 0 and less than 1")
    return problems


def check_settings_of_old_run(settings_file: Path | None, output_dir: Path, resume: str | None) -> None:
    """Raise a UsageError if a new run would be written over the old one whose settings file it starts from.

    An old run's ``config.yaml`` holds its ``output_dir``; who changes ``--data_dir`` alone means a new run.

    Args:
        settings_file: that ``--config`` names.
    """
    if settings_file is None or resume is not None or output_dir.resolve() not in settings_file.resolve().parents:
        return
    raise UsageError(f"--config {settings_file}: is of the run in {output_dir}, where a new run would be written too; "
                     "give another --output_dir, or continue that run with --resume auto")


def choice_problems(config: object, choices: dict[str, Sequence[str]]) -> list[str]:
    """Return a sentence for every named field of a configuration that is none of its choices."""
    return [f"{name} is {getattr(config, name)!r}, expected one of {', '.join(allowed)}"
            for name, allowed in choices.items() if getattr(config, name) not in allowed]


def width_problems(widths: Sequence[float]) -> list[str]:
    """Return a sentence for everything that is wrong with the widths of averages by power functions."""
    problems = [f"ema_sigma_rel is {width}, expected above 0 and at most {MAX_SIGMA_REL}" for width in widths
                if not 0 < width <= MAX_SIGMA_REL]
    if not widths or len(set(widths)) < len(widths):
        problems.append(f"ema_sigma_rel is {list(widths)}, expected every width once")
    return problems


@dataclass(frozen=True)
class TrainConfig(ObjectiveConfig):
    """Optimisation, objective and evaluation; one step is one optimiser update, whatever ``grad_accum`` is."""

    REMOVED: ClassVar[Mapping[str, Removed]] = {
        "contrastive": Removed(0.0, "contrastive flow matching made no difference in nine runs (docs/findings.md)"),
        "stratify_times": Removed(False, "noise levels spread over a batch made no difference in nine runs "
                                         "(docs/findings.md)"),
        "keep_unconditional": Removed(0.0, "with it, new sounds were less near to the recordings, and not proven to "
                                           "come out more often, in nine runs (docs/findings.md)"),
    }
    timestep_mode: str = setting(
        "uniform", "how noise levels are drawn. uniform: as in the published guide, no worse for new sounds; "
        "logit_normal: as the base models were trained; curriculum: logit_normal first, uniform later",
        group=OBJECTIVE, choices=flow.TIMESTEP_MODES)
    steps: int = setting(2000, "updates", group=OPTIMISATION, aliases=("max_train_steps",),
                         similar=("epochs", "num_train_epochs", "max_train_epochs", "num_epochs", "iterations"))
    lr: float = setting(1e-4, "learning rate", group=OPTIMISATION, aliases=("learning_rate",),
                        similar=("unet_lr", "rate"))
    lr_probe: bool = setting(
        False, "choose the learning rate by a test of about 30 steps on clips of this run, with rates that rise; --lr "
        "is not used then. The log and meta.json say what was chosen, and a resumed run keeps it", group=OPTIMISATION)
    warmup_steps: int = setting(100, "warm-up: updates over which the learning rate rises", group=OPTIMISATION,
                                aliases=("lr_warmup_steps",))
    lr_schedule: str = setting(
        "constant", "learning rate after the warm-up. constant: stays; cosine: falls to 0; multistep: falls at "
        "--lr_milestones, as in MMAudio; cosine_restarts: falls to 0 --lr_cycles times",
        group=OPTIMISATION, choices=LR_SCHEDULES,
        similar=("lr_scheduler", "lr_scheduler_type"))
    lr_milestones: tuple[float, ...] = setting(
        (0.8, 0.9), MILESTONES_HELP, group=OPTIMISATION, nargs="+", metavar="WHEN", default_text="0.8 0.9, MMAudio's")
    lr_factor: float = setting(0.1, FACTOR_HELP, group=OPTIMISATION)
    lr_cycles: int = setting(4, "cycles of cosine_restarts", group=OPTIMISATION)
    batch_size: int = setting(4, "clips per forward pass", group=OPTIMISATION,
                              aliases=("train_batch_size",))
    grad_accum: int = setting(1, "forward passes per update", group=OPTIMISATION,
                              aliases=("gradient_accumulation_steps",))
    lora_plus_ratio: float = setting(  # arXiv:2402.12354
        1.0, "LoRA+: rate of the B matrices over that of the A matrices", group=OPTIMISATION)
    weight_decay: float = setting(1e-6, "decoupled weight decay of the adapter", group=OPTIMISATION)
    adam_eps: float = setting(1e-8, "epsilon of AdamW; the base models were trained with 1e-6 in bf16",
                              group=OPTIMISATION)
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    ema: str = setting("exponential", "kind of the average of the adapter: exponential with --ema_decay, or power: "
                       "averages over a share of the training, from which scripts/make_ema.py makes others later",
                       group=OPTIMISATION, choices=EMA_KINDS)
    ema_sigma_rel: tuple[float, ...] = setting(
        (0.05, 0.1), "widths of the averages of --ema power, in relation to the length of the training; the first one "
        "is judged and saved", group=OPTIMISATION, nargs="+", metavar="X")
    ema_decay: float = setting(  # 0: no average of the adapter is kept
        0.0, "keep a moving average of the adapter, which is then validated, heard and saved; e.g. 0.999",
        group=OPTIMISATION)
    padded_loss: str = setting(
        "masked", "sound that is shorter than its features is padded with silence: leave that out of the loss (of "
        "folders; rows of a memmap store no length, so their silence is always trained on), or "
        "train on it as on sound, which teaches silence", group=OBJECTIVE, choices=PADDED_LOSSES)
    patience: int = setting(0, "stop after this many validations without a new best; 0: never", group=EVALUATION)
    save_every: int = setting(500, "steps between checkpoints, each with a sample", group=OPTIMISATION,
                              aliases=("save_every_n_steps", "checkpointing_steps"))
    val_every: int = setting(100, "steps between validations", group=EVALUATION)
    log_every: int = setting(10, "steps between log lines", group=EVALUATION)

    def __post_init__(self) -> None:
        problems = least_problems(self, {
            "steps": 1, "warmup_steps": 0, "batch_size": 1, "grad_accum": 1, "save_every": 1, "val_every": 1,
            "log_every": 1, "lr_cycles": 1, "patience": 0})
        problems += positive_problems(self, ("lr", "lora_plus_ratio", "grad_clip", "adam_eps"))
        object.__setattr__(self, "lr_milestones", tuple(self.lr_milestones))
        problems += milestone_problems(self.lr_milestones, self.lr_factor)
        if not 0 <= self.ema_decay < 1:
            problems.append(f"ema_decay is {self.ema_decay}, expected 0 to below 1")
        if self.ema == "power" and self.ema_decay:
            problems.append(f"ema is power and ema_decay {self.ema_decay}, which belongs to exponential; give one of "
                            "them (--ema_decay 0)")
        problems += width_problems(self.ema_sigma_rel)
        if not 0 <= self.weight_decay < math.inf:
            problems.append(f"weight_decay is {self.weight_decay}, expected at least 0")
        problems += [*self.problems(), *choice_problems(self, {
            "lr_schedule": LR_SCHEDULES, "ema": EMA_KINDS, "padded_loss": PADDED_LOSSES})]
        if problems:
            raise UserError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of one run of ``train_lora.py``: data, model, adapter, training, output."""

    REMOVED: ClassVar[Mapping[str, Removed]] = {
        "preserve_by": Removed("sounds", "a teacher kept less than preserved sounds in nine runs (docs/findings.md)"),
    }
    data_dir: list[str] = required(
        "folders of .npz + sound pairs, or MMAudio memmaps; of several, each may have a weight that says how often its "
        "clips are used: voices noises:3", group=DATA, nargs="+", metavar="DIR[:WEIGHT]",
        similar=("train_data_dir", "dataset_dir", "dataset"))
    balance: str = setting("clips", "what the weights of --data_dir compare: clips, each of which is used as often as "
                           "its weight says; or sets, which are used equally often in all, or as their weights say, "
                           "however many clips they have", group=DATA, choices=BALANCES)
    prompt_prefix: tuple[str, ...] = setting(
        (), "words before every prompt, such as a trigger word: one text for all data sets, or one for each in their "
        'order ("" for none)', group=DATA, nargs="*", metavar="TEXT", similar=("trigger_word", "caption_prefix",
                                                                            "class_tokens", "instance_prompt"))
    output_dir: Path = setting(Path("lora_output"), "folder of this run, whose files have fixed names", group=DATA,
                               similar=("output_name", "logging_dir"))
    resume: str | None = setting(None, "continue from a step file; auto takes the newest of the output folder, if any",
                                 group=DATA, metavar="FILE|auto", similar=("resume_from_checkpoint",))
    init_from: Path | None = setting(
        None, "start a new run from a finished adapter, with a fresh optimiser and on any data", group=DATA,
        metavar="ADAPTER")
    validate_only: bool = setting(False, "check settings, weight files and clips, and suggest settings for this data "
                                         "and machine; nothing is trained or written", group=DATA)
    dry_run: bool = setting(False, "check everything, say which batch fits a GPU, run a few steps and estimate the "
                                   "time; nothing is written", group=DATA)
    skip_invalid: bool = setting(False, "train without the clips that cannot be used (otherwise the run stops and "
                                        "names them)",
                                 group=DATA)
    duration: float = setting(DEFAULT_DURATION_SEC, "longer clips are trained on in windows of this length; shorter "
                              "ones stay as they are", group=DATA)
    normalize_audio: Normalize = setting("peak", "peak: 0.95 of full scale, as the base models were trained; none: as "
                                   "recorded", group=DATA, choices=AUDIO_NORMALIZATIONS)
    adapter_format: str = setting("pt", "file format of the best and the final adapter; ComfyUI-SelVA reads .pt "
                                        "only. Step files are always .pt", group=DATA, choices=tuple(ADAPTER_FORMATS))
    model: GeneratorModelConfig = field(default_factory=GeneratorModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    val_fraction: float = setting(0.1, "share of the clips held out to see overfitting; none below five clips",
                                  group=EVALUATION)
    val_dir: tuple[Path, ...] = setting((), "hold out the clips of these folders instead", group=EVALUATION, nargs="*",
                                        metavar="DIR")
    val_clips: int = setting(100, "number of held-out clips in a validation, always the same ones; 0: all of them",
                             group=EVALUATION)
    keep_last: int = setting(0, "step files to keep; 0: all of them", group=EVALUATION)
    tensorboard: bool = setting(False, "write the curves for TensorBoard too", group=EVALUATION)
    preview: bool = setting(True, "generate a sample at every checkpoint", group=EVALUATION)
    sample_prompts: Path | None = setting(
        None, "table (.tsv, .csv) of sounds to make before the first step and at every checkpoint: prompt, "
        "video or features (.npz), if wanted name, seed, strength, guidance", group=EVALUATION, metavar="FILE")
    eval_every: int = setting(0, "steps between evaluations of sounds made for up to four held-out clips, in figures "
                              "that need no networks; 0: none", group=EVALUATION)
    report_to: tuple[str, ...] = setting((), "where curves and samples go beside the output folder: tensorboard, "
                                         "wandb, trackio", group=EVALUATION, nargs="*", metavar="NAME")
    verdict: bool = setting(True, "say at the end whether it worked: sounds with and without the adapter, in figures "
                            "and on the page of the run", group=EVALUATION)
    verdict_share: float = setting(0.1, "leave the verdict out if it would cost more than this share of the training",
                                   group=EVALUATION)
    preserve: tuple[str, ...] = setting(
        (), "prompts of sounds that the model knows and should keep; it then also trains on sounds that it has "
        "generated for them. Without them, the new sound may replace others", group=PRESERVATION, nargs="*",
        metavar="PROMPT")
    preserve_share: float = setting(0.5, "share of these sounds in every batch", group=PRESERVATION)
    preserve_near: float = setting(
        0.0, "share of these sounds that goes to a quarter of the prompts: those that the text encoder finds most "
        "like the prompts of the clips, whose sounds are lost first", group=PRESERVATION)
    grad_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory for more time",
                                       group=MEMORY, aliases=("gradient_checkpointing",))
    checkpoint_blocks: int | None = setting(None, "recompute only the first N blocks, as few as the memory needs",
                                            group=MEMORY, metavar="N", at_least_one=True)
    compile: bool = setting(
        False, "compile the blocks with torch.compile, for faster steps: the first ones take a minute or more, less in "
        "the next run, as the result is kept; needs a C++ compiler, on NVIDIA GPUs triton", group=MEMORY)
    cuda_graph: str = setting(
        "auto", "on NVIDIA GPUs, start each training step as a whole instead of kernel by kernel. auto: where that is "
        "possible, otherwise the log says why not; on: an error where it is not", group=MEMORY, choices=GRAPH_CHOICES)
    base_dtype: str = setting("auto", BASE_DTYPE_HELP, group=MEMORY, choices=BASE_DTYPE_CHOICES)
    precision: str = setting("auto", PRECISION_HELP, group=GENERAL, choices=PRECISION_CHOICES,
                             aliases=("mixed_precision",), synonyms={"no": "fp32"}, shared=True)

    def __post_init__(self) -> None:
        if isinstance(self.data_dir, str | Path):
            object.__setattr__(self, "data_dir", [str(self.data_dir)])
        folders = [self.val_dir] if isinstance(self.val_dir, str | Path) else self.val_dir or ()
        object.__setattr__(self, "val_dir", tuple(map(Path, folders)))
        problems = choice_problems(self, {"balance": BALANCES})
        if not 0 <= self.val_fraction < 1:
            problems.append(f"val_fraction is {self.val_fraction}, expected 0 to below 1")
        problems += [f"--report_to {name!r}, expected some of {' '.join(TRACKERS)}, with spaces between them"
                     for name in self.report_to if name not in TRACKERS]
        if self.sample_prompts is not None and not self.sample_prompts.is_file():
            problems.append(f"--sample_prompts {self.sample_prompts}: no such file")
        if self.compile and self.base_dtype != "auto":
            problems.append(f"--compile does not go together with --base_dtype {self.base_dtype}; leave out either")
        if not self.verdict_share > 0:
            problems.append(f"verdict_share is {self.verdict_share}, expected more than 0; --no_verdict leaves it out")
        if not 0 < self.preserve_share < 1:
            problems.append(f"preserve_share is {self.preserve_share}, expected more than 0 and less than 1")
        if not 0 <= self.preserve_near <= 1:
            problems.append(f"preserve_near is {self.preserve_near}, expected 0 to 1")
        problems += [f"{name} is {getattr(self, name)}, expected at least 0"
                     for name in ("keep_last", "val_clips", "eval_every")
                     if getattr(self, name) < 0]
        try:
            problems += missing_folders("--data_dir", self.sources)
        except UserError as error:
            problems.append(str(error))
        problems += missing_folders("--val_dir", [DataSource(folder) for folder in self.val_dir])
        problems += self._prefix_problems()
        if self.resume not in (None, "auto") and not Path(self.resume).is_file():
            problems.append(f"--resume {self.resume}: no such file")
        if self.adapter_format not in ADAPTER_FORMATS:
            problems.append(f"adapter_format is {self.adapter_format!r}, expected one of {', '.join(ADAPTER_FORMATS)}")
        if self.resume is None and (problem := self.lora.start_problem()):
            problems.append(problem)
        if self.init_from is not None:
            if self.training.lr_probe:
                problems.append("--lr_probe is for a fresh adapter and --init_from starts at a finished one; give one "
                                "of them")
            if self.resume not in (None, "auto"):
                problems.append("--init_from starts a new run and --resume continues one; give one of them")
            if self.lora.init != "standard":
                problems.append(f"--init {self.lora.init} starts at the base model and --init_from at an adapter; "
                                "give one of them")
            if self.resume is None and not self.init_from.is_file():
                problems.append(f"--init_from {self.init_from}: no such file")
        if problems:
            raise UserError("; ".join(problems))

    def _prefix_problems(self) -> list[str]:
        given, sets, held_out = len(self.prompt_prefix), len(self.data_dir), len(self.val_dir)
        if given > 1 and given != sets:
            return [f"prompt_prefix has {counted(given, 'text')} and data_dir {counted(sets, 'set')}; give one text "
                    "for all of them, or one "
                    "for each"]
        if given > 1 and held_out and held_out != sets:
            return [f"prompt_prefix has a text for each of {counted(sets, 'data set')} and val_dir "
                    f"{counted(held_out, 'folder')}; give a "
                    "val_dir for each set too, in the same order, or one prefix for all"]
        return []

    def prefixes(self, number: int) -> list[str]:
        """Return the prefix of the prompts of each of ``number`` sets: those to train on, or those held out."""
        given = list(self.prompt_prefix) or [""]
        return given if len(given) > 1 else given * number

    @property
    def sources(self) -> list[DataSource]:
        """The data sets with their weights."""
        return parse_sources(self.data_dir)
