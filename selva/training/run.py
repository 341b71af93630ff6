"""Training an adapter: the objective, validation on fixed noise, and the loop.

The recipe is that of the base models (MMAudio, arXiv:2412.15322): latents drawn from the VAE posterior at every visit,
logit-normal times, video and text conditions replaced by the learned empty ones with probability 0.1 each. Time, noise,
targets, loss, adapter, gradients and optimiser state are float32; only the frozen network runs in half precision.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from selva import flow
from selva.checkpoint import TrainingState
from selva.data.dataset import Batch, BucketBatches, TrainingSet, Visit, collate
from selva.lora.layers import load_lora_state_, lora_parameters, lora_plus_groups, named_factors
from selva.models.generator import Generator
from selva.training.condition_cache import ProjectedBatch, ProjectedClips, can_project
from selva.utils.distributed import World
from selva.utils.metrics_log import MetricsFile, Progress, clock, peak_memory_bytes, smoothed

log = logging.getLogger(__name__)

LATENT_MODES = ("sample", "mode")
LR_SCHEDULES = ("constant", "cosine", "multistep", "cosine_restarts")
MULTISTEP_DECAYS = (0.8, 0.9)  # fractions of all steps at which multistep divides the rate by ten, as MMAudio did
CLIP_FEATURE_MODES = ("use", "empty")
VALIDATION_TIMES = 4  # fixed times per held-out clip, one in the middle of each quarter of [0, 1]
OVERFITTING_AFTER = 3  # validations in a row above the best one, while the training loss falls, before we say so
ALONE = World()
MAX_BAD_STEPS = 20  # consecutive steps without a finite gradient after which a run cannot be saved


@dataclass(frozen=True)
class TrainConfig:
    """How an adapter is trained; one step is one optimiser update, whatever ``grad_accum`` is."""

    steps: int = 2000
    lr: float = 1e-4
    warmup_steps: int = 100
    lr_schedule: str = "constant"
    lr_cycles: int = 4  # of cosine_restarts
    batch_size: int = 4
    grad_accum: int = 1
    lora_plus_ratio: float = 1.0  # learning rate of lora_B over that of lora_A (arXiv:2402.12354)
    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    timestep_mode: str = "logit_normal"
    logit_normal_sigma: float = 1.0
    curriculum_switch: float = 0.6  # fraction of all steps
    null_prob: float = 0.1
    latent: str = "sample"
    clip_features: str = "use"
    ema_decay: float = 0.0  # 0: no average of the adapter is kept
    patience: int = 0  # stop after so many validations without a new best; 0: never
    seed: int = 42
    save_every: int = 500
    val_every: int = 100
    log_every: int = 10

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
            raise ValueError("; ".join(problems))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of optimiser step ``step`` (from 0): linear warm-up (k+1)/(W+1), then the schedule.

    The first step already learns, as in MMAudio (pitfall F1). "cosine" falls to 0 at the last step;
    "cosine_restarts" does so ``lr_cycles`` times; "multistep" divides by ten twice (``MULTISTEP_DECAYS``, counted
    after the warm-up, as in MMAudio).
    """
    after = step - config.warmup_steps
    if after < 0:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = after / max(1, config.steps - config.warmup_steps)  # from 0 to below 1
    if config.lr_schedule == "multistep":
        return config.lr * 0.1 ** sum(after >= decay * config.steps for decay in MULTISTEP_DECAYS)
    if config.lr_schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule == "cosine_restarts":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (progress * config.lr_cycles % 1)))
    return config.lr


# ---------------------------------------------------------------------------------------------------------------
# objective
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """Everything random about one batch, drawn on the CPU in float32 (masks: bool), so that devices agree.

    Attributes:
        posterior, noise: (B, N, C) standard normal. t: (B,). drop_video, drop_text: (B,) which conditions are empty.
    """

    posterior: Tensor
    t: Tensor
    noise: Tensor
    drop_video: Tensor
    drop_text: Tensor

    def part(self, own: slice) -> Draws:
        """Return the draws of some items of the batch."""
        return Draws(*(getattr(self, field.name)[own] for field in fields(self)))


def draw(shape: torch.Size, config: TrainConfig, rng: torch.Generator, progress: float) -> Draws:
    """Draw for a batch of latents of ``shape`` (B, N, C); the order is MMAudio's."""
    posterior = torch.randn(shape, generator=rng)
    t = flow.sample_times(
        shape[0], config.timestep_mode, rng, sigma=config.logit_normal_sigma,
        progress=progress, curriculum_switch=config.curriculum_switch,
    )
    noise = torch.randn(shape, generator=rng)
    drop_video = torch.rand(shape[0], generator=rng) < config.null_prob
    drop_text = torch.rand(shape[0], generator=rng) < config.null_prob
    return Draws(posterior, t, noise, drop_video, drop_text)


def flow_loss(
    generator: Generator, batch: Batch | ProjectedBatch, draws: Draws, config: TrainConfig, precision: torch.dtype
) -> Tensor:
    """Return the (B,) flow-matching losses of a batch, in float32.

    Args:
        batch: on the generator's device; features, or what the generator projected them to.
        draws: on the CPU, see :func:`draw`.
        precision: autocast dtype of the network; float32 switches autocast off.
    """
    device = batch.mean.device
    posterior, t, x0, drop_video, drop_text = (
        x.to(device, non_blocking=True)
        for x in (draws.posterior, draws.t, draws.noise, draws.drop_video, draws.drop_text)
    )
    generator.set_sequence(*batch.lengths)
    latent = batch.mean + batch.std * posterior if config.latent == "sample" else batch.mean
    x1 = generator.normalize(latent)
    xt = flow.interpolate(x0, x1, t)

    drop_video = drop_video | ~batch.has_video
    drop_clip = torch.ones_like(drop_video) if config.clip_features == "empty" else drop_video
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        if isinstance(batch, ProjectedBatch):
            conditions = batch.with_dropped(drop_clip, drop_video, drop_text)
        else:
            conditions = generator.preprocess_conditions(*_features(generator, batch, drop_clip, drop_video, drop_text))
        velocity = generator.predict_flow(xt, t, conditions)
    return flow.loss(velocity, x0, x1)


def _features(
    generator: Generator, batch: Batch, drop_clip: Tensor, drop_video: Tensor, drop_text: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the CLIP, sync and text features of a batch with the learned empty ones where the (B,) masks are True."""
    pairs = zip(
        (drop_clip, drop_video, drop_text), generator.empty_features(1), (batch.clip_f, batch.sync_f, batch.text_f),
        strict=True,
    )
    clip_f, sync_f, text_f = (torch.where(drop[:, None, None], empty, full) for drop, empty, full in pairs)
    return clip_f, sync_f, text_f


@torch.no_grad()
def validate(
    generator: Generator, clips: TrainingSet, config: TrainConfig, precision: torch.dtype, world: World = ALONE
) -> list[float]:
    """Return the mean held-out loss per time bin, ``VALIDATION_TIMES`` values from noise to data.

    Noise and posterior draws of a clip depend on the seed and its id, the times are fixed and nothing is dropped: two
    evaluations differ only by the adapter, and the random state of the training is not touched.
    """
    device = generator.latent_mean.device
    times = (torch.arange(VALIDATION_TIMES, dtype=torch.float32) + 0.5) / VALIDATION_TIMES
    nothing = torch.zeros(VALIDATION_TIMES, dtype=torch.bool)
    was_training = generator.training
    generator.eval()
    total = torch.zeros(VALIDATION_TIMES, device=device)
    for index in range(world.rank, len(clips), world.size):
        clip = clips.clip(index)
        rng = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{clip.id}".encode()))
        batch = collate([clip] * VALIDATION_TIMES).to(device)
        posterior, noise = (torch.randn(batch.mean.shape, generator=rng) for _ in range(2))
        total += flow_loss(generator, batch, Draws(posterior, times, noise, nothing, nothing), config, precision)
    generator.train(was_training)
    return (world.sum_(total) / len(clips)).tolist()


# ---------------------------------------------------------------------------------------------------------------
# the loop
# ---------------------------------------------------------------------------------------------------------------


class AdapterAverage:
    """Exponential moving average of the adapter, which wanders less than the adapter itself.

    The decay rises to its value over the first steps, so that the average does not cling to the initialisation.
    """

    def __init__(self, generator: Generator, decay: float) -> None:
        self.generator, self.decay = generator, decay
        self.factors = dict(named_factors(generator))
        self.average = {name: p.detach().clone() for name, p in self.factors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the adapter after ``step`` updates into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.factors.values()), 1 - decay)

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """Continue from an average with the keys of :func:`selva.lora.layers.lora_state_dict`."""
        for name, value in self.average.items():
            value.copy_(average[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model for the duration of the block."""
        trained = {name: p.detach().clone() for name, p in self.factors.items()}
        load_lora_state_(self.generator, self.average)
        try:
            yield
        finally:
            load_lora_state_(self.generator, trained)


class TrainingRun:
    """Everything that has a state and must survive a restart: adapter, optimiser, scaler, data order, random states.

    Args:
        generator: frozen base with adapters injected, on its device.
        clips: training clips. val_clips: held-out clips, possibly none.
        precision: autocast dtype of the network.
        world: the processes that share the training; each computes ``config.batch_size`` clips of every batch.
    """

    def __init__(
        self,
        generator: Generator,
        clips: TrainingSet,
        val_clips: TrainingSet,
        config: TrainConfig,
        precision: torch.dtype,
        world: World = ALONE,
    ) -> None:
        self.generator, self.val_clips, self.config, self.precision = generator, val_clips, config, precision
        self.world, self.device = world, generator.latent_mean.device
        self.batches = BucketBatches(clips, config.batch_size * world.size, config.seed)
        known_once = can_project(generator, self.batches.clips, precision)
        self.projected = ProjectedClips(generator, self.batches.clips, precision) if known_once else None
        self.rng = torch.Generator().manual_seed(config.seed)
        self.parameters = lora_parameters(generator)
        groups = lora_plus_groups(generator, config.lr, config.lora_plus_ratio)
        self.lr_factors = [group["lr"] / config.lr for group in groups]
        # Fused: one kernel for all factors, which skips an update by a flag on the device, without the host's knowing.
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)
        # Half-precision gradients below 6e-8 would vanish; bfloat16 has the range of float32 and needs no scaling.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.ema = AdapterAverage(generator, config.ema_decay) if config.ema_decay else None
        self.step = 0  # optimiser updates done
        self.best_step, self.best_val_loss, self.worse_in_a_row = 0, math.inf, 0

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Do one optimiser update and return the loss and the unclipped gradient norm, both scalars on the device.

        An update whose gradient is not finite is skipped.
        """
        config, own = self.config, self.world.own_slice(self.config.batch_size)
        total = torch.zeros((), device=self.device)
        for _ in range(config.grad_accum):
            visits = self.batches.draw()
            batch = self._load(visits[own])
            shape = torch.Size((len(visits), *batch.mean.shape[1:]))  # of the global batch
            draws = draw(shape, config, self.rng, progress=self.step / config.steps).part(own)
            loss = flow_loss(self.generator, batch, draws, config, self.precision).mean()
            self.scaler.scale(loss / config.grad_accum).backward()
            total += loss.detach() / config.grad_accum
        total = self.world.sum_(total) / self.world.size
        self.world.average_gradients_(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        lr = learning_rate(self.step, config)
        for group, factor in zip(self.optimizer.param_groups, self.lr_factors, strict=True):
            group["lr"] = lr * factor
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # skips by itself, and lowers the scale
            self.scaler.update()
        else:
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        return total, norm

    def _load(self, visits: Sequence[Visit]) -> Batch | ProjectedBatch:
        if self.projected is not None:
            return self.projected.load(visits)
        return self.batches.load(visits).to(self.device)

    def evaluated(self) -> AbstractContextManager[None]:
        """Return a context in which the model holds what is validated, heard and saved: the average if there is one."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def validate(self) -> dict[str, Any]:
        """Return the row for ``metrics.jsonl`` of a validation now, and keep track of the best step."""
        with self.evaluated():
            bins = validate(self.generator, self.val_clips, self.config, self.precision, self.world)
        loss = sum(bins) / len(bins)
        self.worse_in_a_row += 1
        if loss < self.best_val_loss:
            self.best_step, self.best_val_loss, self.worse_in_a_row = self.step, loss, 0
        return {"step": self.step, "val_loss": loss, "val_loss_bins": bins}

    def checkpoint_bytes(self) -> int:
        """Return about how large a step file is: factors, the same exported, two moments, and the average."""
        return sum(p.numel() for p in self.parameters) * 4 * (5 if self.ema else 4)

    def extra_state(self) -> dict[str, Any]:
        """Return what a step file must hold beside adapter and optimiser so that :meth:`restore` is exact."""
        return {
            "scaler": self.scaler.state_dict(),
            "batches": self.batches.state_dict(),
            "best": {"step": self.best_step, "val_loss": self.best_val_loss, "worse_in_a_row": self.worse_in_a_row},
            "ema": self.ema.average if self.ema is not None else None,
            "draws": self.rng.get_state(),
            "dropout_rng": torch.get_rng_state(),
            "dropout_rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def restore(self, saved: TrainingState) -> None:
        """Continue from a step file, bit for bit on the CPU.

        Rate, decay and the like come from the configuration, not from the file (pitfall F4). A step file of
        ComfyUI-SelVA holds no random states and no data order; those start afresh.

        Raises:
            ValueError: the adapter, the optimiser or the data order in the file does not fit.
        """
        load_lora_state_(self.generator, saved.lora)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        # Loading puts the step counts where the stored groups say; the fused update wants them on the device.
        stored_groups = [{**group, "fused": True} for group in saved.optimizer["param_groups"]]
        self.optimizer.load_state_dict({**saved.optimizer, "param_groups": stored_groups})
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.step = saved.step
        if not saved.extra:
            log.warning("%s: holds no random states; the order of the clips and the noise start afresh", saved.path)
            return
        self.scaler.load_state_dict(saved.extra["scaler"])
        self.batches.load_state_dict(saved.extra["batches"])
        best = saved.extra["best"]
        self.best_step, self.best_val_loss, self.worse_in_a_row = best["step"], best["val_loss"], best["worse_in_a_row"]
        if self.ema is not None:  # switched on only now, it starts from the adapter
            self.ema.restore(saved.extra["ema"] or saved.lora)
        self.rng.set_state(saved.extra["draws"])
        torch.set_rng_state(saved.extra["dropout_rng"])
        if self.device.type == "cuda" and len(saved.extra["dropout_rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved.extra["dropout_rng_cuda"])


def fit(
    run: TrainingRun,
    metrics: MetricsFile,
    *,
    on_checkpoint: Callable[[TrainingRun], None],
    on_best: Callable[[TrainingRun], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train until ``config.steps`` or until patience ends, and return True; until ``should_stop()``, and return False.

    Args:
        metrics: gets one row per step, and one per validation.
        on_checkpoint: called every ``save_every`` steps, after the last step, and before an early return.
        on_best: called after a validation with the lowest loss so far.

    Raises:
        ValueError: the gradient was not finite ``MAX_BAD_STEPS`` times in a row (the last checkpoint is intact), or the
            loss of the held-out clips is not finite before the first step.
    """
    config = run.config
    run.generator.train()
    if len(run.val_clips) and run.step == 0:
        metrics.append([run.validate()])  # where the base model stands
        if not math.isfinite(run.best_val_loss):
            raise ValueError("the loss of the held-out clips is not finite before the first step; features of another "
                             "model, or values beyond --precision: look at the data summary, or use --precision fp32")
        log.info("step 0: validation loss %.4f", run.best_val_loss)
    recent: list[tuple[Tensor, Tensor]] = []
    bad_steps, since, started_at = 0, time.monotonic(), time.monotonic()
    first_step = run.step
    with Progress(config.steps, "training", "steps", interval_sec=math.inf) as progress:
        while run.step < config.steps:
            recent.append(run.train_step())
            stopping, last = run.world.any(should_stop(), run.device), run.step == config.steps
            if run.step % config.log_every == 0 or last or stopping:
                rows, seconds = _rows(run, recent, time.monotonic() - since), time.monotonic() - since
                metrics.append(rows)
                bad_steps = _count_bad(rows, bad_steps)
                left = (time.monotonic() - started_at) / (run.step - first_step) * (config.steps - run.step)
                progress.update(run.step, f"loss {rows[-1]['loss']:.4f}")
                log.info("%s", _log_line(run, metrics, rows, seconds, left))
                recent, since = [], time.monotonic()
            if len(run.val_clips) and (run.step % config.val_every == 0 or last):
                row = run.validate()
                metrics.append([row])
                log.info("step %d: validation loss %.4f (best %.4f at step %d)", run.step, row["val_loss"],
                         run.best_val_loss, run.best_step)
                if run.best_step == run.step:
                    on_best(run)
                since = time.monotonic()
                _warn_of_overfitting(run, metrics)
            impatient = config.patience > 0 and run.worse_in_a_row >= config.patience
            if run.step % config.save_every == 0 or last or stopping or impatient:
                on_checkpoint(run)
                since = time.monotonic()
            if impatient:
                log.info("step %d: no better validation loss for %d validations, stopping", run.step, config.patience)
                return True
            if stopping and not last:
                return False
    return True


def _log_line(
    run: TrainingRun, metrics: MetricsFile, rows: Sequence[dict[str, Any]], seconds: float, seconds_left: float
) -> str:
    row, losses = rows[-1], metrics.series("loss")[1]
    average = f", smoothed {smoothed(losses)[-1]:.4f}" if losses else ""
    return (
        f"step {run.step}/{run.config.steps}: loss {row['loss']:.4f}{average}, lr {row['lr']:.2e}, "
        f"grad norm {row['grad_norm']:.3f}, {seconds / len(rows):.2f} s/step, {clock(seconds_left)} left, "
        f"{peak_memory_bytes(run.device) / 2**30:.2f} GiB"
    )


def _warn_of_overfitting(run: TrainingRun, metrics: MetricsFile) -> None:
    """Say so when held-out clips have got worse for a while although the training loss fell."""
    if run.worse_in_a_row < OVERFITTING_AFTER:
        return
    steps, losses = metrics.series("loss")
    curve = dict(zip(steps, smoothed(losses), strict=True))
    then = curve.get(max(run.best_step, steps[0]))
    if then is not None and curve[steps[-1]] < then:
        log.warning(
            "overfitting: since step %d the training loss fell from %.4f to %.4f while the validation loss stays above "
            "%.4f; go back to step %d (adapter_best.pt), or stop with --patience",
            run.best_step, then, curve[steps[-1]], run.best_val_loss, run.best_step,
        )


def _rows(run: TrainingRun, recent: Sequence[tuple[Tensor, Tensor]], seconds: float) -> list[dict[str, Any]]:
    """Return one metrics row per step since the last interval; the only place where losses leave the device."""
    first = run.step - len(recent)
    losses, norms = (torch.stack(values).tolist() for values in zip(*recent, strict=True))
    return [
        {"step": first + i + 1, "loss": loss, "grad_norm": norm, "lr": learning_rate(first + i, run.config),
         "sec_per_step": seconds / len(recent)}
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]


def _count_bad(rows: Sequence[dict[str, Any]], bad_steps: int) -> int:
    for row in rows:
        if math.isfinite(row["grad_norm"]):
            bad_steps = 0
            continue
        bad_steps += 1
        log.warning("step %d: loss %s, gradient not finite; the update was skipped", row["step"], row["loss"])
        if bad_steps >= MAX_BAD_STEPS:
            raise ValueError(
                f"no finite gradient in {bad_steps} steps up to step {row['step']}; the last checkpoint is intact. "
                "Resume from it with a lower --lr, or with --precision bf16 or fp32"
            )
    return bad_steps


def split_validation(clips: TrainingSet, fraction: float, seed: int) -> tuple[TrainingSet, TrainingSet]:
    """Return (training, held-out) clips; a seeded choice of at least one clip, or none if fewer than five are there."""
    count = len(clips)
    if fraction <= 0 or count < 5:
        return clips, clips.subset([])
    held_out = min(count - 1, max(1, round(fraction * count)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return clips.subset(sorted(order[held_out:])), clips.subset(sorted(order[:held_out]))
