"""The whole way of a base model in a minute: clips, data sets, training by two processes, export, a sound from it."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from selva.inference.config import InferenceConfig
from selva.inference.run import generate
from selva.utils.errors import UserError
from selva.utils.torchrun import process_environment
from selva.weights.config import GeneratorModelConfig, ModelConfig
from toyworld.sets import make_sets

log = logging.getLogger(f"selva.{__name__}")  # below the logger that scripts set up

VARIANT = "tiny_16k"
VIDEOS, SOUNDS, PROCESSES = 6, 3, 2
TRAINING = ("--steps", "6", "--batch_size", "4", "--warmup_steps", "2", "--lr_schedule", "constant", "--log_every", "2",
            "--save_every", "3", "--val_every", "3", "--sample_every", "6", "--samples", "1", "--ema_every", "3")


def run_example(folder: Path, script: Path, announce: Callable[[Path], None] = lambda path: None) -> None:
    """Do everything in ``folder``, which gets the clips, the data sets, the run and a sound.

    Args:
        script: the training script, started once for each process.
        announce: called with the path of everything that is made.

    Raises:
        UserError: a part of it failed; the log says what.
    """
    device = ModelConfig(variant=VARIANT, device="cpu")
    sets = make_sets(folder, device, VIDEOS, SOUNDS)
    for path in sets:
        announce(path)
    run = folder / "run"
    train([f"{sets[0]}:2", str(sets[1])], run, script)
    for path in sorted((run / "export").iterdir()):
        announce(path)
    trained = run / "export" / f"{VARIANT}_ema.safetensors"
    generator = GeneratorModelConfig(variant=VARIANT, device="cpu", generator=trained)
    settings = InferenceConfig(inputs=[folder / "clips" / "clip_00000.mp4"], output=folder / "sound", normalize="peak",
                               prompts=folder / "prompts.txt", model=generator)
    if generate(settings, announce):
        raise UserError(f"{folder}: no sound could be made with the trained generator")


def train(data: list[str], run: Path, script: Path) -> None:
    """Train from scratch with several processes, as ``torchrun`` would start them."""
    command = [sys.executable, str(script), "--variant", VARIANT, "--device", "cpu", "--data", *data, "--output_dir",
               str(run), "--hold_out", "1", *TRAINING]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # One thread each: more than there are cores wait for one another.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL,
                         env={**environment, **process_environment(rank, PROCESSES, port)})
        for rank in range(PROCESSES)
    ]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise UserError(f"{run}: the training ended with the exit codes {codes}, see above")
