"""A small base training for tests: a small generator, made-up rows of two sets, a run of a few steps."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from small_run import make_base, make_clips

from selva.data.dataset import ListDataset
from selva.data.mixture import MixedClips
from selva.data.source import DataSource
from selva.training.base.config import BaseTrainConfig
from selva.training.base.run import BaseRun
from selva.training.objective import ALONE
from selva.utils.distributed import World

HERE = str(Path(__file__).parent)
CONFIG = BaseTrainConfig(
    data=[HERE], steps=6, batch_size=6, warmup_steps=2, lr=1e-3, save_every=3, val_every=3, log_every=2,
    precision="fp32", sample_every=0, hold_out=0,
    adam_eps=1e-6,  # 1e-8 would make whole updates of the rounding errors of tiny gradients
)


def make_sets() -> tuple[MixedClips, ListDataset]:
    """Return two sets, the second of sound only, and two held-out clips."""
    clips = make_clips(10)
    nothing = torch.tensor(math.nan)
    sound = [
        dataclasses.replace(one, has_video=False, clip_f=nothing.expand_as(one.clip_f),
                            sync_f=nothing.expand_as(one.sync_f))
        for one in clips[5:8]
    ]
    sources = [DataSource(Path("video"), 2), DataSource(Path("sound"))]
    return MixedClips([ListDataset(clips[:5]), ListDataset(sound)], sources, CONFIG.seed), ListDataset(clips[8:])


def make_run(config: BaseTrainConfig = CONFIG, world: World = ALONE, dtype: torch.dtype = torch.float32) -> BaseRun:
    """Return a fresh run of the small generator on the made-up sets."""
    clips, val_clips = make_sets()
    return BaseRun(make_base(), clips, val_clips, config, dtype, world)
