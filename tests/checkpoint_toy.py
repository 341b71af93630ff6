"""A small model with a layer of every kind, and adapters of every kind for it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.lora.state import lora_parameters

DIM = 10
META = {"variant": "tiny_16k", "steps": 2000, "timestep_mode": "uniform"}


class Block(nn.Module):
    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(DIM, DIM)})
        self.linear1 = nn.Conv1d(DIM, DIM, 3, padding=1) if conv else nn.Linear(DIM, DIM, bias=False)
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:  # (B, tokens, DIM)
        x = x + torch.tanh(self.attn["qkv"](x))
        return x + torch.tanh(self.linear1(x.mT).mT if self.conv else self.linear1(x))


class Toy(nn.Sequential):
    """Block 0 has a convolution as ``linear1``, block 1 a linear layer, as the streams of the generator do."""

    def __init__(self) -> None:
        super().__init__(Block(conv=True), Block(conv=False))


LINEAR = ("attn.qkv", "1.linear1")
CONFIGS = {
    "qkv": LoRAConfig(rank=16),
    "scaled": LoRAConfig(rank=3, alpha=7.0, targets=LINEAR),
    "rslora": LoRAConfig(rank=3, alpha=5.0, targets=LINEAR, rslora=True),
    "ranks": LoRAConfig(rank=4, targets=LINEAR, target_ranks={"1.linear1": 2}),
    "pissa": LoRAConfig(rank=3, targets=LINEAR, init="pissa"),
    "conv": LoRAConfig(rank=3, alpha=7.0, targets=("attn.qkv", "linear1")),
    "dora": LoRAConfig(rank=3, alpha=7.0, targets=LINEAR, dora=True),
    "conv_dora_pissa": LoRAConfig(rank=3, targets=("attn.qkv", "linear1"), dora=True, init="pissa"),
}
NATIVE = {"conv": "convolutions", "dora": "DoRA magnitudes", "conv_dora_pissa": "convolutions and has DoRA magnitudes"}
LINEAR_CONFIGS = [name for name in CONFIGS if name not in NATIVE]


def make_toy() -> Toy:
    torch.manual_seed(1)
    return Toy()


def make_input() -> Tensor:
    return torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(2))


def trained(base: Toy, name: str) -> Toy:
    model = copy.deepcopy(base)
    inject_lora(model, CONFIGS[name])
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter += 0.2 * torch.randn(parameter.shape, generator=rng)
    return model
