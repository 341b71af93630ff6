"""Waveform -> log-mel spectrogram, the form of a sound that the VAE and the vocoder were trained on.

    clamp -> reflect padding -> STFT magnitude -> Slaney filterbank -> logarithm with a floor

The 16 kHz models take log10, the 44.1 kHz models the natural logarithm; everything else differs in numbers only.
Source: MMAudio (arXiv:2412.15322), which follows BigVGAN (arXiv:2206.04658); M. Slaney, Auditory Toolbox (1998).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selva.models.config import MEL_CONFIGS, MelConfig
from selva.utils.errors import UserError
from selva.utils.text import counted

MAGNITUDE_EPS = 1e-9  # inside the square root, so that its gradient is finite in silence
MEL_FLOOR = 1e-5  # digital silence lands exactly here: -5 in log10, -11.51 in ln

LINEAR_HZ_PER_MEL = 200 / 3  # the Slaney scale is linear below the corner ...
CORNER_HZ = 1000.0
CORNER_MEL = CORNER_HZ / LINEAR_HZ_PER_MEL  # 15
LOG_STEP = np.log(6.4) / 27  # ... and logarithmic above it: 27 mel for a factor of 6.4


def hz_to_mel(hz: np.ndarray | float) -> np.ndarray:
    """Return the Slaney mel value of a frequency in Hz; same shape, float64."""
    hz = np.asarray(hz, dtype=np.float64)
    return np.where(
        hz < CORNER_HZ,
        hz / LINEAR_HZ_PER_MEL,
        CORNER_MEL + np.log(np.maximum(hz, CORNER_HZ) / CORNER_HZ) / LOG_STEP,
    )


def mel_to_hz(mel: np.ndarray | float) -> np.ndarray:
    """Return the frequency in Hz of a Slaney mel value; same shape, float64."""
    mel = np.asarray(mel, dtype=np.float64)
    return np.where(mel < CORNER_MEL, mel * LINEAR_HZ_PER_MEL, CORNER_HZ * np.exp(LOG_STEP * (mel - CORNER_MEL)))


def slaney_filterbank(config: MelConfig) -> np.ndarray:
    """Return (num_mels, n_fft // 2 + 1) float64 triangles over the STFT bins, each of area 1 over the frequency axis.

    The same bank as librosa's default. An HTK bank, or one of peak-1 triangles, shifts the log mel by about two
    standard deviations of what the VAE was trained on.
    """
    nyquist = config.sampling_rate / 2
    bins = np.linspace(0, nyquist, config.n_fft // 2 + 1)
    edges = mel_to_hz(np.linspace(hz_to_mel(0), hz_to_mel(nyquist), config.num_mels + 2))
    low, centre, high = (edges[i : i + config.num_mels, None] for i in range(3))  # each (num_mels, 1)
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (high - low))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # a table first made while extracting must still serve a later training step
def _tables(config: MelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the Hann window (n_fft,) and the filterbank (num_mels, n_fft // 2 + 1), float32 on ``device``."""
    window = torch.hann_window(config.n_fft, periodic=True, dtype=torch.float64).float()
    filterbank = torch.from_numpy(slaney_filterbank(config)).float()
    return window.to(device), filterbank.to(device)


class MelSpectrogram(nn.Module):
    """Log-mel spectrogram of the "16k" or the "44k" models, float32 whatever surrounds it.

    Half precision would destroy the quiet bands, and the FFT refuses it. The tables are therefore no buffers, which a
    cast of the module would round, and autocast is off inside.

    Raises:
        ValueError: unknown mode.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        if mode not in MEL_CONFIGS:
            raise UserError(f"unknown audio mode {mode!r}, expected one of {', '.join(MEL_CONFIGS)}")
        self.mode = mode
        self.config = MEL_CONFIGS[mode]

    def forward(self, waveform: Tensor) -> Tensor:
        """Return (B, num_mels, samples // hop_length) float32 log-mel bands.

        Args:
            waveform: (B, samples), mono, at the sampling rate of the mode; values outside [-1, 1] are clamped.

        Raises:
            ValueError: not two axes, or too few samples for one window.
        """
        with torch.autocast(waveform.device.type, enabled=False):
            magnitude = self.magnitudes(waveform)
            _, filterbank = _tables(self.config, waveform.device)
            mel = (filterbank @ magnitude).clamp(min=MEL_FLOOR)  # (B, num_mels, T)
            return mel.log10() if self.config.log10 else mel.log()

    def magnitudes(self, waveform: Tensor) -> Tensor:
        """Return the (B, n_fft // 2 + 1, samples // hop_length) float32 STFT magnitudes that the bands are sums of.

        Takes and raises what :meth:`forward` does.
        """
        cfg = self.config
        if waveform.ndim != 2 or waveform.shape[-1] < cfg.n_fft // 2:
            raise UserError(
                f"waveform is {tuple(waveform.shape)}, expected (batch, samples) with at least "
                f"{counted(cfg.n_fft // 2, 'sample')}"
            )
        with torch.autocast(waveform.device.type, enabled=False):
            window, _ = _tables(cfg, waveform.device)
            waveform = waveform.float().clamp(-1, 1)
            # This padding, without centring, gives exactly one frame per hop.
            margin = (cfg.n_fft - cfg.hop_length) // 2
            padded = F.pad(waveform[:, None], (margin, margin), mode="reflect")[:, 0]  # (B, samples + 2 margin)
            spectrum = torch.stft(
                padded, cfg.n_fft, cfg.hop_length, window=window, center=False, onesided=True, return_complex=True
            )  # (B, n_fft // 2 + 1, T)
            return (torch.view_as_real(spectrum).square().sum(-1) + MAGNITUDE_EPS).sqrt()
