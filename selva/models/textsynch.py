"""Video frames and text -> sync features of what the text names.

    frames -> Synchformer's trunk -> patch tokens -> attention to the text -> one vector per pair of frames

The same trunk and aggregation as :mod:`selva.models.synchformer`; between the two, the patch tokens read the text.
Learned supplementary tokens stand in front of every text.
Source: SelVA (arXiv:2512.02650).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selva.models.blocks import GatedMLP, RMSNorm, gated_width, load_strict_
from selva.models.config import VideoEncoderConfig
from selva.models.onednn import use_onednn_
from selva.models.synchformer import VisualTrunk, check_frames, iterate_segments
from selva.utils.errors import UserError

CROSS_NORM_EPS = 1e-5
PUBLISHED_PREFIXES = (
    "vfeat_extractor",
    "text_proj",
    "synch_text_cross_blocks",
    "sup_text_feat",
    "empty_string_feat",
)


class CrossAttention(nn.Module):
    """Patch tokens (n, t, dim) attend to text tokens (n, l, dim); without output projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)
        self.num_heads = num_heads

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (n, h, t, c)
        # The published rows interleave k and v per channel, as the generator's do.
        k, v = self.kv_proj(text).unflatten(-1, (self.num_heads, -1, 2)).permute(4, 0, 2, 1, 3)  # each (n, h, l, c)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # (n, h, t, c)
        return attended.transpose(1, 2).flatten(2)  # (n, t, dim)


class TextCrossBlock(nn.Module):
    """Attention to the text, then a gated MLP. A fresh block changes nothing: its two outputs start at zero."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=CROSS_NORM_EPS)  # on the attention's output, not its input
        self.attn = CrossAttention(dim, num_heads)
        self.linear1 = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=CROSS_NORM_EPS)
        self.ffn = GatedMLP(dim, gated_width(dim))
        nn.init.zeros_(self.norm1.weight)
        nn.init.zeros_(self.ffn.w2.weight)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        x = x + self.norm1(self.linear1(self.attn(x, text, mask)))
        return x + self.ffn(self.norm2(x))


class TextSynch(nn.Module):
    """SelVA's text-conditioned video encoder."""

    def __init__(self, config: VideoEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config or VideoEncoderConfig()
        dim, text_dim = self.config.embed_dim, self.config.text_dim
        self.sup_text_feat = nn.Parameter(torch.randn(self.config.num_sup_tokens, text_dim))
        # In the published file and never used: "" goes through the text encoder like any other prompt.
        self.empty_string_feat = nn.Parameter(torch.zeros(1, text_dim), requires_grad=False)
        self.vfeat_extractor = VisualTrunk(self.config)
        self.text_proj = nn.Sequential(nn.Linear(text_dim, dim), nn.SiLU(), GatedMLP(dim, gated_width(dim)))
        self.synch_text_cross_blocks = nn.ModuleList((TextCrossBlock(dim, self.config.num_heads),))
        use_onednn_(self)

    def prepend_supplementary(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return text and mask with the learned tokens in front: (B, num_sup_tokens + L, text_dim) and (B, same)."""
        learned = self.sup_text_feat.to(text.dtype).expand(len(text), -1, -1)  # (B, num_sup_tokens, text_dim)
        return torch.cat((learned, text), dim=1), F.pad(mask, (self.config.num_sup_tokens, 0), value=True)

    def encode(self, frames: Tensor, text: Tensor, mask: Tensor, segment_batch: int | None = None) -> Tensor:
        """Return (B, segments * 8, embed_dim) sync features, in the dtype of the network.

        Args:
            frames: (B, F, 3, H, W) RGB in [-1, 1] at 25 fps; F at least 16, H = W = image_size.
            text: (B, L, text_dim) last hidden states of the text encoder, without the supplementary tokens.
            mask: (B, L) bool, True for the tokens that count.
            segment_batch: segments to compute at once, None for all: the same features, less memory. About 4 is also
                the fastest on a CPU.

        Raises:
            ValueError: other shapes, fewer than 16 frames, or a mask that is not boolean.
        """
        check_frames(frames, self.config.image_size)
        if text.ndim != 3 or len(text) != len(frames) or text.shape[-1] != self.config.text_dim:
            raise UserError(f"text is {tuple(text.shape)}, expected ({len(frames)}, tokens, {self.config.text_dim})")
        if mask.shape != text.shape[:2] or mask.dtype != torch.bool:
            raise UserError(f"mask is {tuple(mask.shape)} {mask.dtype}, expected {tuple(text.shape[:2])} torch.bool")
        trunk = self.vfeat_extractor
        text, mask = self.prepend_supplementary(text.to(self.sup_text_feat.dtype), mask)
        text = self.text_proj(text)  # (B, num_sup_tokens + L, embed_dim)
        features = []
        for segments, items in iterate_segments(frames, segment_batch):
            tokens = trunk.patch_tokens(segments)  # (n, f p, embed_dim)
            for block in self.synch_text_cross_blocks:
                tokens = block(tokens, text[items], mask[items])
            features.append(trunk.aggregate(tokens))  # (n, 8, embed_dim)
        return torch.cat(features).reshape(len(frames), -1, self.config.embed_dim)

    def load_published(self, state_dict: Mapping[str, Tensor]) -> TextSynch:
        """Load a published checkpoint, its own copy of the trunk included, and return self.

        Raises:
            ValueError: missing or unexpected keys under the encoder's prefixes, or other shapes; names them.
        """
        own = {name: tensor for name, tensor in state_dict.items() if name.startswith(PUBLISHED_PREFIXES)}
        load_strict_(self, own, "TextSynch video encoder")
        return self
