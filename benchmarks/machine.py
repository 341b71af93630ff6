"""The version of the code and the machine that a figure was measured with."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from selva.utils.version import __version__

ROOT = Path(__file__).resolve().parents[1]


def circumstances(device: str) -> dict[str, Any]:
    """Return the version of the code, and the machine."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
                                check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"version": __version__, "commit": commit, "torch": torch.__version__, "device": device,
            "processor": processor_name(torch.device(device)), "threads": torch.get_num_threads()}


def processor_name(device: torch.device) -> str:
    """Return the name of the card, or that of the processor with the instructions that PyTorch computes with on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, where platform.processor() is empty
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} computing with {kind_of(device)}"


def kind_of(device: torch.device) -> str:
    """Return the instructions that PyTorch computes with on a CPU, such as "AVX512" or "AVX2"; elsewhere the device."""
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
