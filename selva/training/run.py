"""State of a training, and the step that changes it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from selva.checkpoint import Adapter, TrainingState
from selva.data.content import content_changes, content_state, joined
from selva.data.dataset import Batch, ClipDataset
from selva.data.order import BucketBatchSampler, ClipWindow
from selva.lora.layers import lora_layers
from selva.lora.published import continued_state
from selva.lora.state import (
    decay_to_start_,
    load_lora_state_,
    lora_parameters,
    lora_plus_groups,
    lora_state_dict,
    named_factors,
    start_from_adapter_,
)
from selva.models.generator import Generator
from selva.training.condition_cache import CachedBatch, ConditionCache, can_cache
from selva.training.config import TrainConfig
from selva.training.ema import EMA
from selva.training.ema_snapshots import KEPT
from selva.training.feed import ReadNow, make_feed
from selva.training.memorisation import Watch
from selva.training.objective import ALONE, NoiseSample, flow_loss, sample_noise, validate
from selva.training.power_ema import PowerEMA
from selva.training.schedule import learning_rate
from selva.training.ways import WAYS, dropout_seed, ways_of
from selva.utils.device import FUSED_DEVICES
from selva.utils.distributed import World
from selva.utils.errors import UserError
from selva.utils.graph import GraphedCalls
from selva.utils.metrics_log import SET_LOSS

log = logging.getLogger(__name__)

def finite_step_(optimizer: torch.optim.Optimizer, norm: Tensor, fused: bool) -> None:
    """Do an update, or leave it out where the gradient, whose scalar norm is given, is not finite.

    Args:
        fused: the optimiser is, and leaves it out by a flag on the device, without the host's knowing.
    """
    if fused:
        setattr(optimizer, "found_inf", (~torch.isfinite(norm)).float())  # noqa: B010 -- read by the fused step
        optimizer.step()
    elif bool(torch.isfinite(norm)):
        optimizer.step()


def has_dropout(generator: Generator) -> bool:
    """Return True if the adapters of a generator drop a part of their inputs."""
    return any(layer.lora_dropout > 0 for _, layer in lora_layers(generator))


def graph_problem(generator: Generator, world: World = ALONE) -> str | None:
    """Return the reason why the steps of a training cannot be recorded, see :mod:`selva.utils.graph`; None if they can.

    Args:
        generator: with its adapters, and with its choice of gradient checkpointing.
    """
    if world.size > 1:
        return "several processes train together"
    if generator.gradient_checkpointing and has_dropout(generator):
        return "a recomputed block would have to repeat its dropout, whose random state a graph cannot read"
    return None


def _sets_of(clips: ClipDataset) -> list[str]:
    """Return the name of the data set of every clip."""
    return [clips.source(index) for index in range(len(clips))]


class TrainingRun:
    """State of a training that must survive a restart: adapter, optimiser, scaler, data order, random states.

    Args:
        generator: frozen base with adapters injected, on its device.
        clips: training clips. val_clips: held-out clips, possibly none.
        precision: autocast dtype of the network.
        world: the processes that share the training; each computes ``config.batch_size`` clips of every batch.
        graphs: record the steps, if :func:`graph_problem` finds nothing against it; None: every kernel is started anew.
    """

    rows_per_step = True
    advice = "it is in adapter_best.pt; or stop with --patience"

    def __init__(
        self,
        generator: Generator,
        clips: ClipDataset,
        val_clips: ClipDataset,
        config: TrainConfig,
        precision: torch.dtype,
        world: World = ALONE,
        graphs: GraphedCalls | None = None,
    ) -> None:
        self.generator, self.val_clips, self.config, self.precision = generator, val_clips, config, precision
        self.world, self.device = world, generator.latent_mean.device
        self.batches = BucketBatchSampler(clips, config.batch_size * world.size, config.seed)
        cached = can_cache(generator, self.batches.clips, precision)
        self.condition_cache = ConditionCache(generator, self.batches.clips, precision) if cached else None
        own = world.own_slice(config.batch_size)
        self.feed = ReadNow(self.batches, self.device) if cached else make_feed(
            self.batches, generator.config, self.device, own)
        self.rng = torch.Generator().manual_seed(config.seed)
        self.parameters = lora_parameters(generator)
        groups = lora_plus_groups(generator, config.lr, config.lora_plus_ratio)
        self.lr_factors = [group["lr"] / config.lr for group in groups]
        # Fused: one kernel for all factors, which skips an update by a flag on the device, without the host's knowing.
        self.fused = self.device.type in FUSED_DEVICES
        on_cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups, betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay, fused=self.fused,
            capturable=on_cuda)
        # Where a step may be recorded, a rate that changes has to be a tensor; on CUDA in every case, so that both ways
        # compute the same. There the kernel wants float32, on a CPU it takes the number itself.
        self.rates: list[Tensor] = []
        if on_cuda or graphs is not None:
            dtype = torch.float32 if on_cuda else torch.float64
            self.rates = [torch.zeros((), dtype=dtype, device=self.device) for _ in groups]
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate
        self.graphs, self.dropout = graphs, has_dropout(generator)
        if graphs is not None:
            graphs.draws = self.dropout
            graphs.repeatable = config.grad_accum == 1  # what a half of a batch adds to others' gradients would stay
        generator.recompute_randomly = self.dropout
        # Half-precision gradients below 6e-8 would vanish; bfloat16 has the range of float32 and needs no scaling.
        self.scaler = GradScaler(self.device.type, enabled=precision == torch.float16)
        self.ema: EMA | PowerEMA | None = None
        if config.ema == "power":
            self.ema = PowerEMA(named_factors(generator), config.ema_sigma_rel)
        elif config.ema_decay:
            self.ema = EMA(named_factors(generator), config.ema_decay)
        self.ways = dict(WAYS)
        self.content = {"clips": content_state(self.batches.clips), "held_out": content_state(val_clips)}
        self.held_out_sets = _sets_of(val_clips)
        self.watch: Watch | None = None  # of what is learned by heart; a process that writes no metrics has none
        self.step = 0  # optimiser updates done
        self.best_step, self.best_val_loss, self.worse_in_a_row = 0, math.inf, 0

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Do one optimiser update and return the loss and the unclipped gradient norm, both scalars on the device.

        An update whose gradient is not finite is skipped.
        """
        config = self.config
        if self.dropout and self.ways["dropout"] == WAYS["dropout"]:
            torch.manual_seed(dropout_seed(config.seed, self.world.rank, self.step))
        self._set_rate(learning_rate(self.step, config))
        if config.grad_accum == 1:
            total, norm = self._run(self._whole, *self._draw())
        else:
            total = torch.zeros((), device=self.device)
            for _ in range(config.grad_accum):
                total += self._run(self._accumulate, *self._draw())[0]
            (norm,) = self._run(self._finish)
        total = self.world.sum_(total) / self.world.size
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        return total, norm

    def _run(self, function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
        """Return ``function(*arguments)``, by a graph where there are any."""
        if self.graphs is None:
            return function(*arguments)
        kinds = (len(one) if isinstance(one, Tensor) else one.lengths
                 for one in arguments if not isinstance(one, NoiseSample))
        return self.graphs((function.__name__, *kinds), function, *arguments, keep=self.generator.tables,
                           recover=self._forget_step)

    def _draw(self) -> tuple[Batch | CachedBatch, NoiseSample]:
        """Return clips of this process for a part of a step, and random numbers."""
        config, own = self.config, self.world.own_slice(self.config.batch_size)
        windows = self.batches.draw()
        batch = self._load(windows[own])
        self.generator.set_sequence(*batch.lengths)  # its tables are made for them before a graph is recorded
        shape = torch.Size((len(windows), *batch.mean.shape[1:]))  # of the global batch
        noise = sample_noise(shape, config, self.rng, self.step / config.steps).part(own)
        return batch, noise.to(self.device)

    # What a graph holds: functions of tensors and of what is at the same place at every step, see selva.utils.graph.

    def _whole(self, batch: Batch | CachedBatch, noise: NoiseSample) -> tuple[Tensor, ...]:
        """Return the loss and the gradient norm of an update by one batch."""
        return *self._accumulate(batch, noise), *self._finish()

    def _accumulate(self, batch: Batch | CachedBatch, noise: NoiseSample) -> tuple[Tensor, ...]:
        """Add a batch's part of the gradient to what is there, and return its part of the loss."""
        config = self.config
        loss = flow_loss(self.generator, batch, noise, config, self.precision).mean() / config.grad_accum
        self.scaler.scale(loss).backward()
        return (loss.detach(),)

    def _finish(self) -> tuple[Tensor, ...]:
        """Do the update by the gradient, and return its norm."""
        self.world.average_gradients_(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self._update(norm)
        # Several batches add up to a gradient that stays at its place, where their graphs find it.
        self.optimizer.zero_grad(set_to_none=self.graphs is None or self.config.grad_accum == 1)
        return (norm,)

    def _set_rate(self, lr: float) -> None:
        for i, factor in enumerate(self.lr_factors):
            if self.rates:
                self.rates[i].fill_(lr * factor)
            else:
                self.optimizer.param_groups[i]["lr"] = lr * factor

    def _update(self, norm: Tensor) -> None:
        """Do the update, or leave it out where the gradient, whose scalar norm is given, is not finite."""
        decay = self.config.weight_decay * torch.isfinite(norm).float()  # with PiSSA; the optimiser does that of others
        rates = [rate.float() for rate in self.rates] or [group["lr"] for group in self.optimizer.param_groups]
        of_a, of_b = (rate * decay for rate in rates[:2])
        decay_to_start_(self.generator, of_a, of_b)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # skips by itself, and lowers the scale
            self.scaler.update()
        else:
            finite_step_(self.optimizer, norm, self.fused)

    def _forget_step(self) -> None:
        """Take back what a step that did not come to its end has left: gradients, and the state of the scaler.

        Gradients that add up over several batches are kept: a recording added nothing to them, and others have been.
        """
        if self.config.grad_accum == 1:
            self.optimizer.zero_grad(set_to_none=True)
        state, self.scaler = self.scaler.state_dict(), GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        self.scaler.load_state_dict(state)

    def _load(self, windows: Sequence[ClipWindow]) -> Batch | CachedBatch:
        if self.condition_cache is not None:
            return self.condition_cache.load(windows)
        return self.feed.load(windows)

    def evaluated(self) -> AbstractContextManager[None]:
        """Return a context in which the model holds the weights to validate and save: the average if there is one."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def validate(self) -> dict[str, Any]:
        """Return the row for ``metrics.jsonl`` of a validation now, and keep track of the best step."""
        self.feed.wait()
        each: list[Tensor] = []
        with self.evaluated():
            bins = validate(self.generator, self.val_clips, self.config, self.precision, self.world, None, each)
            watched = self.watch.row(self.step, torch.stack(each)) if self.watch is not None and each else {}
        loss = sum(bins) / len(bins)
        self.worse_in_a_row += 1
        if loss < self.best_val_loss:
            self.best_step, self.best_val_loss, self.worse_in_a_row = self.step, loss, 0
        return {"step": self.step, "val_loss": loss, "val_loss_bins": bins, **self._loss_per_set(each), **watched}

    def _loss_per_set(self, each: Sequence[Tensor]) -> dict[str, float]:
        """Return the mean loss of the held-out clips of every set, by the names of metrics; nothing for one set.

        Args:
            each: (bins,) losses of this process's held-out clips.
        """
        names = list(dict.fromkeys(self.held_out_sets))
        if len(names) < 2:
            return {}
        sums = torch.zeros(len(names), device=self.device)
        for number, losses in enumerate(each):
            sums[names.index(self.held_out_sets[number * self.world.size + self.world.rank])] += losses.mean()
        sums = self.world.sum_(sums).tolist()
        return {f"{SET_LOSS}{name}": total / self.held_out_sets.count(name)
                for name, total in zip(names, sums, strict=True)}

    def checkpoint_bytes(self) -> int:
        """Return the approximate size of a step file: factors, exported, of the best step, two moments, average."""
        tracks = len(self.ema.tracks) if isinstance(self.ema, PowerEMA) else int(self.ema is not None)
        return sum(p.numel() for p in self.parameters) * 4 * (5 + tracks)

    def averages_bytes(self) -> int:
        """Return the approximate size of all snapshots of averages."""
        tracks = len(self.ema.tracks) if isinstance(self.ema, PowerEMA) else 0
        return sum(p.numel() for p in self.parameters) * 4 * tracks * KEPT

    def optimizer_state(self) -> dict[str, Any]:
        """Return the state of the optimiser for a step file, whatever device it comes from; rates as plain numbers."""
        state = self.optimizer.state_dict()
        groups = [{**group, "lr": float(group["lr"]), "capturable": False} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def extra_state(self) -> dict[str, Any]:
        """Return the state beside adapter and optimiser that :meth:`restore` needs to be exact."""
        return {
            "ways": self.ways,
            "content": self.content,
            "scaler": self.scaler.state_dict(),
            "batches": self.batches.state_dict(),
            "best": {"step": self.best_step, "val_loss": self.best_val_loss, "worse_in_a_row": self.worse_in_a_row},
            "ema": self.ema.state() if self.ema is not None else None,
            "draws": self.rng.get_state(),
            "dropout_rng": torch.get_rng_state(),
            "dropout_rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def start_from(self, adapter: Adapter) -> None:
        """Begin at a finished adapter instead of a fresh one; optimiser, data order and steps are those of a new run.

        Raises:
            ValueError: the adapter does not fit the layers and ranks of this run.
        """
        untouched = start_from_adapter_(self.generator, adapter)
        if self.ema is not None:
            self.ema.start_at(lora_state_dict(self.generator))
        log.info("starting at the adapter %s%s", adapter.source,
                 f", which does not change {len(untouched)} of the layers" if untouched else "")

    def restore(self, saved: TrainingState) -> None:
        """Continue from a step file, bit for bit on the CPU.

        Rate, decay and the like come from the configuration, not from the file (pitfall F4). A step file of
        ComfyUI-SelVA holds no random states and no data order; those start afresh.

        Raises:
            ValueError: the adapter, the optimiser or the data order in the file does not fit, or the clips have changed
                since; names them.
        """
        self._check_content(saved)
        if self.graphs is not None:
            self.graphs.clear()  # the optimiser gets a new state
        lora = continued_state(self.generator, saved.lora, str(saved.path))
        load_lora_state_(self.generator, lora)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        # Loading puts the step counts where the stored groups say; the fused update wants them on the device.
        stored_groups = [{**group, "fused": self.fused} for group in saved.optimizer["param_groups"]]
        self.optimizer.load_state_dict({**saved.optimizer, "param_groups": stored_groups})
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.step = saved.step
        if not saved.extra:
            log.warning("%s: holds no random states; the order of the clips and the noise start afresh", saved.path)
            if self.ema is not None:
                self.ema.start_at(lora)
            self._report_recipe_there(saved)
            return
        self.ways = ways_of(saved)
        if self.world.size > 1:  # a random state can be that of one process only
            self.ways["dropout"] = WAYS["dropout"]
        # Only fp16 scales its loss; a run that went on in bf16 or fp32 until now starts with the first scale.
        if self.scaler.is_enabled() and saved.extra["scaler"]:
            self.scaler.load_state_dict(saved.extra["scaler"])
        self.batches.load_state_dict(saved.extra["batches"])
        best = saved.extra["best"]
        self.best_step, self.best_val_loss, self.worse_in_a_row = best["step"], best["val_loss"], best["worse_in_a_row"]
        self._restore_average(saved, lora)
        self.rng.set_state(saved.extra["draws"])
        torch.set_rng_state(saved.extra["dropout_rng"])
        if self.device.type == "cuda" and len(saved.extra["dropout_rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved.extra["dropout_rng_cuda"])

    def _restore_average(self, saved: TrainingState, lora: Mapping[str, Tensor]) -> None:
        """Continue the average of a step file; one that is switched on only now starts from the adapter, ``lora``."""
        stored = saved.extra["ema"]
        is_power = stored is not None and stored.get("kind") == "power"
        if self.ema is None or stored is None or is_power != isinstance(self.ema, PowerEMA):
            if stored is not None:
                log.warning("%s: holds %s average, which the settings no longer ask for (--ema, --ema_decay); it ends "
                            "here",
                            saved.path, "a power" if is_power else "an exponential")
            if self.ema is not None:
                log.warning("%s: the average starts here, at step %d, from the adapter", saved.path, saved.step)
                self.ema.start_at(lora)
            return
        try:
            self.ema.restore(stored)
        except UserError as error:
            raise UserError(f"{saved.path}: {error}") from error

    def _report_recipe_there(self, saved: TrainingState) -> None:
        """Name what a step file of another trainer was trained with otherwise; the settings of this run are used."""
        group, meta, config = saved.optimizer["param_groups"][0], saved.meta, self.config
        pairs = {
            "--lr": (group.get("initial_lr", group.get("lr")), config.lr),
            "betas": (tuple(group.get("betas", config.betas)), config.betas),
            "--weight_decay": (group.get("weight_decay"), config.weight_decay),
            "--null_prob": (0.0, config.null_prob),  # it drops no conditions
            **{f"--{name}": (meta.get(name), getattr(config, name))
               for name in ("steps", "lora_plus_ratio", "timestep_mode", "logit_normal_sigma", "lr_schedule")},
            **{name: (meta.get(name) or None, "not done here")
               for name in ("latent_mixup_alpha", "latent_noise_sigma")},
        }
        different = [f"{name} {was}, now {now}" for name, (was, now) in pairs.items() if was is not None and was != now]
        if different:
            log.warning("%s: trained with other settings so far: %s", saved.path, "; ".join(different))

    def _check_content(self, saved: TrainingState) -> None:
        """Raise a ValueError that names every clip that is not what it was; a file of version 0.1.0 does not tell."""
        if "content" not in saved.extra:
            return
        before, now = (content["clips"] for content in (saved.extra["content"], self.content))
        held_out_before, held_out = (content["held_out"] for content in (saved.extra["content"], self.content))
        if held_out_before["ids"]:  # without any, there was nothing that other held-out clips could be confused with
            # A clip that has changed may have changed sides too, and others with it: it is the one to name.
            problems = content_changes(joined(before, held_out_before), joined(now, held_out), order=False)
            problems = problems or [f"held out (--val_dir, --val_fraction, --val_clips), {text}"
                                    for text in content_changes(held_out_before, held_out)]
        else:
            problems = content_changes(before, now)
        if problems:
            raise UserError(f"{saved.path}: the clips are not those of this run any more: {'; '.join(problems)}. Put "
                             f"them back, or start a new run from its adapter: --init_from {saved.path}")
