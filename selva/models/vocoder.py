"""Log-mel spectrogram -> waveform: BigVGAN (16 kHz) and BigVGAN-v2 (44.1 kHz).

    mel (B, bands, T) -> transposed convolutions, each followed by the mean of three residual blocks -> (B, 1, T * hop)

Published files hold every convolution as magnitude and direction (weight norm); :meth:`Vocoder.load_published` joins
the two, so the network itself has plain weights.
Source: BigVGAN (Lee et al., arXiv:2206.04658); anti-aliased activation after StyleGAN3 (arXiv:2106.12423).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selva.models.blocks import load_strict_
from selva.models.config import ACTIVATION_REACH, VocoderConfig
from selva.utils.errors import UserError

FILTER_TAPS = 12
FILTER_CUTOFF = 0.25  # of the doubled sampling rate, the Nyquist frequency of the original one
FILTER_HALF_WIDTH = 0.3  # of the transition band, relative to the original sampling rate
# Values per chunk of an activation on CPUs: few enough that all steps reuse the same memory instead of asking for
# new pages, which took up to two thirds of the time of long sounds, and enough to hide the cost of a call.
ACTIVATION_CHUNK = 2**18
# With channels last, a convolution first copies its weights to that layout. A short input is rearranged instead: to the
# time axis, to oneDNN's blocks, and both ways back.
LAYOUT_PASSES = 4
FILTER_SUFFIXES = (".upsample.filter", ".downsample.lowpass.filter")
# The two spellings of weight norm in published files: (magnitude g, direction v).
WEIGHT_NORM_SUFFIXES = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # taps first made while sampling must still serve a later training step
def antialias_filter(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the (12,) taps of the Kaiser-windowed sinc low-pass around every activation; they sum to 1.

    The window's beta follows Kaiser's formula for the attenuation that 12 taps reach (scipy.signal.kaiser_atten).
    """
    attenuation_db = 2.285 * (FILTER_TAPS // 2 - 1) * math.pi * 4 * FILTER_HALF_WIDTH + 7.95
    beta = 0.1102 * (attenuation_db - 8.7)  # the branch of the formula for more than 50 dB; here 51.02
    window = torch.kaiser_window(FILTER_TAPS, periodic=False, beta=beta, dtype=torch.float64)
    time = torch.arange(FILTER_TAPS, dtype=torch.float64) - (FILTER_TAPS - 1) / 2
    taps = window * torch.sinc(2 * FILTER_CUTOFF * time)
    return (taps / taps.sum()).to(device=device, dtype=dtype)


def upsample_twice(x: Tensor) -> Tensor:
    """Return (B, C, 2 T - 10), ``x`` (B, C, T) at twice the sampling rate, less the 5 at each end that need more."""
    channels = x.shape[1]
    taps = 2 * antialias_filter(x.device, x.dtype).expand(channels, 1, 1, -1)  # 2: every other input sample is a zero
    return F.conv_transpose2d(x[:, :, None], taps, stride=(1, 2), padding=(0, 10), groups=channels)[:, :, 0]


def downsample_twice(x: Tensor) -> Tensor:
    """Return (B, C, T), ``x`` (B, C, 2 T + 10) at half the sampling rate, of which 5 samples are around each end."""
    channels = x.shape[1]
    taps = antialias_filter(x.device, x.dtype).expand(channels, 1, 1, -1)
    return F.conv2d(x[:, :, None], taps, stride=(1, 2), groups=channels)[:, :, 0]


def hold_edges(x: Tensor, left: int, right: int) -> Tensor:
    """Return (B, C, left + T + right), the first and the last sample of ``x`` (B, C, T) repeated."""
    if left == right == 0:
        return x
    return F.pad(x[:, :, None], (left, right, 0, 0), mode="replicate")[:, :, 0]


def fold_weight_norm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a new state dict in which every pair of magnitude g and direction v became ``g v / |v|``, in float32.

    The norm runs over all axes but the first, which for a transposed convolution is the input channel. A half without
    its other half stays as it is, so that strict loading names it.
    """
    folded = dict(state_dict)
    for g_suffix, v_suffix in WEIGHT_NORM_SUFFIXES:
        for v_name in [name for name in folded if name.endswith(v_suffix)]:
            layer = v_name.removesuffix(v_suffix)
            if layer + g_suffix not in folded:
                continue
            g, v = folded.pop(layer + g_suffix).float(), folded.pop(v_name).float()
            folded[layer + ".weight"] = v * (g / torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True))
    return folded


class SnakeBeta(nn.Module):
    """x + sin(alpha x)^2 / beta per channel, alpha and beta stored as logarithms (BigVGAN, section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        frequency, magnitude = self.alpha.exp()[:, None], self.beta.exp()[:, None]  # each (C, 1)
        return torch.addcmul(x, (x * frequency).sin_().square_(), 1 / (magnitude + 1e-9))


class AntiAliasedActivation(nn.Module):
    """SnakeBeta at twice the sampling rate, so that the harmonics it makes do not fold back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = SnakeBeta(channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self._stretch(x, 0, x.shape[-1])
        length = max(1, ACTIVATION_CHUNK // (x.shape[0] * x.shape[1]))
        starts = range(0, x.shape[-1], length)
        # Each a (B, T', C) view for the concatenation, which would otherwise lose the layout with channels last.
        chunks = [self._stretch(x, start, min(start + length, x.shape[-1])).mT for start in starts]
        return torch.cat(chunks, dim=1).mT

    def _stretch(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return samples start to stop. Each filter takes those outside of the whole sound as its edge repeated."""
        end, reach = x.shape[-1], ACTIVATION_REACH
        left, right = max(0, reach - start), max(0, stop + reach - end)
        fine = upsample_twice(hold_edges(x[..., max(0, start - reach) : stop + reach], left, right))
        left, right = max(0, reach - 2 * start), max(0, 2 * stop + reach - 2 * end)
        fine = hold_edges(fine[..., left : fine.shape[-1] - right], left, right)
        return downsample_twice(self.act(fine))


def is_short(x: Tensor, weight: Tensor) -> bool:
    """Return True if rearranging ``x``, channels last, costs less than copying ``weight`` to that layout."""
    return x.stride(1) == 1 and LAYOUT_PASSES * x.numel() < weight.numel()


class Conv1d(nn.Conv1d):
    """A convolution that keeps the layout of its input in memory, where PyTorch's makes the time axis the inner one."""

    def forward(self, x: Tensor) -> Tensor:
        if is_short(x, self.weight):
            return super().forward(x).mT.contiguous().mT
        assert not isinstance(self.padding, str)  # "same" and "valid" are not used here
        padding, dilation = (0, *self.padding), (1, *self.dilation)
        x, weight = x[:, :, None], self.weight[:, :, None]
        return F.conv2d(x, weight, self.bias, padding=padding, dilation=dilation)[:, :, 0]


class ConvTranspose1d(nn.ConvTranspose1d):
    """The same for a transposed convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if is_short(x, self.weight):
            return super().forward(x).mT.contiguous().mT
        assert not isinstance(self.padding, str)
        stride, padding = (1, *self.stride), (0, *self.padding)
        x, weight = x[:, :, None], self.weight[:, :, None]
        return F.conv_transpose2d(x, weight, self.bias, stride=stride, padding=padding)[:, :, 0]


class AMPBlock(nn.Module):
    """BigVGAN's residual block on (B, C, T): layers of two convolutions, the first of each dilated (section 3.2)."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]) -> None:
        super().__init__()

        def convolution(dilation: int) -> Conv1d:
            padding = (kernel_size - 1) * dilation // 2
            return Conv1d(channels, channels, kernel_size, dilation=dilation, padding=padding)

        self.convs1 = nn.ModuleList(convolution(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(convolution(1) for _ in dilations)
        self.activations = nn.ModuleList(AntiAliasedActivation(channels) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor) -> Tensor:
        layers = zip(self.activations[::2], self.convs1, self.activations[1::2], self.convs2, strict=True)
        for first_activation, first_conv, second_activation, second_conv in layers:
            change = second_conv(second_activation(first_conv(first_activation(x))))
            x = change.add_(x)
        return x


class Vocoder(nn.Module):
    """A BigVGAN generator with plain weights."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.initial_channels
        self.conv_pre = Conv1d(config.num_mels, channels, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()  # all stages in one list, as in the published names
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernels, strict=True):
            up = ConvTranspose1d(channels, channels // 2, kernel, stride=rate, padding=(kernel - rate) // 2)
            self.ups.append(nn.ModuleList((up,)))  # a list of one: the published name is ups.{i}.0
            channels //= 2
            for size in config.residual_kernels:
                self.resblocks.append(AMPBlock(channels, size, config.residual_dilations))
        self.activation_post = AntiAliasedActivation(channels)
        self.conv_post = Conv1d(channels, 1, 7, padding=3, bias=config.final_bias)

    def forward(self, mel: Tensor) -> Tensor:
        """Return the waveform (B, 1, T * hop_length) in [-1, 1], in the dtype of the network.

        Args:
            mel: (B, num_mels, T) log-mel spectrogram: log10 for the 16 kHz network, ln for the 44.1 kHz one.

        Raises:
            ValueError: another number of bands, or no frames.
        """
        if mel.ndim != 3 or mel.shape[1] != self.config.num_mels or mel.shape[2] < 1:
            raise UserError(f"mel is {tuple(mel.shape)}, expected (batch, {self.config.num_mels}, frames)")
        blocks_per_stage = len(self.config.residual_kernels)
        x = mel.to(self.conv_pre.weight.dtype)
        if x.device.type == "cpu":
            x = x.mT.contiguous().mT  # channels last: no convolution has to rearrange its input and its output
        x = self.conv_pre(x)  # (B, initial_channels, T)
        for stage in range(len(self.ups)):
            x = self.ups.get_submodule(f"{stage}.0")(x)  # (B, half the channels, rate times the frames)
            blocks = self.resblocks[stage * blocks_per_stage : (stage + 1) * blocks_per_stage]
            x = sum(block(x) for block in blocks) / blocks_per_stage
        x = self.conv_post(self.activation_post(x))  # (B, 1, T * hop_length)
        return x.tanh() if self.config.final_tanh else x.clamp(-1, 1)

    def in_chunks(self, mel: Tensor, chunk_frames: int) -> Tensor:
        """Return the result of :meth:`forward`, computed ``chunk_frames`` mel frames at a time to need less memory.

        Each chunk is given at least its ``context_frames`` on both sides, so nothing but rounding differs from the
        whole. Only the ends of ``mel`` are padded, as in the whole. All chunks are computed at one length, and the
        result is allocated first: so the memory of one chunk serves the next.
        """
        if chunk_frames < 1:
            raise UserError(f"chunk_frames is {chunk_frames}, expected at least 1")
        hop, context, total = self.config.hop_length, self.config.context_frames, mel.shape[-1]
        length = min(total, chunk_frames + 2 * context)
        waveform = torch.empty(len(mel), 1, total * hop, dtype=self.conv_pre.weight.dtype, device=mel.device)
        for start in range(0, total, chunk_frames):
            stop = min(start + chunk_frames, total)
            left = min(max(0, start - context), total - length)
            chunk = self(mel[..., left : left + length])
            waveform[..., start * hop : stop * hop] = chunk[..., (start - left) * hop : (stop - left) * hop]
        return waveform

    def load_published(self, state_dict: Mapping[str, Any]) -> Vocoder:
        """Load the raw tensors of a published checkpoint and return self.

        Weight norm is folded whichever of its two spellings the file uses; a file with plain weights loads as it is.
        The stored low-pass filters are left out, they are what :func:`antialias_filter` computes. ``state_dict`` is
        left as it was.

        Args:
            state_dict: the tensors, or the content of a published file, which holds them under "generator".

        Raises:
            ValueError: missing or unexpected keys, or other shapes; names them.
        """
        state_dict = state_dict.get("generator", state_dict)
        tensors = {name: tensor for name, tensor in state_dict.items() if not name.endswith(FILTER_SUFFIXES)}
        load_strict_(self, fold_weight_norm(tensors), f"vocoder with {self.config.num_mels} mel bands")
        return self
