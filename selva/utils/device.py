"""Devices, number formats and the memory that a run has used."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from selva.utils import torchrun
from selva.utils.errors import UsageError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("bf16", "fp16", "fp32")


def peak_memory_bytes(device: Any) -> int:
    """Return the highest memory use so far: the allocator's on CUDA, else the resident set of this process."""
    if getattr(device, "type", device) == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that a device, or the machine, has no memory left."""
    torch = sys.modules.get("torch")  # an error of PyTorch can only come from a PyTorch that was imported
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # MPS and the CPU allocator raise a plain RuntimeError.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def dtype_of(precision: str) -> torch.dtype:
    """Return the PyTorch type of one of ``PRECISIONS``.

    Raises:
        ValueError: another name.
    """
    import torch

    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" prefers CUDA, then MPS, then the CPU.

    Under torchrun "cuda" is the device of this process.

    Raises:
        UsageError: the name is unknown, or this machine has no such device.
    """
    import torch

    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torchrun.local_rank())
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: unknown, expected auto, cpu, cuda, cuda:N or mps") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise UsageError(f"--device {name}: there is no such device here; try --device auto")
    return device
