"""Video frames -> sync features: what moves when, from a transformer with divided space-time attention.

    frames (B, F, 3, H, W) at 25 fps -> segments of 16 frames, 8 apart -> trunk -> one vector per pair of frames

Segments overlap and are not averaged, so 200 frames (8 s) give 24 segments and 192 vectors. This module holds the trunk
that :mod:`selva.models.textsynch` shares, and Synchformer's visual branch, which uses it as it is.
Source: Synchformer (arXiv:2401.16423); its trunk is MotionFormer's (arXiv:2106.05392) with the divided attention of
TimeSformer (arXiv:2102.05095).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from selva.models.blocks import attend, load_strict_
from selva.models.config import VideoEncoderConfig
from selva.models.onednn import linear, use_onednn_
from selva.sequence import SYNC_SEGMENT_FRAMES, SYNC_SEGMENT_STEP, num_sync_segments
from selva.utils.errors import UserError

NORM_EPS = 1e-6
EMBEDDING_STD = 0.02  # of freshly drawn class tokens and positions


# ---------------------------------------------------------------------------------------------------------------
# segments
# ---------------------------------------------------------------------------------------------------------------


def check_frames(frames: Tensor, image_size: int) -> None:
    """Raise ValueError unless ``frames`` is (B, F, 3, image_size, image_size) with enough frames for a segment."""
    if frames.ndim != 5 or frames.shape[2:] != (3, image_size, image_size) or frames.shape[1] < SYNC_SEGMENT_FRAMES:
        raise UserError(
            f"frames are {tuple(frames.shape)}, expected "
            f"(batch, at least {SYNC_SEGMENT_FRAMES} frames, 3, {image_size}, {image_size})"
        )


def iterate_segments(frames: Tensor, segment_batch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (segments (n, 16, 3, H, W), items (n,) int64) in order, at most ``segment_batch`` at once.

    ``items`` holds the batch index that every segment was cut from. Frames behind the last whole segment are left out.
    Only the yielded frames are copied: all overlapping segments together would be twice the video.

    Raises:
        ValueError: ``segment_batch`` below 1.
    """
    if segment_batch is not None and segment_batch < 1:
        raise UserError(f"segment_batch is {segment_batch}, expected at least 1, or None for all segments at once")
    places = [
        (item, segment * SYNC_SEGMENT_STEP)
        for item in range(frames.shape[0])
        for segment in range(num_sync_segments(frames.shape[1]))
    ]
    for first in range(0, len(places), segment_batch or len(places)):
        chosen = places[first : first + (segment_batch or len(places))]
        segments = torch.stack([frames[item, start : start + SYNC_SEGMENT_FRAMES] for item, start in chosen])
        yield segments, torch.tensor([item for item, _ in chosen], device=frames.device)


# ---------------------------------------------------------------------------------------------------------------
# trunk
# ---------------------------------------------------------------------------------------------------------------


class DividedAttention(nn.Module):
    """Self-attention of patch tokens within groups, and of the class token over everything.

    Args:
        axis: "time" groups the tokens at one place, "space" those of one time step. Every group also sees the class
            token's key and value.
    """

    def __init__(self, dim: int, num_heads: int, axis: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.num_heads = num_heads
        self.grouped = {"time": "n p h f c", "space": "n f h p c"}[axis]
        self.attended = {"time": "(n p) f d", "space": "(n f) p d"}[axis]

    def forward(self, x: Tensor, num_slots: int) -> Tensor:
        """Return (n, 1 + f p, dim), as ``x``: the class token, then p tokens for each of f = ``num_slots`` steps."""
        qkv = rearrange(self.qkv(x), "n t (qkv h c) -> qkv n h t c", qkv=3, h=self.num_heads)
        of_class = attend(qkv[0, :, :, :1], qkv[1], qkv[2])  # (n, 1, dim)

        sizes = {"f": num_slots, "p": (x.shape[1] - 1) // num_slots}
        patches = rearrange(qkv[:, :, :, 1:], f"qkv n h (f p) c -> qkv {self.grouped}", **sizes)  # not copied yet
        class_kv = qkv[1:, :, None, :, :1].expand(-1, -1, patches.shape[2], -1, -1, -1)
        k, v = torch.cat((class_kv, patches[1:]), dim=-2).flatten(1, 2)  # (n groups, h, 1 + members, c)
        of_patches = attend(patches[0].flatten(0, 1), k, v)  # (n groups, members, dim)
        of_patches = rearrange(of_patches, f"{self.attended} -> n (f p) d", **sizes)
        return self.proj(torch.cat((of_class, of_patches), dim=1))


class MLP(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(linear(x, self.fc1.weight, self.fc1.bias, gelu=True))


class DividedBlock(nn.Module):
    """Attention over time, then over space, then an MLP. The published norm numbers do not follow that order."""

    def __init__(self, config: VideoEncoderConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = DividedAttention(dim, config.num_heads, "space")
        self.timeattn = DividedAttention(dim, config.num_heads, "time")
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLP(dim, config.mlp_dim)
        self.norm3 = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor, num_slots: int) -> Tensor:
        x = x + self.timeattn(self.norm3(x), num_slots)
        x = x + self.attn(self.norm1(x), num_slots)
        return x + self.mlp(self.norm2(x))


class SpatialAggregation(nn.Module):
    """(m, p, dim) -> (m, dim): a learned token reads the patches of one time step through one transformer layer.

    The published layer is a full encoder layer of which only the class token's row is used, so only that row is
    computed.
    """

    def __init__(self, config: VideoEncoderConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.self_attn = nn.MultiheadAttention(dim, config.num_heads, batch_first=True)
        self.linear1 = nn.Linear(dim, config.mlp_dim)
        self.linear2 = nn.Linear(config.mlp_dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        nn.init.trunc_normal_(self.cls_token, std=EMBEDDING_STD)

    def forward(self, patches: Tensor) -> Tensor:
        class_token = self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype)  # (m, 1, dim)
        tokens = self.norm1(torch.cat((class_token, patches), dim=1))  # (m, 1 + p, dim)
        x = class_token + self.self_attn(tokens[:, :1], tokens, tokens, need_weights=False)[0]
        x = x + self.linear2(linear(self.norm2(x), self.linear1.weight, self.linear1.bias, gelu=True))
        return x[:, 0]  # (m, dim)


class VisualTrunk(nn.Module):
    """Segments of 16 frames -> patch tokens -> one feature per time step."""

    def __init__(self, config: VideoEncoderConfig) -> None:
        super().__init__()
        dim, patch = config.embed_dim, config.patch_size
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, dim))  # class token first
        self.temp_embed = nn.Parameter(torch.empty(1, config.num_slots, dim))
        # In the published files and never used: the picture-only ancestor of the next layer.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)}).requires_grad_(False)
        kernel = (config.temporal_patch, patch, patch)
        self.patch_embed_3d = nn.ModuleDict({"proj": nn.Conv3d(3, dim, kernel, stride=kernel)})
        self.blocks = nn.ModuleList(DividedBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.spatial_attn_agg = SpatialAggregation(config)
        for embedding in (self.cls_token, self.pos_embed, self.temp_embed):
            nn.init.trunc_normal_(embedding, std=EMBEDDING_STD)

    def patch_tokens(self, segments: Tensor) -> Tensor:
        """Return (n, f p, dim) normalised tokens: time step by time step, each row by row.

        Args:
            segments: (n, 16, 3, H, W) in [-1, 1].
        """
        pixels = segments.to(self.cls_token.dtype).transpose(1, 2)  # (n, 3, 16, H, W)
        patches = self.patch_embed_3d["proj"](pixels).flatten(2).mT  # (n, f p, dim)
        place = self.pos_embed[:, None, 1:] + self.temp_embed[:, :, None]  # (1, f, p, dim)
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)  # (n, 1, dim)
        x = torch.cat((class_token, patches + place.flatten(1, 2)), dim=1)  # (n, 1 + f p, dim)
        for block in self.blocks:
            x = block(x, self.config.num_slots)
        return self.norm(x[:, 1:])

    def aggregate(self, tokens: Tensor) -> Tensor:
        """Return (n, f, dim), one feature per time step, of ``tokens`` (n, f p, dim)."""
        frames = self.spatial_attn_agg(rearrange(tokens, "n (f p) d -> (n f) p d", f=self.config.num_slots))
        return rearrange(frames, "(n f) d -> n f d", f=self.config.num_slots)


class Synchformer(nn.Module):
    """The visual branch of Synchformer: the sync features of MMAudio."""

    def __init__(self, config: VideoEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config or VideoEncoderConfig()
        self.vfeat_extractor = VisualTrunk(self.config)
        use_onednn_(self)

    def encode(self, frames: Tensor, segment_batch: int | None = None) -> Tensor:
        """Return (B, segments * 8, embed_dim) sync features, in the dtype of the network.

        Args:
            frames: (B, F, 3, H, W) RGB in [-1, 1] at 25 fps; F at least 16, H = W = image_size.
            segment_batch: segments to compute at once, None for all: the same features, less memory. About 4 is also
                the fastest on a CPU.

        Raises:
            ValueError: another shape, or fewer than 16 frames.
        """
        check_frames(frames, self.config.image_size)
        trunk = self.vfeat_extractor
        features = [trunk.aggregate(trunk.patch_tokens(chunk)) for chunk, _ in iterate_segments(frames, segment_batch)]
        return torch.cat(features).reshape(len(frames), -1, self.config.embed_dim)

    def load_published(self, state_dict: Mapping[str, Tensor]) -> Synchformer:
        """Load the visual branch of a published checkpoint and return self; the audio branch and heads are ignored.

        Raises:
            ValueError: missing or unexpected keys under ``vfeat_extractor.``, or other shapes; names them.
        """
        visual = {name: tensor for name, tensor in state_dict.items() if name.startswith("vfeat_extractor.")}
        load_strict_(self, visual, "Synchformer video encoder")
        return self
