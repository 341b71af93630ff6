"""Building blocks of the generator: normalisation, gated MLPs, rotary positions, time embedding, attention streams.

Tokens travel channel-last, (B, tokens, channels). The 1-D convolutions are ordinary ``nn.Conv1d`` and therefore
channel-first; whoever owns a convolution transposes around it. Parameter names are those of the published weights.

Source: MMAudio (arXiv:2412.15322); tables and frequencies are computed in float64 and used in float32, because
rounding them to half precision changes what the v2 model sees as time (they are no buffers, so no cast reaches them).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selva.models import winograd_conv
from selva.models.lean import frozen_conv, one_more_, silu_mul
from selva.models.qk_norm_rope import RMS_EPS, qk_norm_rope
from selva.utils.device import computes_on_cpu
from selva.utils.errors import UserError
from selva.utils.text import listed

ROPE_THETA = 10_000.0


def load_strict_(module: nn.Module, state_dict: Mapping[str, Tensor], what: str) -> None:
    """Copy ``state_dict`` into ``module``; every key must be there, none left over, every shape equal.

    Raises:
        ValueError: names up to ten keys of each kind of problem, with the shapes found and expected.
    """
    own = module.state_dict()
    problems = []
    for title, keys in (
        ("missing", [k for k in own if k not in state_dict]),
        ("unexpected", [k for k in state_dict if k not in own]),
        ("of another shape", [
            f"{k} {tuple(state_dict[k].shape)}, expected {tuple(own[k].shape)}"
            for k in own if k in state_dict and state_dict[k].shape != own[k].shape
        ]),
    ):
        if keys:
            problems.append(f"{len(keys)} {title}: {listed(keys, 10)}")
    if problems:
        raise UserError(f"these weights do not fit the {what}: {'; '.join(problems)}")
    module.load_state_dict(state_dict, strict=True)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, always computed and returned in float32.

    The caller casts back once, after the rotary positions; a cast in between would round twice.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), RMS_EPS)


def gated_width(dim: int, mlp_ratio: float = 4.0) -> int:
    """Return the hidden width of a gated MLP: two thirds of ``mlp_ratio * dim``, rounded up to a multiple of 256."""
    return 256 * math.ceil(int(2 * int(dim * mlp_ratio) / 3) / 256)


class GatedMLP(nn.Module):
    """w2(silu(w1 x) * w3 x) on (..., dim); no bias."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu_mul(self.w1(x), self.w3(x)))


class ConvMLP(nn.Module):
    """The gated MLP with three convolutions along the tokens, on channel-first (B, dim, tokens); no bias."""

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int) -> None:
        super().__init__()
        pad = kernel_size // 2
        self.w1 = nn.Conv1d(dim, hidden_dim, kernel_size, padding=pad, bias=False)
        self.w2 = nn.Conv1d(hidden_dim, dim, kernel_size, padding=pad, bias=False)
        self.w3 = nn.Conv1d(dim, hidden_dim, kernel_size, padding=pad, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if winograd_conv.supports(x, self.w1, self.w2, self.w3):
            return winograd_conv.gated_mlp(x.mT, self.w1, self.w2, self.w3).mT
        return frozen_conv(self.w2, silu_mul(frozen_conv(self.w1, x), frozen_conv(self.w3, x)))


# ---------------------------------------------------------------------------------------------------------------
# time and position
# ---------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table first made while sampling must still serve a later training step
def rotary_table(num_tokens: int, head_dim: int, step: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (num_tokens, head_dim / 2) float32, of the angles ``p * step * theta^(-2k/head_dim)``.

    ``step`` is 1 for latent tokens and N/T for CLIP tokens, which puts CLIP token j at latent position j*N/T; 0, for
    text, rotates by nothing.
    """
    frequency = step * ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(num_tokens, dtype=torch.float64), frequency)
    return angle.cos().float().to(device), angle.sin().float().to(device)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def time_frequencies(num: int, scale: float, device: torch.device) -> Tensor:
    """Return (num,) float32 frequencies ``scale * 10000^(-i/num)`` of the time embedding."""
    frequency = scale * 10_000.0 ** (-torch.arange(num, dtype=torch.float64) / num)
    return frequency.float().to(device)


class TimestepEmbedder(nn.Module):
    """t in [0, 1] -> (B, hidden_dim): cosines, then sines, of t times fixed frequencies, through two linear layers."""

    def __init__(self, hidden_dim: int, frequency_dim: int, scale: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim))
        self.frequency_dim, self.scale = frequency_dim, scale

    def frequencies(self, device: torch.device) -> Tensor:
        """Return the (frequency_dim / 2,) frequencies."""
        return time_frequencies(self.frequency_dim // 2, self.scale, device)

    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the embedding of (B,) times; the layers are given cosines and sines in ``dtype``, or in their own."""
        angle = t.float()[:, None] * self.frequencies(t.device)
        embedding = torch.cat((angle.cos(), angle.sin()), dim=-1)  # (B, frequency_dim) float32
        return self.mlp(embedding.to(dtype or self.mlp.get_parameter("0.weight").dtype))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def nearest_index(num_source: int, num_target: int, device: torch.device) -> Tensor:
    """Return (num_target,) int64: the source token that each target token repeats.

    PyTorch's "nearest-exact" rule evaluated in float32 by PyTorch itself: in float64 two indices of 192 -> 345 differ.
    """
    positions = torch.arange(num_source, dtype=torch.float32)[None, None]
    return F.interpolate(positions, size=num_target, mode="nearest-exact")[0, 0].long().to(device)


def forget_tables() -> None:
    """Forget all tables made so far, which are of the kind of tensor that the first caller worked with."""
    for table in (rotary_table, time_frequencies, nearest_index):
        table.cache_clear()


# ---------------------------------------------------------------------------------------------------------------
# attention streams
# ---------------------------------------------------------------------------------------------------------------


def modulated_norm(norm: nn.LayerNorm, x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """Return ``norm(x) * factor + shift`` in the dtype of ``x`` (DiT, arXiv:2212.09748, adaptive layer norm).

    Without autocast, which would widen the result to float32 for no more than one rounding, and keep it so for the
    backward pass. The norm itself computes in float32 whatever it is given.
    """
    with torch.autocast(x.device.type, enabled=False):
        return torch.addcmul(shift, norm(x), factor).to(x.dtype)


class SelfAttention(nn.Module):
    """Projections of one stream; the attention itself runs over the tokens of several streams together."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, each (B, heads, tokens, head_dim), of ``x`` (B, tokens, dim)."""
        return qk_norm_rope(self.qkv(x), self.q_norm.weight, self.k_norm.weight, rotary)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return (B, tokens, heads * head_dim), unmasked softmax attention of (B, heads, tokens, head_dim) inputs."""
    if q.dtype == torch.bfloat16 and computes_on_cpu(q):
        attended = _attend_by_matrix_products(q, k, v)
    else:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).flatten(2)


def _attend_by_matrix_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return (B, heads, tokens, head_dim) through the whole score matrices.

    PyTorch's fused attention for CPUs reaches a third of the rate that bfloat16 matrix products do. The softmax runs in
    float32 inside; scores and weights are rounded to the dtype of the inputs.
    """
    scale = q.shape[-1] ** -0.5
    scores = torch.baddbmm(q.new_zeros(()), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, q.shape[:2])


class Stream(nn.Module):
    """One modality's half of a transformer block: modulation, projections, and what follows the shared attention.

    Args:
        kernel_size: 3 makes ``linear1`` and the MLP convolutions along the tokens, 1 makes them linear (text).
        pre_only: the stream only lends q, k and v and is not updated (clip and text of the last joint block).
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, kernel_size: int, pre_only: bool = False) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (2 if pre_only else 6) * dim))
        self.pre_only, self.convolves = pre_only, kernel_size > 1
        if pre_only:
            return
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, elementwise_affine=False)
        width = gated_width(dim, mlp_ratio)
        if self.convolves:
            self.linear1 = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2)
            self.ffn = ConvMLP(dim, width, kernel_size)
        else:
            self.linear1 = nn.Linear(dim, dim)
            self.ffn = GatedMLP(dim, width)

    def pre_attention(
        self, x: Tensor, c: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """Return (q, k, v) and the modulation that :meth:`post_attention` needs.

        Args:
            x: (B, tokens, dim). c: (B, 1, dim) or (B, tokens, dim) condition. rotary: positions.
        """
        if self.pre_only:
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
            modulation = ()
        else:
            shift, scale, gate_attn, shift_ffn, scale_ffn, gate_ffn = self.adaLN_modulation(c).chunk(6, dim=-1)
            # Now, as nothing is kept for the backward pass yet: all six are of one memory.
            modulation = gate_attn, shift_ffn, one_more_(scale_ffn), gate_ffn
        return self.attn(modulated_norm(self.norm1, x, shift, one_more_(scale)), rotary), modulation

    def post_attention(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Return the updated stream (B, tokens, dim)."""
        gate_attn, shift, factor, gate_ffn = modulation
        x = torch.addcmul(x, self._along_tokens(self.linear1, attended), gate_attn)
        normed = modulated_norm(self.norm2, x, shift, factor)
        return torch.addcmul(x, self._along_tokens(self.ffn, normed), gate_ffn)

    def _along_tokens(self, layer: nn.Module, x: Tensor) -> Tensor:
        if not self.convolves:
            return layer(x)
        if isinstance(layer, nn.Conv1d) and winograd_conv.supports(x, layer):
            return winograd_conv.conv(x, layer)
        return frozen_conv(layer, x.mT).mT


class JointBlock(nn.Module):
    """Three streams (latent, clip, text) that attend to one another's tokens and keep their own weights."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, pre_only: bool) -> None:
        super().__init__()
        self.latent_block = Stream(dim, num_heads, mlp_ratio, kernel_size=3)
        self.clip_block = Stream(dim, num_heads, mlp_ratio, kernel_size=3, pre_only=pre_only)
        self.text_block = Stream(dim, num_heads, mlp_ratio, kernel_size=1, pre_only=pre_only)
        self.pre_only = pre_only

    def forward(
        self, latent: Tensor, clip: Tensor, text: Tensor, global_c: Tensor, extended_c: Tensor,
        latent_rotary: tuple[Tensor, Tensor], clip_rotary: tuple[Tensor, Tensor], text_rotary: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three updated streams; with ``pre_only`` clip and text come back as they were.

        Args:
            latent: (B, N, D), modulated per token by ``extended_c`` (B, N, D).
            clip: (B, T, D) and text: (B, 77, D), modulated by ``global_c`` (B, 1, D).
        """
        latent_qkv, latent_mod = self.latent_block.pre_attention(latent, extended_c, latent_rotary)
        clip_qkv, clip_mod = self.clip_block.pre_attention(clip, global_c, clip_rotary)
        text_qkv, text_mod = self.text_block.pre_attention(text, global_c, text_rotary)
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(latent_qkv, clip_qkv, text_qkv, strict=True))
        attended = attend(q, k, v)  # (B, N + T + 77, D)
        of_latent, of_clip, of_text = attended.split((latent.shape[1], clip.shape[1], text.shape[1]), dim=1)
        latent = self.latent_block.post_attention(latent, of_latent, latent_mod)
        if not self.pre_only:
            clip = self.clip_block.post_attention(clip, of_clip, clip_mod)
            text = self.text_block.post_attention(text, of_text, text_mod)
        return latent, clip, text


class FusedBlock(Stream):
    """A stream on its own: self-attention over the latent tokens."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(dim, num_heads, mlp_ratio, kernel_size=3)

    def forward(self, latent: Tensor, extended_c: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        qkv, modulation = self.pre_attention(latent, extended_c, rotary)
        return self.post_attention(latent, attend(*qkv), modulation)


class FinalLayer(nn.Module):
    """Modulated norm and a convolution to the latent channels.

    The modulation comes from the global condition rather than the per-token one, as the weights were trained.
    """

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.norm = nn.LayerNorm(dim, eps=1e-5, elementwise_affine=False)
        self.conv = nn.Conv1d(dim, latent_dim, 7, padding=3)

    def forward(self, latent: Tensor, global_c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(global_c).chunk(2, dim=-1)
        normed = modulated_norm(self.norm, latent, shift, one_more_(scale))
        return frozen_conv(self.conv, normed.mT).mT  # (B, N, latent_dim)
