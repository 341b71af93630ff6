"""Files of MMAudio's own trainer, read and written: its training checkpoint, and weights under the published names.

A training checkpoint ``<exp_id>_ckpt_last.pth`` is a dictionary of five entries: ``it``, ``weights``, ``optimizer``
(AdamW, moments by the index of the parameter), ``scheduler`` (SequentialLR), ``ema`` (null, or two tracks). Weights
``<exp_id>_last.pth`` are a plain state dict. Nothing in a file is ever executed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, SequentialLR

from selva.models.generator import COMPUTED_KEYS
from selva.training.ema_snapshots import EXTRA_KEY, PREFIX, mmaudio_track
from selva.training.power_ema import SIGMA_RELS
from selva.utils.errors import UserError
from selva.utils.files import atomic_path
from selva.utils.text import counted, listed
from selva.utils.torch_files import read_torch, write_safetensors, write_torch

log = logging.getLogger(__name__)

KEYS = ("it", "weights", "optimizer", "scheduler", "ema")
CONSTANTS = ("latent_mean", "latent_std", "empty_string_feat")  # parameters that are never trained
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
TRACK = "ema_models.{}."
# The order in which MMAudio's network declares its parts, which gives parameters their numbers.
ORDER = (
    "sync_pos_emb", "latent_mean", "latent_std", "empty_string_feat", "empty_clip_feat", "empty_sync_feat",
    "audio_input_proj", "clip_input_proj", "sync_input_proj", "text_input_proj", "clip_cond_proj", "text_cond_proj",
    "global_cond_mlp", "final_layer", "t_embed", "joint_blocks", "fused_blocks",
)
BLOCK = re.compile(r"joint_blocks\.\d+\.\w+\.|fused_blocks\.\d+\.")


@dataclass(frozen=True)
class MMAudioSchedule:
    """The rate of MMAudio's trainer: a linear warm-up, then steps, or a constant rate without ``marks``.

    Attributes:
        marks: updates after the warm-up at which the rate is multiplied by ``gamma``.
    """

    lr: float = 1e-4
    warmup_steps: int = 1000
    marks: tuple[int, ...] = (240_000, 270_000)
    gamma: float = 0.1


@dataclass(frozen=True)
class MMAudioState:
    """State of a training by MMAudio's trainer, by the names of the parameters, in float32 on the CPU.

    Attributes:
        updates: finished optimiser updates, which is the index of the next step.
        weights: all parameters.
        moments: "exp_avg" and "exp_avg_sq" -> those of the parameters that are trained.
        tracks: the averages of width 0.05 and 0.1, of all parameters; none if the run kept none.
        optimizer_settings: lr, betas, eps, weight_decay ... as stored.
    """

    updates: int
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    tracks: tuple[dict[str, Tensor], ...] = ()
    optimizer_settings: dict[str, Any] = field(default_factory=dict)


def published_order(names: Iterable[str]) -> list[str]:
    """Return the names of a generator's parameters in the order of the published files.

    Parts as in ``ORDER``, blocks and their layers as in our network, but in every block the modulation last.
    """
    rank, blocks = {part: number for number, part in enumerate(ORDER)}, {}

    def place(name: str) -> tuple[int, int, bool]:
        part, in_block = name.split(".")[0], BLOCK.match(name)
        block = blocks.setdefault(in_block[0], len(blocks)) if in_block else 0
        return rank[part], block, in_block is not None and "adaLN_modulation" in name

    return sorted(names, key=place)


def trained_order(names: Iterable[str]) -> list[str]:
    """Return the parameters that MMAudio's optimiser holds, by their numbers there."""
    return [name for name in published_order(names) if name not in CONSTANTS]


# -- reading -----------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> MMAudioState:
    """Return the content of a training checkpoint of MMAudio.

    The number of updates is the scheduler's: ``it`` of a checkpoint that was saved during a run is one too small.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, no such checkpoint, or its parts do not fit together; says where.
    """
    content = read_torch(path, mmap=True)
    if missing := [key for key in KEYS if key not in content]:
        raise UserError(f"{path}: not a training checkpoint of MMAudio, it has no {listed(missing, 5)}; weights alone "
                        "are no state to go on from, but --init starts from them")
    weights = _tensors(content["weights"], path, "weights")
    try:
        updates = content["scheduler"]["last_epoch"]
        (group,) = content["optimizer"]["param_groups"]
        stored, numbers = content["optimizer"]["state"], group["params"]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: optimizer or scheduler are not those of MMAudio's trainer ({error!r})") from error
    if type(updates) is not int or updates < 0:
        raise UserError(f"{path}: scheduler/last_epoch is {updates!r}, expected the number of updates")
    if content["it"] not in (updates, updates - 1):
        log.warning("%s: says step %s, but its scheduler has counted %s; going on from those", path,
                    content["it"], counted(updates, "update"))
    order = [name for name in weights if name not in CONSTANTS]  # as in the file, whatever ours is
    if len(numbers) != len(order):
        raise UserError(f"{path}: the optimiser holds {counted(len(numbers), 'parameter')}, expected {len(order)}, all "
                        f"but {listed(CONSTANTS, 5)}")
    moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
    for number, name in zip(numbers, order, strict=True):
        for moment in MOMENTS if number in stored else ():
            value = stored[number].get(moment)
            if not isinstance(value, Tensor) or value.shape != weights[name].shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else "missing"
                raise UserError(f"{path}: {moment} number {number} is {found}, expected {tuple(weights[name].shape)} "
                                f"of {name}")
            moments[moment][name] = _copied(value)
    settings = {key: value for key, value in group.items() if key != "params"}
    return MMAudioState(updates, weights, moments, _tracks(content["ema"], weights, updates, path), settings)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights in ``_last.pth``, ``_ema_final.pth`` or a training checkpoint, without the computed tables.

    Raises:
        FileNotFoundError, UserError: as :func:`read_checkpoint`.
    """
    content = read_torch(path, mmap=True)
    return _tensors(content.get("weights", content), path, "weights")


def _tensors(found: Any, path: Path, what: str) -> dict[str, Tensor]:
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()) or not found:
        raise UserError(f"{path}: {what} are not named tensors")
    return {name: _copied(x) for name, x in found.items() if name not in COMPUTED_KEYS}


def _copied(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _tracks(
    ema: Any, weights: Mapping[str, Tensor], updates: int, path: Path
) -> tuple[dict[str, Tensor], ...]:
    if ema is None:
        return ()
    tracks = []
    for number in range(len(SIGMA_RELS)):
        start = TRACK.format(number)
        try:
            count = ema[start + EXTRA_KEY]["step"]
            track = {name: _copied(ema[start + PREFIX + name]) for name in weights}
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: ema lacks {error} of track {number}") from error
        if count != updates:
            raise UserError(f"{path}: track {number} of ema has seen {counted(count, 'update')}, expected {updates}, "
                            "as the scheduler has counted; the file was not written in one piece")
        if wrong := [name for name, x in track.items() if x.shape != weights[name].shape]:
            raise UserError(f"{path}: track {number} of ema has other shapes than the weights: {listed(wrong, 5)}")
        tracks.append(track)
    return tuple(tracks)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, state: MMAudioState, schedule: MMAudioSchedule) -> None:
    """Write a training checkpoint that MMAudio's trainer goes on from (``checkpoint=<path>``), whole or not at all."""
    order = trained_order(state.weights)
    step = torch.tensor(float(state.updates))
    stored = {
        number: {"step": step.clone(), **{moment: _plain(state.moments[moment][name]) for moment in MOMENTS}}
        for number, name in enumerate(order) if all(name in state.moments[moment] for moment in MOMENTS)
    }
    scheduler, rate = _scheduler_state(state.updates, schedule)
    group = torch.optim.AdamW([nn.Parameter(torch.zeros(()))], fused=True).state_dict()["param_groups"][0]
    group |= {key: value for key, value in state.optimizer_settings.items() if key in group}
    group |= {"lr": rate, "initial_lr": schedule.lr, "betas": tuple(group["betas"]), "params": list(range(len(order)))}
    ema = {}
    for number, track in enumerate(state.tracks):
        one = mmaudio_track(_in_order(track), state.updates)
        ema |= {TRACK.format(number) + name: value for name, value in one.items()}
    content = {
        "it": state.updates, "weights": _in_order(state.weights),
        "optimizer": {"state": stored, "param_groups": [group]}, "scheduler": scheduler, "ema": ema or None,
    }
    with atomic_path(path) as temporary:
        write_torch(content, temporary)


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a generator's weights under the published names: ``.pth`` (for MMAudio and SelVA) or ``.safetensors``.

    Raises:
        UserError: another suffix.
    """
    tensors = _in_order(weights)
    if path.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{path}: a generator is written as .pth or .safetensors, not "
                        f"{path.suffix or 'without suffix'}")
    with atomic_path(path) as temporary:
        if path.suffix == ".pth":
            write_torch(tensors, temporary)
        else:
            write_safetensors(tensors, temporary, {"format": "pt"})


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _in_order(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _plain(weights[name]) for name in published_order(weights)}


def _scheduler_state(updates: int, schedule: MMAudioSchedule) -> tuple[dict[str, Any], float]:
    """Return the state of MMAudio's scheduler objects after so many updates, and the rate of the next step."""
    optimizer, warmup = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=schedule.lr), schedule.warmup_steps
    after: LRScheduler = LambdaLR(optimizer, lambda _: 1)
    if schedule.marks:
        after = MultiStepLR(optimizer, list(schedule.marks), schedule.gamma)
    both = SequentialLR(optimizer, [LambdaLR(optimizer, lambda k: (k + 1) / (warmup + 1)), after], [warmup])
    walked = min(updates, warmup + 2)  # by then the second scheduler counts, one for each update
    for _ in range(walked):
        optimizer.step()
        both.step()
    state, after_warmup = both.state_dict(), updates - warmup
    if updates > walked:
        rate = schedule.lr * schedule.gamma ** sum(after_warmup >= mark for mark in schedule.marks)
        state |= {"last_epoch": updates, "_last_lr": [rate]}
        state["_schedulers"][1] |= {"last_epoch": after_warmup, "_step_count": after_warmup + 1, "_last_lr": [rate]}
    return state, state["_last_lr"][0]
