"""From one projection to the queries, keys and values of every head: split, normalise, rotate; in one step of autograd.

Written out as separate operations, the float32 intermediates of norm and rotation are most of what a block keeps for
its backward pass. Here only the projection's own numbers and one factor per token and head are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RMS_EPS = 1.1920929e-07  # float32 machine epsilon: what the reference uses for every input dtype


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v, each (B, heads, tokens, head_dim), of a projection (B, tokens, heads * head_dim * 3).

    q and k are brought to root mean square 1 over every head's channels, multiplied by (head_dim,) weights, and every
    channel pair (2k, 2k+1) is rotated by its token's angle: in float32, rounded once.

    Args:
        rotary: cos and sin, each (tokens, head_dim / 2) float32.
    """
    if torch.compiler.is_compiling():
        return _written_out(qkv, q_weight, k_weight, rotary)
    return _NormedHeads.apply(qkv, q_weight, k_weight, *rotary)


def _written_out(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same by real numbers, for PyTorch's compiler to fuse.

    It generates no code for complex ones, and makes wrong gradients of the backward pass below (seen with torch 2.11).
    """
    head_dim = len(q_weight)
    *raw, v = qkv.unflatten(-1, (-1, head_dim, 3)).permute(4, 0, 2, 1, 3).unbind()
    results = []
    for x, weight in zip(raw, (q_weight, k_weight), strict=True):
        x = x.float()
        x = x * (x.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt() * weight.float()
        (even, odd), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), rotary
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        results.append(turned.flatten(-2).to(qkv.dtype))
    return *results, v


class _NormedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        head_dim = len(q_weight)
        # The published rows interleave q, k and v per channel, so the selector is the last and fastest axis. Copied
        # once: the fused attention kernels refuse a last axis with gaps and would fall back to a slow one.
        q, k, v = qkv.unflatten(-1, (-1, head_dim, 3)).permute(4, 0, 2, 1, 3).contiguous()  # each (B, H, n, d)
        turn = torch.complex(cos, sin)  # one product per pair, a third of the time of four real ones
        kept, results = [], []
        for raw, weight in ((q, q_weight), (k, k_weight)):
            length = torch.linalg.vector_norm(raw, dim=-1, keepdim=True, dtype=torch.float32)
            factor = (length.square() / head_dim + RMS_EPS).rsqrt()  # (B, H, n, 1)
            rotated = (raw * factor).mul_(weight.float())
            _as_pairs(rotated).mul_(turn)
            kept += [raw, factor, weight]
            results.append(rotated.to(raw.dtype))
        ctx.save_for_backward(turn, *kept)
        return *results, v

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        turn, *kept = ctx.saved_tensors
        batch, heads, tokens, head_dim = grads[0].shape
        grad = grads[0].new_empty(batch, tokens, heads, head_dim, 3)
        grad[..., 2] = grads[2].transpose(1, 2)
        grad_weights: list[Tensor | None] = [None, None]
        for i, (raw, factor, weight) in enumerate((kept[:3], kept[3:])):
            normed = raw * factor
            towards = grads[i].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            _as_pairs(towards).mul_(turn.conj())
            if ctx.needs_input_grad[1 + i]:
                grad_weights[i] = (towards * normed).sum((0, 1, 2)).to(weight.dtype)
            # Through the norm: the part along the vector itself, which would only lengthen it, is taken out.
            towards.mul_(weight.float())
            along = (towards * normed).mean(-1, keepdim=True)
            towards.addcmul_(normed, along, value=-1).mul_(factor)
            grad[..., i] = towards.to(raw.dtype).transpose(1, 2)
        return grad.flatten(2), *grad_weights, None, None


def _as_pairs(x: Tensor) -> Tensor:
    """Return a view of float32 (..., d) as d / 2 complex numbers of neighbouring channels."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
