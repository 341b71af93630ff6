"""The generator: a multimodal diffusion transformer that predicts the velocity of audio latents.

    clip (B, T, 1024) ─┐
    text (B, 77, 1024) ─┼─ joint blocks ── fused blocks ── final layer ── velocity (B, N, C)
    latent (B, N, C) ──┘   sync (B, S, 768) modulates every latent token

MMAudio (arXiv:2412.15322) and SelVA (arXiv:2512.02650) share this class and differ in their weights. ``v2`` is the
revision behind ``large_44k_v2``: other activations, and a time embedding that spans far higher frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selva.models.blocks import (
    ConvMLP,
    FinalLayer,
    FusedBlock,
    GatedMLP,
    JointBlock,
    TimestepEmbedder,
    gated_width,
    load_strict_,
    nearest_index,
    rotary_table,
)
from selva.models.config import GeneratorConfig
from selva.models.widening import HALF_TYPES, Widening, computing_in
from selva.sequence import SYNC_TOKENS_PER_SEGMENT
from selva.utils.errors import UserError
from selva.utils.text import counted

# Tables that old checkpoints carry although they are computed; they are dropped on loading.
COMPUTED_KEYS = ("t_embed.freqs", "latent_rot", "clip_rot")
# Layers that see conditions only, neither the latent nor the time.
CONDITION_PARTS = ("clip_input_proj.", "sync_input_proj.", "text_input_proj.", "clip_cond_proj", "text_cond_proj")


@dataclass(frozen=True)
class Conditions:
    """Projected conditions of a batch: everything that depends neither on the latent nor on the time.

    Attributes:
        clip_f: (B, T, D). sync_f: (B, N, D), already brought to the latent length. text_f: (B, 77, D).
        clip_f_c, text_f_c: (B, D), projections of the means over tokens.
    """

    clip_f: Tensor
    sync_f: Tensor
    text_f: Tensor
    clip_f_c: Tensor
    text_f_c: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.clip_f, self.sync_f, self.text_f, self.clip_f_c, self.text_f_c

    @staticmethod
    def cat_all(batches: Sequence[Conditions]) -> Conditions:
        """Return several batches as one."""
        return Conditions(*map(torch.cat, zip(*(batch.tensors() for batch in batches), strict=True)))

    def cat(self, other: Conditions) -> Conditions:
        """Return both batches as one, for guidance in a single pass."""
        return Conditions.cat_all((self, other))

    def expand(self, batch_size: int) -> Conditions:
        """Return conditions of batch 1 repeated ``batch_size`` times without a copy."""
        return Conditions(*(x.expand(batch_size, *x.shape[1:]) for x in self.tensors()))


class TokenProjection(nn.Sequential):
    """A sequence of layers on (B, tokens, channels) whose convolutions, being channel-first, are transposed around."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x.mT).mT if isinstance(layer, nn.Conv1d | ConvMLP) else layer(x)
        return x


class Generator(nn.Module):
    """Network that predicts the flow velocity from noisy latents, the time and the conditions."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        # How many blocks, from the first on, are recomputed in backward (True: all): less memory, more time.
        self.gradient_checkpointing: bool | int = False
        self.recompute_randomly = True  # whether blocks that are recomputed may draw random numbers, as for dropout
        dim, v2 = config.hidden_dim, config.v2
        width = gated_width(dim)

        self.latent_mean = nn.Parameter(torch.full((1, 1, config.latent_dim), torch.nan), requires_grad=False)
        self.latent_std = nn.Parameter(torch.full((1, 1, config.latent_dim), torch.nan), requires_grad=False)
        self.empty_string_feat = nn.Parameter(torch.zeros(config.text_seq_len, config.text_dim), requires_grad=False)
        self.empty_clip_feat = nn.Parameter(torch.zeros(1, config.clip_dim))
        self.empty_sync_feat = nn.Parameter(torch.zeros(1, config.sync_dim))
        self.sync_pos_emb = nn.Parameter(torch.zeros(1, 1, SYNC_TOKENS_PER_SEGMENT, config.sync_dim))

        def activation() -> nn.Module:
            return nn.SiLU() if v2 else nn.SELU()

        between = [nn.SiLU()] if v2 else []  # v1 has no activation here, which shifts the published index
        self.audio_input_proj = TokenProjection(
            nn.Conv1d(config.latent_dim, dim, 7, padding=3), activation(), ConvMLP(dim, width, 7)
        )
        self.clip_input_proj = TokenProjection(nn.Linear(config.clip_dim, dim), *between, ConvMLP(dim, width, 3))
        self.sync_input_proj = TokenProjection(
            nn.Conv1d(config.sync_dim, dim, 7, padding=3), activation(), ConvMLP(dim, width, 3)
        )
        self.text_input_proj = TokenProjection(nn.Linear(config.text_dim, dim), *between, GatedMLP(dim, width))
        self.clip_cond_proj = nn.Linear(dim, dim)
        self.text_cond_proj = nn.Linear(dim, dim)
        self.global_cond_mlp = GatedMLP(dim, width)
        self.t_embed = TimestepEmbedder(
            dim, frequency_dim=dim if v2 else 256, scale=10_000.0 if v2 else 1.0
        )

        num_joint = config.depth - config.fused_depth
        self.joint_blocks = nn.ModuleList(
            JointBlock(dim, config.num_heads, config.mlp_ratio, pre_only=i == num_joint - 1) for i in range(num_joint)
        )
        self.fused_blocks = nn.ModuleList(
            FusedBlock(dim, config.num_heads, config.mlp_ratio) for _ in range(config.fused_depth)
        )
        self.final_layer = FinalLayer(dim, config.latent_dim)
        self.set_sequence(config.latent_seq_len, config.clip_seq_len, config.sync_seq_len)
        self._initialise_()

    def _initialise_(self) -> None:
        """Initialise for training from scratch: every block starts as the identity and the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in ("0.weight", "2.weight"):
            nn.init.normal_(self.t_embed.mlp.get_parameter(name), std=0.02)
        for name, module in self.named_modules():
            if name.endswith("adaLN_modulation.1") or name == "final_layer.conv":
                nn.init.zeros_(module.get_parameter("weight"))
                nn.init.zeros_(module.get_parameter("bias"))

    # -- lengths and weights ------------------------------------------------------------------------------------------

    def set_sequence(self, latent_seq_len: int, clip_seq_len: int, sync_seq_len: int) -> None:
        """Set the token counts that inputs must have from now on.

        Raises:
            ValueError: ``sync_seq_len`` is not a positive multiple of 8, or another length is not positive.
        """
        if sync_seq_len < SYNC_TOKENS_PER_SEGMENT or sync_seq_len % SYNC_TOKENS_PER_SEGMENT:
            raise UserError(f"sync_seq_len is {sync_seq_len}, expected a multiple of {SYNC_TOKENS_PER_SEGMENT}")
        if latent_seq_len < 1 or clip_seq_len < 1:
            raise UserError(f"lengths are latent {latent_seq_len} and clip {clip_seq_len}, expected at least 1")
        self.latent_seq_len, self.clip_seq_len, self.sync_seq_len = latent_seq_len, clip_seq_len, sync_seq_len

    def load_published(self, state_dict: Mapping[str, Tensor]) -> Generator:
        """Load the tensors of a published ``generator_*.pth`` or ``mmaudio_*.pth`` strictly and return ``self``.

        Raises:
            ValueError: a key is missing, unexpected or of another shape.
        """
        load_strict_(self, {k: v for k, v in state_dict.items() if k not in COMPUTED_KEYS}, "generator")
        return self

    # -- latents ------------------------------------------------------------------------------------------------------

    def normalize(self, x: Tensor) -> Tensor:
        """Return latents (B, N, C) as the flow sees them: zero mean, unit deviation per channel."""
        return (x - self.latent_mean.to(x.dtype)) / self.latent_std.to(x.dtype)

    def unnormalize(self, x: Tensor) -> Tensor:
        """Return latents (B, N, C) as the VAE decodes them; the inverse of :meth:`normalize`."""
        return x * self.latent_std.to(x.dtype) + self.latent_mean.to(x.dtype)

    # -- conditions ---------------------------------------------------------------------------------------------------

    def preprocess_conditions(self, clip_f: Tensor, sync_f: Tensor, text_f: Tensor) -> Conditions:
        """Return the projected conditions, once per clip for all times.

        Args:
            clip_f: (B, T, clip_dim) CLIP frame features. sync_f: (B, S, sync_dim). text_f: (B, 77, text_dim).

        Raises:
            ValueError: a token count differs from :meth:`set_sequence`.
        """
        self._check_tokens("clip features", clip_f, self.clip_seq_len)
        self._check_tokens("sync features", sync_f, self.sync_seq_len)
        self._check_tokens("text features", text_f, self.config.text_seq_len)
        segments = sync_f.unflatten(1, (-1, SYNC_TOKENS_PER_SEGMENT))  # (B, S/8, 8, sync_dim)
        sync = self.sync_input_proj((segments + self.sync_pos_emb).flatten(1, 2))  # (B, S, D)
        sync = sync[:, nearest_index(self.sync_seq_len, self.latent_seq_len, sync.device)]  # (B, N, D)
        clip, text = self.clip_input_proj(clip_f), self.text_input_proj(text_f)
        # The means run over all tokens, text padding included, as the weights were trained.
        return Conditions(clip, sync, text, self.clip_cond_proj(clip.mean(1)), self.text_cond_proj(text.mean(1)))

    def empty_features(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the empty features, learned: (B, T, clip_dim), (B, S, sync_dim) and (B, 77, text_dim)."""
        return (
            self.empty_clip_feat.expand(batch_size, self.clip_seq_len, -1),
            self.empty_sync_feat.expand(batch_size, self.sync_seq_len, -1),
            self.empty_string_feat.expand(batch_size, -1, -1),
        )

    def empty_conditions(self, batch_size: int, negative_text: Tensor | None = None) -> Conditions:
        """Return the unconditional branch of guidance.

        Args:
            negative_text: (B, 77, text_dim) features of a negative prompt, which replace the empty text only.
        """
        clip_f, sync_f, text_f = self.empty_features(1)
        if negative_text is None:
            return self.preprocess_conditions(clip_f, sync_f, text_f).expand(batch_size)
        clip_f, sync_f = clip_f.expand(batch_size, -1, -1), sync_f.expand(batch_size, -1, -1)
        return self.preprocess_conditions(clip_f, sync_f, negative_text.expand(batch_size, -1, -1))

    # -- velocity -----------------------------------------------------------------------------------------------------

    def predict_flow(self, latent: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Return the velocity (B, N, C) at ``latent`` (B, N, C) and the times ``t`` (B,) in [0, 1].

        Raises:
            ValueError: the latents are not N frames long.
        """
        self._check_tokens("latents", latent, self.latent_seq_len)
        latent_rotary, clip_rotary, text_rotary = self._rotary_tables(latent.device)
        x = self.audio_input_proj(latent)  # (B, N, D)
        clip, text = conditions.clip_f, conditions.text_f
        pooled = self.global_cond_mlp(conditions.clip_f_c + conditions.text_f_c)
        global_c = (self.t_embed(t, pooled.dtype) + pooled)[:, None]  # (B, 1, D)
        extended_c = global_c + conditions.sync_f  # (B, N, D)
        for i, block in enumerate(self.joint_blocks):
            x, clip, text = self._run(
                i, block, x, clip, text, global_c, extended_c, latent_rotary, clip_rotary, text_rotary
            )
        for i, block in enumerate(self.fused_blocks, start=len(self.joint_blocks)):
            x = self._run(i, block, x, extended_c, latent_rotary)
        return self.final_layer(x, global_c)

    def tables(self) -> tuple[Tensor, ...]:
        """Return the tables that a pass at the lengths set reads; they may be forgotten when lengths change often."""
        device = self.latent_mean.device
        pairs = self._rotary_tables(device)
        return (
            *(table for pair in pairs for table in pair), self.t_embed.frequencies(device),
            nearest_index(self.sync_seq_len, self.latent_seq_len, device),
        )

    def _rotary_tables(self, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return the positions of latent, CLIP and text tokens."""
        head_dim = self.config.hidden_dim // self.config.num_heads
        return (
            rotary_table(self.latent_seq_len, head_dim, 1.0, device),
            rotary_table(self.clip_seq_len, head_dim, self.latent_seq_len / self.clip_seq_len, device),
            rotary_table(self.config.text_seq_len, head_dim, 0.0, device),
        )

    def forward(self, latent: Tensor, clip_f: Tensor, sync_f: Tensor, text_f: Tensor, t: Tensor) -> Tensor:
        """Return the velocity from raw features: :meth:`preprocess_conditions`, then :meth:`predict_flow`."""
        return self.predict_flow(latent, t, self.preprocess_conditions(clip_f, sync_f, text_f))

    def _run(self, index: int, block: nn.Module, *args: Tensor | tuple[Tensor, Tensor]) -> Any:
        """Return ``block(*args)``, computed again in the backward pass where :attr:`gradient_checkpointing` says so."""
        recomputed = self.gradient_checkpointing is True or index < self.gradient_checkpointing
        if recomputed and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=self.recompute_randomly,
                              context_fn=self._contexts)
        return block(*args)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return the contexts of a block's two forward passes: autocast comes back by itself in the second."""
        return nullcontext(), Widening() if self.matrix_dtype in HALF_TYPES else nullcontext()

    @property
    def matrix_dtype(self) -> torch.dtype:
        """Type in which the matrices are stored, see :func:`cast_frozen_`."""
        return self.clip_cond_proj.weight.dtype

    def computing_in(self, precision: torch.dtype) -> AbstractContextManager[Any]:
        """Return the context in which the network computes in ``precision``, whatever its matrices are stored in."""
        return computing_in(precision, self.matrix_dtype, self.latent_mean.device.type)

    @staticmethod
    def _check_tokens(what: str, x: Tensor, expected: int) -> None:
        if x.shape[1] != expected:
            raise UserError(f"{what} have {counted(x.shape[1], 'token')}, expected {expected}; see set_sequence")


def cast_frozen_(generator: Generator, dtype: torch.dtype) -> None:
    """Store the matrices of linear layers and convolutions in ``dtype``, in place, to save memory.

    Everything small stays float32: latent statistics, norms, empty features, position embeddings. Adapter weights keep
    their own type.
    """
    for module in generator.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            module.to(dtype)
