"""A small model with every kind of layer that adapters meet, and helpers of their tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selva.lora.merge import Adapter
from selva.lora.state import adapter_tensors, lora_parameters

DIM = 12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, DIM)).sum(-2)


class Block(nn.Module):
    """The shapes that matter: linear layers, convolutions with and without bias, and things no adapter fits."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.linear1 = nn.Conv1d(DIM, DIM, 3, padding=1)
        self.ffn = nn.Sequential(nn.Conv1d(DIM, 16, 7, padding=3, bias=False), nn.SiLU(), nn.Conv1d(16, DIM, 1))
        self.grouped = nn.Conv1d(DIM, DIM, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:  # (B, tokens, DIM)
        x = x + self.attn(self.norm(x))
        x = x + self.linear1(x.mT).mT + self.grouped(x.mT).mT
        return x + self.ffn(x.mT).mT


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.linear1 = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.linear1(x)


ALL = ("attn.qkv", "linear1", "ffn.0")


def make_toy() -> Toy:
    torch.manual_seed(1)
    return Toy()


def make_input() -> Tensor:
    return torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(2))


def train_a_little_(model: nn.Module) -> None:
    """Move the factors away from their start, as training would."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter += 0.2 * torch.randn(parameter.shape, generator=rng)


def exported(model: nn.Module) -> Adapter:
    return Adapter(adapter_tensors(model))


def assert_same_change(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    """Assert that two outputs of adapted models are one but for float32 rounding, beside what the adapter changed.

    A share of 1e-4 leaves room for sums in another order on any processor; a wrong scale or a missing layer is a share
    of 0.01 and more.
    """
    assert (found - expected).abs().max() < 1e-4 * (expected - base).abs().max()
