"""Sizes of the networks; needs no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selva.models.vae_stats import BAND_MEAN
from selva.sequence import HOP_LENGTHS, SAMPLING_RATES, SYNC_SEGMENT_FRAMES
from selva.utils.errors import UserError
from selva.utils.text import counted

# Of the vocoder.
ACTIVATION_REACH = 5  # samples to either side that an anti-aliased activation looks at, both filters together
CONV_REACH = 3  # of the first and the last convolution, 7 wide


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of a generator; ``depth`` counts all blocks, of which the last ``fused_depth`` see latents only."""

    latent_dim: int
    hidden_dim: int
    depth: int
    fused_depth: int
    num_heads: int
    clip_dim: int = 1024
    sync_dim: int = 768
    text_dim: int = 1024
    mlp_ratio: float = 4.0
    latent_seq_len: int = 250
    clip_seq_len: int = 64
    sync_seq_len: int = 192
    text_seq_len: int = 77
    v2: bool = False

    def __post_init__(self) -> None:
        if self.hidden_dim % self.num_heads or (self.hidden_dim // self.num_heads) % 2:
            raise UserError(f"hidden_dim {self.hidden_dim} does not split into {self.num_heads} heads of even width")
        if not 0 <= self.fused_depth < self.depth:
            raise UserError(f"fused_depth is {self.fused_depth}, expected 0 to depth - 1 = {self.depth - 1}")


@dataclass(frozen=True)
class VideoEncoderConfig:
    """Size of a video encoder, with or without text; the defaults are the published sizes.

    Attributes:
        embed_dim: channels of a token and of a sync feature.
        depth: trunk blocks.
        num_heads: attention heads, in the trunk and after it.
        mlp_dim: hidden width of the trunk's MLPs.
        patch_size: pixels per side of a patch.
        temporal_patch: frames per patch.
        image_size: pixels per side of a frame.
        text_dim: channels of the text features (TextSynch only).
        num_sup_tokens: learned tokens in front of the text (TextSynch only).
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    patch_size: int = 16
    temporal_patch: int = 2
    image_size: int = 224
    text_dim: int = 768
    num_sup_tokens: int = 5

    def __post_init__(self) -> None:
        for whole, part in (("embed_dim", "num_heads"), ("image_size", "patch_size")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(
                    f"{whole} is {getattr(self, whole)}, expected a multiple of {part} ({getattr(self, part)})"
                )
        if SYNC_SEGMENT_FRAMES % self.temporal_patch:
            raise UserError(f"temporal_patch is {self.temporal_patch}, expected a divisor of {SYNC_SEGMENT_FRAMES}")
        if self.num_sup_tokens < 1:
            raise UserError(f"num_sup_tokens is {self.num_sup_tokens}, expected at least 1 (an empty text needs it)")

    @property
    def num_slots(self) -> int:
        """Time steps per segment, and sync features per segment."""
        return SYNC_SEGMENT_FRAMES // self.temporal_patch

    @property
    def num_patches(self) -> int:
        """Patches per time step."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class MelConfig:
    """Mel spectrogram of one family of models.

    Attributes:
        sampling_rate: audio samples per second.
        n_fft: samples per window, and length of the Fourier transform.
        hop_length: samples between two windows.
        num_mels: mel bands, from 0 Hz to half the sampling rate.
        log10: logarithm to the base 10 instead of the natural one.
    """

    sampling_rate: int
    n_fft: int
    hop_length: int
    num_mels: int
    log10: bool


MEL_CONFIGS = {
    "16k": MelConfig(SAMPLING_RATES["16k"], n_fft=1024, hop_length=HOP_LENGTHS["16k"], num_mels=80, log10=True),
    "44k": MelConfig(SAMPLING_RATES["44k"], n_fft=2048, hop_length=HOP_LENGTHS["44k"], num_mels=128, log10=False),
}


@dataclass(frozen=True)
class VAEConfig:
    """Size of a VAE.

    Attributes:
        mode: "16k" or "44k"; decides the mel bands and their statistics.
        hidden_dim: channels at the finest level; the deepest has four times as many.
        latent_dim: channels C of the latent.
    """

    mode: str
    hidden_dim: int
    latent_dim: int

    def __post_init__(self) -> None:
        if self.mode not in BAND_MEAN:
            raise UserError(f"unknown audio mode {self.mode!r}, expected one of {', '.join(BAND_MEAN)}")
        for name in ("hidden_dim", "latent_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def num_mels(self) -> int:
        return len(BAND_MEAN[self.mode])


@dataclass(frozen=True)
class VocoderConfig:
    """Size of a vocoder.

    Attributes:
        num_mels: mel bands of the input.
        upsample_rates: factor of every stage; their product is the hop length in samples.
        upsample_kernels: kernel size of every stage's transposed convolution.
        final_bias: the last convolution has a bias.
        final_tanh: the output is bounded by tanh; otherwise it is clamped to [-1, 1].
        initial_channels: channels before the first stage, halved by every stage.
        residual_kernels: kernel size of the residual blocks of a stage.
        residual_dilations: dilation of the successive layers of every residual block.
    """

    num_mels: int
    upsample_rates: tuple[int, ...]
    upsample_kernels: tuple[int, ...]
    final_bias: bool
    final_tanh: bool
    initial_channels: int = 1536
    residual_kernels: tuple[int, ...] = (3, 7, 11)
    residual_dilations: tuple[int, ...] = (1, 3, 5)

    def __post_init__(self) -> None:
        if len(self.upsample_rates) != len(self.upsample_kernels):
            raise UserError(
                f"{len(self.upsample_rates)} upsample_rates and {len(self.upsample_kernels)} upsample_kernels, "
                "expected one kernel for every rate"
            )
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernels, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise UserError(f"upsample kernel {kernel} at rate {rate}, expected the rate plus an even number")
        if self.initial_channels % 2 ** len(self.upsample_rates):
            raise UserError(
                f"initial_channels is {self.initial_channels}, expected a multiple of {2 ** len(self.upsample_rates)} "
                f"for {counted(len(self.upsample_rates), 'stage')}"
            )

    @property
    def hop_length(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.upsample_rates)

    @property
    def context_frames(self) -> int:
        """Mel frames on each side of a stretch on which its samples may depend.

        Counted backwards from the waveform: ``reach`` is how far, in samples of the current rate, one output sample
        looks to either side.
        """
        reach = CONV_REACH + ACTIVATION_REACH
        residual = max(
            sum((kernel - 1) // 2 * (dilation + 1) + 2 * ACTIVATION_REACH for dilation in self.residual_dilations)
            for kernel in self.residual_kernels
        )
        for rate, kernel in zip(reversed(self.upsample_rates), reversed(self.upsample_kernels), strict=True):
            reach += residual
            reach = -(-(reach + (kernel + rate) // 2 - 1) // rate)  # ceil; of the transposed convolution's two sides
        return reach + CONV_REACH


@dataclass(frozen=True)
class MelInversionConfig:
    """Settings of a mel inversion.

    Attributes:
        mode: "16k" or "44k"; decides the mel bands.
        hidden_dim: width of the network between bands and bins.
        num_steps: projections with which the phases are found.
    """

    mode: str = "16k"
    hidden_dim: int = 192
    num_steps: int = 32

    @property
    def mel(self) -> MelConfig:
        return MEL_CONFIGS[self.mode]

    @property
    def num_mels(self) -> int:
        return self.mel.num_mels

    @property
    def hop_length(self) -> int:
        """Audio samples per mel frame."""
        return self.mel.hop_length


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP model; the defaults are ViT-H/14 with QuickGELU as trained by DFN5B.

    ``image_size`` is that of the position table. The published features come from 384-pixel frames in this
    378-pixel tower, whose stride of 14 leaves 27 patches and ignores the last six rows and columns.
    ``byte_tokens`` replaces CLIP's word pieces by the bytes of the text, which need no vocabulary.
    """

    embed_dim: int = 1024
    quick_gelu: bool = True
    image_size: int = 378
    patch_size: int = 14
    vision_layers: int = 32
    vision_width: int = 1280
    vision_head_width: int = 80
    text_width: int = 1024
    text_heads: int = 16
    text_layers: int = 24
    context_length: int = 77
    vocab_size: int = 49_408
    byte_tokens: bool = False


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder with gated GELU; the defaults are FLAN-T5-base. ``byte_tokens`` as in ClipConfig."""

    vocab_size: int = 32_128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 12
    num_heads: int = 12
    relative_buckets: int = 32
    relative_max_distance: int = 128
    max_length: int = 512
    byte_tokens: bool = False
