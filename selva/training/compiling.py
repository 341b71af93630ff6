"""Compilation of a generator's blocks with ``torch.compile``, kept on disk for the next run."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path

import torch

from selva.models.generator import Generator
from selva.utils.errors import UserError

log = logging.getLogger(__name__)

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # of PyTorch, whose own default is emptied with the temporary files


def prepare_to_compile(device: torch.device) -> None:
    """Check that this machine can compile, and have PyTorch keep what it compiles; call it before anything else.

    Raises:
        ValueError: what compiling needs for ``device`` is not installed.
    """
    missing = missing_compiler(device)
    if missing:
        raise UserError(f"--compile needs {missing}, which was not found; install it, or leave --compile out")
    if device.type == "cpu":
        log.warning("--compile rarely pays on a CPU: the first steps take minutes, later ones about as long as without")
    os.environ.setdefault(CACHE_VARIABLE, str(default_cache_dir()))  # PyTorch's compiler sets it when it is imported


def compile_blocks_(generator: Generator) -> None:
    """Make every block run compiled from its next call on, in place.

    Block by block, not as a whole: blocks of one kind share their compiled code, which saves most of the time.
    Names and values of parameters stay what they are.
    """
    for block in (*generator.joint_blocks, *generator.fused_blocks):
        block.compile()


def missing_compiler(device: torch.device) -> str | None:
    """Return the name of the part that PyTorch's compiler lacks on this machine, None if nothing is missing."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "the package triton"
    compiler = os.environ.get("CXX")
    found = shutil.which(compiler) if compiler else any(map(shutil.which, ("g++", "clang++", "cl")))
    return None if found else f"a C++ compiler ({compiler or 'g++ or clang++'})"


def default_cache_dir() -> Path:
    """Return the folder for compiled code: in the user's cache folder, see the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selva" / "compiled"
