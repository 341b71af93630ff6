"""The loader of ComfyUI-SelVA and its resume, from the published facts about them: leniency included."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn


class WrappedLinear(nn.Module):
    """A linear layer with its adapter, as the loader puts it in place."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.lora_A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scale


def wrap_as_comfyui_(model: nn.Module, path: Path, knows_rslora: bool = True) -> list[str]:
    """Apply an adapter file to ``model``; return the keys that the loader would leave out without a word.

    One rank and one scale from the meta for all linear layers whose names end with a target, then a loose load.

    Args:
        knows_rslora: the versions since rsLoRA came divide by the root of the rank where the meta says so.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    tensors, meta = (content["state_dict"], content.get("meta", {})) if "state_dict" in content else (content, {})
    rank = meta.get("rank", 16)
    alpha, targets = meta.get("alpha", rank), meta.get("target", ["attn.qkv"])
    scale = alpha / math.sqrt(rank) if knows_rslora and meta.get("use_rslora", False) else alpha / rank
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(tuple(targets))]
    if not names:
        raise ValueError(f"No layers matched target={targets}")
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        owner._modules[child] = WrappedLinear(owner.get_submodule(child), rank, scale)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not [key for key in missing if "lora_" in key]  # it only warns
    return unexpected


def load_as_comfyui(base: nn.Module, path: Path, strength: float = 1.0, knows_rslora: bool = True) -> nn.Module:
    """Return a copy of a model with an adapter file at a strength."""
    model = copy.deepcopy(base)
    wrap_as_comfyui_(model, path, knows_rslora)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, WrappedLinear):
                module.lora_B *= strength
    return model


def resume_as_comfyui(base: nn.Module, path: Path, lora_plus: bool = False) -> int:
    """Return the step after which its trainer would continue a step file, whose settings it takes as its own.

    In the order of the published keys: tensors (loosely), optimiser, schedule, step.

    Args:
        lora_plus: A and B are groups of their own.
    """
    model = copy.deepcopy(base)
    wrap_as_comfyui_(model, path)
    layers = [module for module in model.modules() if isinstance(module, WrappedLinear)]
    a, b = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
    optimizer = torch.optim.AdamW([{"params": a}, {"params": b}] if lora_plus else [*a, *b])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    content = torch.load(path, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["scheduler"])
    return content["step"]
