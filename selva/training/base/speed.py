"""Speed of a base training: rows and waiting, and the share of the machine's own rate of matrix products."""

from __future__ import annotations

import time
from typing import Any

import torch

from selva.models.generator import Generator
from selva.training.base.run import BaseRun
from selva.utils.device import peak_memory_bytes
from selva.utils.distributed import World

_SIZE = {"cuda": 4096, "cpu": 512}  # of the matrices that are multiplied
_PROBE_SEC = 0.3


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a product of large matrices, measured for a moment."""
    size = _SIZE.get(device.type, 1024)
    matrix = torch.randn(size, size, device=device).to(dtype)
    best, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < _PROBE_SEC:
        _wait(device)
        begin = time.perf_counter()
        for _ in range(4):
            torch.mm(matrix, matrix)
        _wait(device)
        best = max(best, 8 * size**3 / (time.perf_counter() - begin))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def step_operations(generator: Generator, rows: int) -> float:
    """Return the floating-point operations of one update: forward and backward pass of all matrix products.

    Two per weight and token forward, four backward; attention adds its products of tokens with tokens. What is computed
    again for ``--grad_checkpointing`` does not count, being no progress.
    """
    config = generator.config
    n, t, s, x = generator.latent_seq_len, generator.clip_seq_len, generator.sync_seq_len, config.text_seq_len
    tokens = {"latent_block": n, "clip_block": t, "text_block": x, "clip_input_proj": t, "sync_input_proj": s,
              "text_input_proj": x, "audio_input_proj": n, "fused_blocks": n}
    total = 0.0
    for name, parameter in generator.named_parameters():
        if parameter.ndim < 2 or ("proj" not in name and "block" not in name and "final_layer" not in name):
            continue
        parts = name.split(".")
        count = next((tokens[part] for part in reversed(parts[:3]) if part in tokens), 1)
        if name.startswith("final_layer.conv"):
            count = n
        if "adaLN" in name and not ("latent_block" in name or "fused_blocks" in name):
            count = 1
        total += 6.0 * parameter.numel() * count
    attention = sum((n + t + x) ** 2 for _ in generator.joint_blocks) + n**2 * len(generator.fused_blocks)
    return rows * (total + 12.0 * attention * config.hidden_dim)


class SpeedMeter:
    """Numbers about the speed since they were asked for last.

    Args:
        world: whose processes compute a part of every batch each.
    """

    def __init__(self, run: BaseRun, world: World) -> None:
        self.world = world
        self._operations = step_operations(run.generator, run.config.batch_size) / world.size
        self._rate = matmul_rate(run.device, run.precision)
        self._waited = 0.0

    def numbers(self, run: BaseRun, steps: int, seconds: float) -> dict[str, Any]:
        """Return rows per second, the share of time waiting for data, the share of the matmul rate, memory, rows seen.

        Those of this process, but for the rows.
        """
        waited, self._waited = run.stream.waited_sec - self._waited, run.stream.waited_sec
        seen = {f"seen_{number}": count for number, count in enumerate(run.seen)}
        return {
            "rows_per_sec": steps * run.config.batch_size / seconds, "wait_share": waited / seconds,
            "matmul_share": steps * self._operations / seconds / self._rate,
            "memory_gib": peak_memory_bytes(run.device) / 2**30, "epoch": run.place / run.clips.mixture.size, **seen,
        }
