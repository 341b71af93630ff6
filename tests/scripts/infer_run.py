"""Calls of infer.py with the built-in model and few steps, and the sounds that they leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from script_args import TINY

import infer

QUICK = [*TINY, "--num_steps", "3"]


def run(*arguments: str) -> int:
    return infer.main([*QUICK, *map(str, arguments)])


def sound(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int32")[0]
