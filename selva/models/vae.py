"""Log-mel spectrogram <-> latent: a 1-D variational autoencoder whose layers preserve magnitude.

    encode:  mel (B, bands, T)  -> mean, std, each (B, C, T // 2)
    decode:  latent (B, C, N)   -> mel (B, bands, 2 N)

Every sum is rescaled, every activation divided by its expected magnitude, every convolution has rows of unit norm and
no bias. Published files hold the weights as they were before that normalisation; :meth:`VAE.load_published` applies it.
Source: MMAudio (arXiv:2412.15322); the magnitude-preserving layers are those of EDM2 (Karras et al., arXiv:2312.02696).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selva.models.blocks import load_strict_
from selva.models.config import VAEConfig
from selva.models.vae_stats import BAND_MEAN, BAND_STD
from selva.utils.errors import UserError

EPS = 1e-4  # added to a root mean square, not inside the root
SILU_RMS = 0.596  # root mean square of silu(x) for normal x
RESIDUAL_WEIGHT = 0.3  # share of the branch in a residual sum, EDM2 eq. 88
MAX_ACTIVATION = 256.0
LOG_VARIANCE_RANGE = (-30.0, 20.0)
WIDTH_MULTIPLES = (1, 2, 4)  # channels of level 0, 1, 2 in units of hidden_dim
DATA_BUFFERS = ("data_mean", "data_std")


def normalize_rows(weight: Tensor) -> Tensor:
    """Return a convolution weight whose rows have unit norm, computed and returned in float32.

    Once and only once between a published file and a network: the small EPS shrinks the rows at every application,
    by up to one per cent where they are long.

    Args:
        weight: (out, in, k).
    """
    weight = weight.float()
    fan_in = weight[0].numel()
    rms = torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True) / fan_in**0.5  # (out, 1, 1)
    return weight / (EPS + rms) / fan_in**0.5


def pixel_norm(x: Tensor) -> Tensor:
    """Return ``x`` (B, C, ...) divided by its root mean square over the channels; statistics in float32."""
    rms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32) / x.shape[1] ** 0.5
    return (x.float() / (EPS + rms)).to(x.dtype)


def magnitude_silu(x: Tensor) -> Tensor:
    """Return SiLU, scaled so that normal input gives output of unit magnitude."""
    return F.silu(x) / SILU_RMS


def magnitude_sum(shortcut: Tensor, branch: Tensor) -> Tensor:
    """Return the weighted sum of two tensors of unit magnitude, rescaled to unit magnitude (EDM2 eq. 88)."""
    total = (1 - RESIDUAL_WEIGHT) * shortcut + RESIDUAL_WEIGHT * branch
    return total / ((1 - RESIDUAL_WEIGHT) ** 2 + RESIDUAL_WEIGHT**2) ** 0.5


def limit(x: Tensor) -> Tensor:
    """Return ``x`` clamped to what half precision can hold comfortably."""
    return x.clamp(-MAX_ACTIVATION, MAX_ACTIVATION)


class Conv(nn.Conv1d):
    """Convolution along time without bias, "same" padding, rows of unit norm from the start."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(normalize_rows(torch.randn_like(self.weight)))


class ResidualBlock(nn.Module):
    """(B, in, T) -> (B, out, T). The shortcut carries the normalised input, not the input itself."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(in_channels, out_channels, 3)
        self.conv2 = Conv(out_channels, out_channels, 3)
        self.nin_shortcut = Conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        x = pixel_norm(x)
        branch = self.conv2(magnitude_silu(self.conv1(magnitude_silu(x))))
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return magnitude_sum(shortcut, branch)


class Attention(nn.Module):
    """Single-head attention over time on (B, C, T); q, k and v are normalised per position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = Conv(channels, 3 * channels, 1)
        self.proj_out = Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The published rows interleave q, k and v per channel.
        qkv = pixel_norm(self.qkv(x).unflatten(1, (-1, 3)))  # (B, C, 3, T)
        q, k, v = qkv.permute(2, 0, 3, 1)[:, :, None]  # each (B, 1 head, T, C)
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].mT  # (B, C, T)
        return magnitude_sum(x, self.proj_out(attended))


class Downsample(nn.Module):
    """(B, C, T) -> (B, C, T // 2): the mean of two frames; an odd last frame is lost."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, 1)
        self.conv2 = Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.avg_pool1d(self.conv1(x), 2))


class Upsample(nn.Module):
    """(B, C, N) -> (B, C, 2 N): every frame twice, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=-1))


class Level(nn.Module):
    """Residual blocks at one width, then perhaps a change of the frame rate."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, downsample: bool = False, upsample: bool = False
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(*pair) for pair in pairwise(widths))
        self.downsample = Downsample(out_channels) if downsample else None
        self.upsample = Upsample(out_channels) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = limit(block(x))
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the deepest level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return limit(self.block_2(self.attn_1(self.block_1(x))))


class Encoder(nn.Module):
    """Normalised mel (B, bands, T) -> (B, 2 C, T // 2), mean and log variance along the channels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        fine, middle, deep = (config.hidden_dim * multiple for multiple in WIDTH_MULTIPLES)
        self.conv_in = Conv(config.num_mels, fine, 3)
        self.down = nn.ModuleList((
            Level(fine, fine, num_blocks=2, downsample=True),
            Level(fine, middle, num_blocks=2),
            Level(middle, deep, num_blocks=2),
        ))
        self.mid = Middle(deep)
        self.conv_out = Conv(deep, 2 * config.latent_dim, 3)
        self.learnable_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(magnitude_silu(self.mid(x))) * (1 + self.learnable_gain)


class Decoder(nn.Module):
    """Latent (B, C, N) -> normalised mel (B, bands, 2 N)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        fine, middle, deep = (config.hidden_dim * multiple for multiple in WIDTH_MULTIPLES)
        self.conv_in = Conv(config.latent_dim, deep, 3)
        self.mid = Middle(deep)
        # The index is the level, as in the encoder; the decoder runs through them from the deepest one.
        self.up = nn.ModuleList((
            Level(middle, fine, num_blocks=3),
            Level(deep, middle, num_blocks=3, upsample=True),
            Level(deep, deep, num_blocks=3),
        ))
        self.conv_out = Conv(fine, config.num_mels, 3)
        self.learnable_gain = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(magnitude_silu(x)) * (1 + self.learnable_gain)


class VAE(nn.Module):
    """The autoencoder with its band statistics. Latents are channel-first here; the generator wants (B, N, C).

    The weights in memory, and so in ``state_dict()``, are always the normalised ones: save and restore a network with
    ``state_dict`` and ``load_state_dict``, read a published file with :meth:`load_published`.
    """

    data_mean: Tensor
    data_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("data_mean", torch.tensor(BAND_MEAN[config.mode])[None, :, None])  # (1, bands, 1)
        self.register_buffer("data_std", torch.tensor(BAND_STD[config.mode])[None, :, None])  # (1, bands, 1)
        self.encoder: Encoder | None = Encoder(config)
        self.decoder: Decoder | None = Decoder(config)

    def encode(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the posterior, each (B, C, T // 2), in the dtype of the network.

        Args:
            mel: (B, bands, T) log-mel spectrogram of the mode, T at least 2; an odd last frame is lost.

        Raises:
            ValueError: another number of bands, or fewer than two frames.
            RuntimeError: the encoder was dropped.
        """
        if self.encoder is None:
            raise RuntimeError("this VAE has no encoder: drop_encoder() was called")
        if mel.ndim != 3 or mel.shape[1] != self.config.num_mels or mel.shape[2] < 2:
            raise UserError(f"mel is {tuple(mel.shape)}, expected (batch, {self.config.num_mels}, at least 2 frames)")
        normalized = (mel.to(self.data_mean.dtype) - self.data_mean) / self.data_std
        mean, log_variance = self.encoder(normalized).chunk(2, dim=1)  # each (B, C, T // 2)
        return mean, (0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)).exp()

    def decode(self, z: Tensor) -> Tensor:
        """Return the log-mel spectrogram (B, bands, 2 N), in the dtype of the network.

        Args:
            z: (B, C, N) latents as :meth:`encode` returns them, not normalised.

        Raises:
            ValueError: another number of channels, or no frames.
            RuntimeError: the decoder was dropped.
        """
        if self.decoder is None:
            raise RuntimeError("this VAE has no decoder: drop_decoder() was called")
        if z.ndim != 3 or z.shape[1] != self.config.latent_dim or z.shape[2] < 1:
            raise UserError(f"latent is {tuple(z.shape)}, expected (batch, {self.config.latent_dim}, frames)")
        return self.decoder(z.to(self.data_mean.dtype)) * self.data_std + self.data_mean

    def drop_encoder(self) -> VAE:
        """Free the encoder, and return self: generating needs only the decoder."""
        self.encoder = None
        return self

    def drop_decoder(self) -> VAE:
        """Free the decoder, and return self: preparing training data needs only the encoder."""
        self.decoder = None
        return self

    def load_published(self, state_dict: Mapping[str, Tensor]) -> VAE:
        """Load the raw tensors of a published checkpoint, normalising every convolution, and return self.

        The band statistics of the checkpoint replace the built-in ones; a state dict without them keeps those. The
        keys of a dropped half are ignored. ``state_dict`` is left as it was.

        Raises:
            ValueError: missing or unexpected keys, or other shapes; names them.
        """
        dropped = tuple(f"{half}." for half in ("encoder", "decoder") if getattr(self, half) is None)
        tensors = {name: getattr(self, name) for name in DATA_BUFFERS}
        for name, tensor in state_dict.items():
            if not name.startswith(dropped):
                is_conv = tensor.ndim == 3 and name.endswith(".weight")
                tensors[name] = normalize_rows(tensor) if is_conv else tensor
        load_strict_(self, tensors, f"{self.config.mode} VAE")
        return self
