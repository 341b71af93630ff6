"""The machine that a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


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
