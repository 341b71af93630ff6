"""Settings of `scripts/train_base.py`; needs no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from selva.data.source import DataSource, missing_folders, parse_sources
from selva.training.config import (
    CLIP_FEATURE_MODES,
    DATA,
    EVALUATION,
    FACTOR_HELP,
    LR_SCHEDULES,
    MEMORY,
    MILESTONES_HELP,
    OBJECTIVE,
    ObjectiveConfig,
    choice_problems,
    least_problems,
    milestone_problems,
    positive_problems,
)
from selva.utils.errors import UserError
from selva.utils.settings import required, setting
from selva.weights.config import GENERAL, MODEL, ModelConfig

PRECISIONS = ("auto", "bf16", "fp32")
SHARDINGS = ("none", "fsdp2")
OPTIMISATION = "optimisation (the defaults are those of the published models)"
AVERAGES = "averages of the weights"
PUBLISHED = "published"  # as --init: the weights of the variant itself


@dataclass(frozen=True, kw_only=True)
class BaseTrainConfig(ObjectiveConfig):
    """Settings of one training of a base model; a step is one update from ``batch_size`` rows of all processes."""

    data: list[str] = required(
        "memmaps of extract_features.py --format memmap, or MMAudio's, each with the weight that says how often an "
        "epoch visits its rows; video sets and sound-only sets in any number", group=DATA, nargs="+",
        metavar="DIR[:WEIGHT]")
    val_data: list[Path] = setting([], "memmaps to validate on; without them the last rows of every set are held out",
                                   group=DATA, nargs="*", metavar="DIR")
    hold_out: int = setting(16, "rows at the end of every set that are never trained on, where --val_data is not "
                            "given; at most a fifth of a set", group=DATA)
    val_rows: int = setting(100, "held-out rows that a validation computes, always the same; 0: all of them",
                            group=EVALUATION)
    output_dir: Path = setting(Path("base_output"), "folder of this run", group=DATA)
    resume: str | None = setting(None, "continue from a folder below checkpoints/, or from a _ckpt_last.pth of "
                                 "MMAudio's own trainer; auto takes the newest of the output folder, if any",
                                 group=DATA, metavar="PATH|auto")
    dry_run: bool = setting(False, "check everything, try two steps, estimate memory and time, and write nothing",
                            group=DATA)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: str | None = setting(
        None, f"weights to start from instead of random ones: a .pth or .safetensors file of a generator, or the word "
        f"{PUBLISHED} for those of --variant", group=MODEL, metavar=f"FILE|{PUBLISHED}")
    trainable: tuple[str, ...] = setting(
        ("*",), "patterns of the parameters that are trained, such as 'fused_blocks.*'", group=MODEL, nargs="+",
        metavar="PATTERN")
    steps: int = setting(300_000, "updates", group=OPTIMISATION)
    batch_size: int = setting(512, "rows of one update, of all processes together", group=OPTIMISATION)
    micro_batch_size: int | None = setting(
        None, "rows of one forward pass of a process, as many as its memory takes; all of its share if not given",
        group=OPTIMISATION, metavar="N", at_least_one=True)
    lr: float = setting(1e-4, "learning rate", group=OPTIMISATION)
    warmup_steps: int = setting(1000, "warm-up: updates over which the learning rate rises", group=OPTIMISATION)
    lr_schedule: str = setting("multistep", "learning rate after the warm-up; multistep lowers it at --lr_milestones",
                               group=OPTIMISATION, choices=LR_SCHEDULES)
    lr_milestones: tuple[float, ...] = setting(
        (0.8, 0.9), MILESTONES_HELP, group=OPTIMISATION, nargs="+", metavar="WHEN", default_text="0.8 0.9, MMAudio's")
    lr_factor: float = setting(0.1, FACTOR_HELP, group=OPTIMISATION)
    lr_cycles: int = setting(4, "cycles of cosine_restarts", group=OPTIMISATION)
    weight_decay: float = setting(1e-6, "decoupled weight decay, of all that is trained", group=OPTIMISATION)
    adam_eps: float | None = setting(None, "epsilon of AdamW", group=OPTIMISATION,
                                     default_text="1e-6 in bf16, 1e-8 in fp32")
    betas: tuple[float, float] = (0.9, 0.95)
    validation_times: ClassVar[int] = 25  # MMAudio's bins: validations are rare here, and small beside the steps
    grad_clip: float = setting(1.0, "largest norm of the gradient of an update", group=OPTIMISATION)
    clip_features: str = setting("use", "train with CLIP frame features, or with the empty ones as official SelVA does",
                                 group=OBJECTIVE, choices=CLIP_FEATURE_MODES)
    ema_sigma_rel: tuple[float, ...] = setting(
        (0.05, 0.1), "widths of the averages in relation to the length of the training; the first one is validated, "
        "sampled and exported", group=AVERAGES, nargs="+", metavar="X")
    ema_every: int = setting(0, "steps between snapshots of the averages, for scripts/make_ema.py; 0: a fortieth of "
                             "all steps", group=AVERAGES)
    save_every: int = setting(10_000, "steps between checkpoints", group=EVALUATION)
    keep_last: int = setting(2, "checkpoints to keep; 0: all of them", group=EVALUATION)
    val_every: int = setting(5000, "steps between validations", group=EVALUATION)
    log_every: int = setting(200, "steps between log lines and rows of metrics.jsonl", group=EVALUATION)
    sample_every: int = setting(20_000, "steps between sounds of held-out rows, made with the averaged weights; 0: "
                                "none",
                                group=EVALUATION)
    samples: int = setting(4, "how many of them; the figures of scripts/evaluate.py for them are among the metrics",
                           group=EVALUATION, at_least_one=True)
    clap: Path | None = setting(
        None, "folder of a CLAP model for transformers, as scripts/evaluate.py takes it: the samples are compared with "
        "their prompts too", group=EVALUATION, metavar="DIR")
    ast: Path | None = setting(
        None, "folder of an audio spectrogram transformer, likewise: the classes that are heard in the samples are "
        "compared with the recorded ones", group=EVALUATION, metavar="DIR")
    tensorboard: bool = setting(False, "write the curves for TensorBoard too", group=EVALUATION)
    patience: int = 0  # a base model is trained to its end
    shard: str = setting("none", "none: every process holds the model (DDP); fsdp2: they share weights, gradients and "
                         "optimiser state, for what does not fit", group=MEMORY, choices=SHARDINGS)
    grad_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory for more time",
                                       group=MEMORY)
    compile: bool = setting(False, "compile the blocks with torch.compile, for faster steps; the first ones take a "
                            "minute or more", group=MEMORY)
    prefetch: int = setting(4, "batches that are read ahead", group=MEMORY, at_least_one=True)
    readers: int = setting(2, "threads that read them, in every process", group=MEMORY, at_least_one=True)
    precision: str = setting("auto", "number format of the networks; weights, their updates and averages are always "
                             "float32", group=GENERAL, choices=PRECISIONS, shared=True)

    def __post_init__(self) -> None:
        problems = least_problems(self, {
            "steps": 1, "warmup_steps": 0, "batch_size": 1, "save_every": 1, "val_every": 1, "log_every": 1,
            "lr_cycles": 1, "keep_last": 0, "hold_out": 0, "val_rows": 0, "sample_every": 0, "ema_every": 0})
        problems += positive_problems(self, ("lr", "grad_clip", *(["adam_eps"] if self.adam_eps is not None else [])))
        object.__setattr__(self, "lr_milestones", tuple(self.lr_milestones))
        problems += milestone_problems(self.lr_milestones, self.lr_factor)
        if not 0 <= self.weight_decay < math.inf:
            problems.append(f"weight_decay is {self.weight_decay}, expected at least 0")
        problems += [f"ema_sigma_rel is {width}, expected above 0 and at most 0.288" for width in self.ema_sigma_rel
                     if not 0 < width <= 0.288]
        if len(set(self.ema_sigma_rel)) < len(self.ema_sigma_rel):
            problems.append(f"ema_sigma_rel is {list(self.ema_sigma_rel)}, expected every width once")
        problems += [*self.problems(), *choice_problems(self, {
            "lr_schedule": LR_SCHEDULES, "shard": SHARDINGS, "precision": PRECISIONS})]
        try:
            problems += missing_folders("--data", self.sources)
        except UserError as error:
            problems.append(str(error))
        problems += missing_folders("--val_data", [DataSource(Path(path)) for path in self.val_data])
        problems += [f"--{name} {path}: no such folder" for name, path in (("clap", self.clap), ("ast", self.ast))
                     if path is not None and not Path(path).is_dir()]
        if self.init not in (None, PUBLISHED) and not Path(self.init).is_file():
            problems.append(f"--init {self.init}: no such file")
        if self.resume not in (None, "auto") and not Path(self.resume).exists():
            problems.append(f"--resume {self.resume}: no such file or folder")
        if problems:
            raise UserError("; ".join(problems))

    @property
    def sources(self) -> list[DataSource]:
        """The data sets with their weights."""
        return parse_sources(self.data)

    def eps(self, precision: str) -> float:
        """Return the epsilon of AdamW in a precision, "bf16" or "fp32"; MMAudio's under autocast and without it."""
        if self.adam_eps is not None:
            return self.adam_eps
        return 1e-8 if precision == "fp32" else 1e-6
