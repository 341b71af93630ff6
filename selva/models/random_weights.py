"""Reproducible random weights under which every network does something.

A freshly built generator predicts exactly zero and passes no gradient to its blocks, because its output layers and
gates start at zero; its latent statistics are not even numbers. Tests, benchmarks and the packaged model need weights
without such holes. Each tensor here depends on its name and a seed only, through integer arithmetic and products, so
it is the same on every machine and does not change when another layer is added.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

# What the last part of a name says about the scale; everything else follows from the number of axes.
UNIT_TABLES = ("token_embedding.weight", "shared.weight", "embed_tokens.weight", "empty_sync_feat", "sup_text_feat")
SMALL_TABLES = (
    "sync_pos_emb", "pos_embed", "temp_embed", "cls_token", "positional_embedding", "class_embedding",
)
# CLIP features have length 1 over all channels, so unit weights bring them to the level of the other inputs.
UNIT_MATRICES = ("clip_input_proj.0.weight", "text_input_proj.0.weight")
# The vocoder's activations only add positive values. Without a mean over time its last filter passes no offset on.
WAVEFORM_FILTER, WAVEFORM_OFFSET = "conv_post.weight", "conv_post.bias"
WAVEFORM_GAIN = 0.03
SMALL = 0.1

M = TypeVar("M", bound=nn.Module)


Noise = Callable[[str, tuple[int, ...], int], Tensor]  # fn(name, shape, seed): values of zero mean and unit variance


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0, noise: Noise | None = None) -> Tensor:
    """Return float32 values for the parameter ``name``: uniform, of zero mean and of a scale that fits its role.

    Weights keep the magnitude of their input (1 / sqrt(fan-in)), norm scales lie around 1, biases and positions are
    small, latent deviations lie around 1 and are positive, and the waveform comes out well below full scale.

    Args:
        noise: draws the values; None: so that they are the same on every machine, which takes some seconds per GB.
    """
    x = (noise or _unit_noise)(name, shape, seed)
    if name.endswith("latent_std"):
        return 1 + SMALL * x.abs()
    if name.endswith((*UNIT_TABLES, *UNIT_MATRICES)):
        return x
    if name.endswith(SMALL_TABLES):
        return SMALL * x
    if name.endswith(WAVEFORM_FILTER):
        x = x.double()
        return (WAVEFORM_GAIN * (x - x.mean(-1, keepdim=True)) / math.sqrt(math.prod(shape[1:]))).float()
    if name.endswith(WAVEFORM_OFFSET):
        return SMALL * WAVEFORM_GAIN * x
    if len(shape) >= 2 and not name.endswith("latent_mean"):
        return x / math.sqrt(math.prod(shape[1:]))
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + SMALL * x
    return SMALL * x


def random_state_dict(module: nn.Module, seed: int = 0, noise: Noise | None = None) -> dict[str, Tensor]:
    """Return a state dict for ``module``: parameters by :func:`random_tensor`, persistent buffers as they are.

    Only the shapes of the parameters are read, so they may live on the meta device.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {
        name: random_tensor(name, tuple(tensor.shape), seed, noise) if name in parameters else tensor.detach().clone()
        for name, tensor in module.state_dict().items()
    }


def fill_random_(module: M, seed: int = 0) -> M:
    """Load :func:`random_state_dict` into ``module`` as if it were a published file, and return ``module``."""
    weights = random_state_dict(module, seed)
    load_published = getattr(module, "load_published", None)
    if load_published is not None:
        load_published(weights)
    else:
        module.load_state_dict(weights, strict=True)
    return module


def _unit_noise(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return (shape) float32 uniform values of zero mean and unit variance."""
    # RandomState is frozen by NumPy's compatibility policy; uniform draws involve no logarithm that a maths library
    # could round differently.
    rng = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode()))
    x = rng.random_sample(shape)
    return torch.from_numpy(np.asarray((2 * x - 1) * math.sqrt(3), dtype=np.float32))
