"""Speed of a base training: its own count of operations against PyTorch's, rates and shares."""

from __future__ import annotations

import logging

import pytest
import torch
from base_run import make_run
from device_behind import DeviceBehind
from torch.utils.flop_counter import FlopCounterMode

from selva.models.config import GeneratorConfig
from selva.models.generator import Generator
from selva.training.base import train
from selva.training.base.speed import SpeedMeter, matmul_rate, step_operations
from selva.training.objective import ALONE

CPU = torch.device("cpu")


@pytest.mark.parametrize("v2", [False, True])
def test_operations_are_those_that_pytorch_counts(v2):
    config = GeneratorConfig(latent_dim=20, hidden_dim=128, depth=4, fused_depth=2, num_heads=2, v2=v2)
    generator = Generator(config)
    generator.set_sequence(60, 16, 48)
    features = [torch.zeros(2, n, c) for n, c in ((16, 1024), (48, 768), (77, 1024))]
    with FlopCounterMode(display=False) as counter:
        generator(torch.zeros(2, 60, 20), *features, torch.zeros(2)).sum().backward()
    # That of the first layers knows no gradient of its inputs, which need none.
    assert step_operations(generator, 2) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_numbers_of_an_interval():
    run = make_run()
    meter = SpeedMeter(run, ALONE)
    for _ in range(2):
        run.train_step()
    row = meter.numbers(run, 2, 4.0)
    assert row["rows_per_sec"] == 3.0 and (row["seen_0"], row["seen_1"]) == tuple(run.seen) and sum(run.seen) == 12
    assert row["wait_share"] == run.stream.waited_sec / 4 and row["epoch"] == 12 / 13
    assert row["matmul_share"] > 0
    assert meter.numbers(run, 1, 1.0)["wait_share"] == 0  # of the time since


def test_the_rate_of_products_is_a_rate():
    assert 1e7 < matmul_rate(CPU, torch.float32) < 1e15


def test_the_rate_waits_for_a_device_of_apple(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.zeros(8, 8))
    assert matmul_rate(torch.device("mps"), torch.float32) > 0 and len(waits) >= 2


def test_a_dry_run_counts_the_wait_for_the_device(monkeypatch, caplog):
    run = make_run()
    monkeypatch.setattr(train, "time", DeviceBehind(monkeypatch, run))
    with caplog.at_level(logging.INFO, "selva"):
        train._estimate(run)
    assert "dry run: 1.00 s/step" in caplog.text
