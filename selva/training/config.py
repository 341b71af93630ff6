"""Settings of a training: the run, the adapter's optimisation and objective, validation; needs no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from selva import flow
from selva.audio.config import AUDIO_NORMALIZATIONS, Normalize
from selva.lora.config import LoRAConfig
from selva.sequence import DEFAULT_DURATION_SEC
from selva.utils.device import PRECISION_CHOICES, PRECISION_HELP
from selva.utils.errors import UserError
from selva.utils.settings import required, setting
from selva.weights.config import GENERAL, ModelConfig

LATENT_MODES = ("sample", "mode")
LR_SCHEDULES = ("constant", "cosine", "multistep", "cosine_restarts")
CLIP_FEATURE_MODES = ("use", "empty")

DATA = "data and output"
OPTIMISATION = "optimisation (a step is one update, whatever --grad_accum is)"
OBJECTIVE = "objective (the defaults are how the base models were trained)"
EVALUATION = "evaluation"
PRESERVATION = "keeping what the model knows"
MEMORY = "memory and speed"


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, objective and evaluation; one step is one optimiser update, whatever ``grad_accum`` is."""

    steps: int = setting(2000, "updates", group=OPTIMISATION, aliases=("max_train_steps",),
                         similar=("epochs", "num_train_epochs", "max_train_epochs", "num_epochs", "iterations"))
    lr: float = setting(1e-4, "learning rate", group=OPTIMISATION, aliases=("learning_rate",),
                        similar=("unet_lr", "rate"))
    warmup_steps: int = setting(100, "updates over which the rate rises", group=OPTIMISATION,
                                aliases=("lr_warmup_steps",))
    lr_schedule: str = setting(
        "constant", "what the rate does then: stays; falls to 0 in half a cosine; falls at --lr_milestones, as in "
        "MMAudio; or falls to 0 --lr_cycles times", group=OPTIMISATION, choices=LR_SCHEDULES,
        similar=("lr_scheduler", "lr_scheduler_type"))
    lr_milestones: tuple[float, ...] = setting(
        (0.8, 0.9), "where multistep lowers the rate, counted after the warm-up: below 1 a fraction of --steps, else a "
        "step", group=OPTIMISATION, nargs="+", metavar="WHEN", default_text="0.8 0.9, MMAudio's")
    lr_factor: float = setting(0.1, "what multistep multiplies the rate by at each of them", group=OPTIMISATION)
    lr_cycles: int = setting(4, "cycles of cosine_restarts", group=OPTIMISATION)
    batch_size: int = setting(4, "clips per forward pass", group=OPTIMISATION,
                              aliases=("train_batch_size",))
    grad_accum: int = setting(1, "forward passes per update", group=OPTIMISATION,
                              aliases=("gradient_accumulation_steps",))
    lora_plus_ratio: float = setting(  # arXiv:2402.12354
        1.0, "LoRA+: rate of the B matrices over that of the A matrices", group=OPTIMISATION)
    weight_decay: float = setting(1e-6, "decoupled weight decay of the adapter", group=OPTIMISATION)
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    ema_decay: float = setting(  # 0: no average of the adapter is kept
        0.0, "keep a moving average of the adapter, which is then what is judged and saved; e.g. 0.999",
        group=OPTIMISATION)
    timestep_mode: str = setting("logit_normal", "times to train at; curriculum is logit_normal first and uniform "
                                 "later", group=OBJECTIVE, choices=flow.TIMESTEP_MODES)
    logit_normal_sigma: float = setting(1.0, "spread of logit_normal", group=OBJECTIVE)
    curriculum_switch: float = setting(0.6, "fraction of all steps at which curriculum switches", group=OBJECTIVE)
    null_prob: float = setting(0.1, "how often the video, and separately the text, is replaced by the empty condition",
                               group=OBJECTIVE)
    latent: str = setting("sample", "draw each target from the VAE posterior, or take its mode", group=OBJECTIVE,
                          choices=LATENT_MODES)
    clip_features: str = setting(
        "use", "pass CLIP frame features, or the empty ones as official SelVA does; stored in the adapter and followed "
        "by infer.py", group=OBJECTIVE, choices=CLIP_FEATURE_MODES)
    patience: int = setting(0, "stop after so many validations without a better one; 0: never", group=EVALUATION)
    seed: int = setting(42, "seed of everything random", group=GENERAL)
    save_every: int = setting(500, "steps between checkpoints, each with a sample", group=OPTIMISATION,
                              aliases=("save_every_n_steps", "checkpointing_steps"))
    val_every: int = setting(100, "steps between validations", group=EVALUATION)
    log_every: int = setting(10, "steps between log lines", group=EVALUATION)

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, expected at least {least}"
            for name, least in (("steps", 1), ("warmup_steps", 0), ("batch_size", 1), ("grad_accum", 1),
                                ("save_every", 1), ("val_every", 1), ("log_every", 1), ("lr_cycles", 1),
                                ("patience", 0))
            if getattr(self, name) < least
        ]
        problems += [
            f"{name} is {getattr(self, name)}, expected a number above 0"
            for name in ("lr", "lora_plus_ratio", "logit_normal_sigma", "grad_clip")
            if not 0 < getattr(self, name) < math.inf
        ]
        problems += [
            f"{name} is {getattr(self, name)}, expected 0 to 1"
            for name in ("null_prob", "curriculum_switch")
            if not 0 <= getattr(self, name) <= 1
        ]
        object.__setattr__(self, "lr_milestones", tuple(self.lr_milestones))
        if not self.lr_milestones or not all(0 < when < math.inf for when in self.lr_milestones):
            given = " ".join(f"{when:g}" for when in self.lr_milestones) or "empty"
            problems.append(f"lr_milestones is {given}, expected numbers above 0: fractions of all steps, or steps")
        if not 0 < self.lr_factor < 1:
            problems.append(f"lr_factor is {self.lr_factor}, expected more than 0 and less than 1")
        if not 0 <= self.ema_decay < 1:
            problems.append(f"ema_decay is {self.ema_decay}, expected 0 to below 1")
        if not 0 <= self.weight_decay < math.inf:
            problems.append(f"weight_decay is {self.weight_decay}, expected at least 0")
        problems += [
            f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
            for name, allowed in (("timestep_mode", flow.TIMESTEP_MODES), ("latent", LATENT_MODES),
                                  ("clip_features", CLIP_FEATURE_MODES), ("lr_schedule", LR_SCHEDULES))
            if getattr(self, name) not in allowed
        ]
        if problems:
            raise UserError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of one run of ``train_lora.py``: data, model, adapter, training, output."""

    data_dir: Path = required("folder of .npz + sound pairs, or an MMAudio memmap", group=DATA,
                              similar=("train_data_dir", "dataset_dir", "dataset"))
    output_dir: Path = setting(Path("lora_output"), "folder of this run, whose files have fixed names", group=DATA,
                               similar=("output_name", "logging_dir"))
    resume: str | None = setting(None, "continue from a step file; auto takes the newest of the output folder, if any",
                                 group=DATA, metavar="FILE|auto", similar=("resume_from_checkpoint",))
    init_from: Path | None = setting(
        None, "start a new run at a finished adapter, with a fresh optimiser and on any data", group=DATA,
        metavar="ADAPTER")
    dry_run: bool = setting(False, "check everything, try two steps, estimate memory and time, and write nothing",
                            group=DATA)
    skip_invalid: bool = setting(False, "train without the clips that cannot be used, instead of stopping to name them",
                                 group=DATA)
    duration: float = setting(DEFAULT_DURATION_SEC, "longer clips are trained on in windows of this length; shorter "
                              "ones stay as they are", group=DATA)
    normalize_audio: Normalize = setting("peak", "peak: 0.95 of full scale, as the base models were trained; none: as "
                                   "recorded", group=DATA, choices=AUDIO_NORMALIZATIONS)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    val_fraction: float = setting(0.1, "share of the clips held out to see overfitting; none below five clips",
                                  group=EVALUATION)
    val_dir: Path | None = setting(None, "hold out the clips of this folder instead", group=EVALUATION)
    val_clips: int = setting(100, "held-out clips that a validation computes, always the same; 0: all of them",
                             group=EVALUATION)
    keep_last: int = setting(0, "step files to keep; 0: all of them", group=EVALUATION)
    tensorboard: bool = setting(False, "write the curves for TensorBoard too", group=EVALUATION)
    preview: bool = setting(True, "generate a sample at every checkpoint", group=EVALUATION)
    preserve: tuple[str, ...] = setting(
        (), "prompts of sounds that the model knows and shall keep: it also trains on sounds that it has generated for "
        "them at the start. Without them, the new sound may replace others", group=PRESERVATION, nargs="*",
        metavar="PROMPT")
    preserve_share: float = setting(0.5, "share of these sounds in the training", group=PRESERVATION)
    grad_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory for more time",
                                       group=MEMORY, aliases=("gradient_checkpointing",))
    checkpoint_blocks: int | None = setting(None, "recompute only the first N blocks, as few as the memory needs",
                                            group=MEMORY, metavar="N", at_least_one=True)
    compile: bool = setting(
        False, "compile the blocks with torch.compile, for faster steps: the first ones take a minute or more, less in "
        "the next run, as the result is kept; needs a C++ compiler, on NVIDIA GPUs triton", group=MEMORY)
    precision: str = setting("auto", PRECISION_HELP, group=GENERAL, choices=PRECISION_CHOICES,
                             aliases=("mixed_precision",), synonyms={"no": "fp32"})

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.val_fraction < 1:
            problems.append(f"val_fraction is {self.val_fraction}, expected 0 to below 1")
        if not 0 < self.preserve_share < 1:
            problems.append(f"preserve_share is {self.preserve_share}, expected more than 0 and less than 1")
        problems += [f"{name} is {getattr(self, name)}, expected at least 0" for name in ("keep_last", "val_clips")
                     if getattr(self, name) < 0]
        folders = {"--data_dir": self.data_dir, "--val_dir": self.val_dir}
        problems += [f"{flag} {path}: no such folder" for flag, path in folders.items() if path and not path.is_dir()]
        if self.resume not in (None, "auto") and not Path(self.resume).is_file():
            problems.append(f"--resume {self.resume}: no such file")
        if self.init_from is not None:
            if self.resume not in (None, "auto"):
                problems.append("--init_from starts a new run and --resume continues one; give one of them")
            if self.lora.init != "standard":
                problems.append(f"--init {self.lora.init} starts at the base model and --init_from at an adapter; "
                                "give one of them")
            if self.resume is None and not self.init_from.is_file():
                problems.append(f"--init_from {self.init_from}: no such file")
        if problems:
            raise UserError("; ".join(problems))
