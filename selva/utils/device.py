"""Devices, number formats and the memory that a run has used."""

from __future__ import annotations

import sys
from typing import Any


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
