"""What a base training writes on its way, and what becomes of it when that cannot be written."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import torch
from base_run import make_run, make_sets

from selva.models.variants import get_variant
from selva.training.base import train
from selva.training.base.samples import BaseSamples
from selva.training.objective import ALONE


def test_a_full_disk_does_not_part_the_processes(tmp_path, monkeypatch, caplog):
    """Processes that share a model gather every track together, also when the file of the first has failed."""
    gathered, tried = [], []

    def full(folder, track, step, values):
        tried.append(track)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train, "write_snapshot", full)
    training: Any = train._Training.__new__(train._Training)
    training.run = SimpleNamespace(step=1, average=SimpleNamespace(tracks=[{}, {}], sigma_rels=(0.05, 0.1)),
                                   weights=gathered.append)
    training.world, training.folder, training.snapshot_every = ALONE, tmp_path, 1
    training._snapshot(training.run)
    assert gathered == [0, 1] and tried == [0]
    assert "no snapshot of step 1" in caplog.text


def test_samples_for_which_there_is_no_memory_do_not_end_the_run(tmp_path, monkeypatch, caplog):
    samples = BaseSamples(make_sets()[1], 1, get_variant("tiny_16k"), None, tmp_path)

    def out_of_memory(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(samples, "_with", out_of_memory)
    run = make_run()
    assert samples.write(run) is None
    assert "samples of step 0 are incomplete: CUDA out of memory; they are left out from now on" in caplog.text
    run.stream.close()
