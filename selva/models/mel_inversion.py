"""Log-mel spectrogram -> waveform without a vocoder: magnitudes by a small network, phases by iteration.

    mel (B, bands, T) -> magnitudes (B, bins, T) -> phases that fit together -> (B, 1, T * hop)

A mel band is a sum over bins. The magnitudes that the bands say least about are first found without training, as the
non-negative ones with the right sums; a network then moves energy between the bins of a band, which sharpens tones.
Phases are found by projecting to and fro between spectra of these magnitudes and spectra of waveforms.
Source: Griffin and Lim (1984); the momentum of Perraudin et al. (WASPAA 2013); multiplicative updates of Lee and Seung.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from selva.models.blocks import load_strict_
from selva.models.config import MEL_CONFIGS, MelInversionConfig
from selva.models.mel import MEL_FLOOR, slaney_filterbank
from selva.utils.errors import UserError

MOMENTUM = 0.99
SUM_STEPS = 30  # multiplicative updates towards magnitudes with the right sums
SILENT = 1.2 * MEL_FLOOR  # a band this low is silent; its value is the floor, not a measurement
PHASE_SEED = 0


class MelInversion(nn.Module):
    """Mel inversion as above, in float32. The last layer starts at zero, so that a fresh network changes nothing."""

    def __init__(self, config: MelInversionConfig) -> None:
        super().__init__()
        self.config = config
        bins, width = config.mel.n_fft // 2 + 1, config.hidden_dim
        self.sharpen = nn.Sequential(
            nn.Conv1d(config.num_mels, width, 3, padding=1), nn.GELU(),
            nn.Conv1d(width, width, 3, padding=1), nn.GELU(),
            nn.Conv1d(width, bins, 1),
        )
        for parameter in self.sharpen[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, mel: Tensor) -> Tensor:
        """Return the waveform (B, 1, T * hop_length) in [-1, 1], float32.

        Args:
            mel: (B, num_mels, T) log-mel spectrogram of the mode.

        Raises:
            ValueError: another number of bands, or no frames.
        """
        if mel.ndim != 3 or mel.shape[1] != self.config.num_mels or mel.shape[2] < 1:
            raise UserError(f"mel is {tuple(mel.shape)}, expected (batch, {self.config.num_mels}, frames)")
        with torch.autocast(mel.device.type, enabled=False):
            return self._waveform(self.magnitudes(mel.float()), mel.shape[2]).clamp(-1, 1)[:, None]

    def in_chunks(self, mel: Tensor, chunk_frames: int) -> Tensor:
        """Return the result of :meth:`forward`. Phases depend on the whole, and a frame takes little memory."""
        if chunk_frames < 1:
            raise UserError(f"chunk_frames is {chunk_frames}, expected at least 1")
        return self(mel)

    def magnitudes(self, mel: Tensor) -> Tensor:
        """Return the STFT magnitudes (B, bins, T) of a log-mel spectrogram (B, num_mels, T)."""
        plain = self.plain_magnitudes(mel)
        gain = self.sharpen(mel.to(self.sharpen.get_parameter("0.weight").dtype)).float()
        return plain * gain.clamp(-6, 6).exp()

    def plain_magnitudes(self, mel: Tensor) -> Tensor:
        """Return non-negative magnitudes (B, bins, T) whose sums over the bands are right."""
        bank, inverse, square = _tables(self.config.mode, mel.device)
        bands = torch.pow(10.0, mel) if self.config.mel.log10 else mel.exp()
        bands = torch.where(bands <= SILENT, torch.zeros_like(bands), bands)
        x = (inverse @ bands).clamp(min=0) + 1e-3 * bands.mean(1, keepdim=True)
        wanted = bank.T @ bands
        for _ in range(SUM_STEPS):
            x = x * wanted / (square @ x + 1e-8)
        return x

    def _waveform(self, magnitudes: Tensor, frames: int) -> Tensor:
        """Return (B, T * hop) with roughly these magnitudes.

        Mel frames are centred half a hop later than those of a centred STFT, so one frame is added at either end and
        half a hop cut off.
        """
        cfg = self.config.mel
        hop, window = cfg.hop_length, torch.hann_window(cfg.n_fft, device=magnitudes.device)
        magnitudes = torch.cat((magnitudes[..., :1], magnitudes, magnitudes[..., -1:]), dim=-1)
        total = hop * (frames + 1)

        def waveform(spectrum: Tensor) -> Tensor:
            return torch.istft(spectrum, cfg.n_fft, hop, window=window, length=total)

        rng = torch.Generator().manual_seed(PHASE_SEED)
        phases = 2 * torch.pi * torch.rand(magnitudes.shape[1:], generator=rng).to(magnitudes.device)
        direction = torch.polar(torch.ones_like(magnitudes), phases.expand_as(magnitudes))
        before = torch.zeros_like(direction)
        for _ in range(self.config.num_steps):
            rebuilt = torch.stft(
                waveform(magnitudes * direction), cfg.n_fft, hop, window=window, pad_mode="constant",
                return_complex=True,
            )
            direction, before = rebuilt - MOMENTUM / (1 + MOMENTUM) * before, rebuilt
            direction = direction / (direction.abs() + 1e-9)
        return waveform(magnitudes * direction)[:, hop // 2 : hop // 2 + hop * frames]

    def load_published(self, state_dict: Mapping[str, Tensor]) -> MelInversion:
        """Load a state dict strictly and return self.

        Raises:
            ValueError: missing or unexpected keys, or other shapes; names them.
        """
        load_strict_(self, state_dict, f"mel inversion with {self.config.num_mels} mel bands")
        return self


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _tables(mode: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the filterbank (bands, bins), its pseudo-inverse (bins, bands) and its square (bins, bins), float32."""
    bank = torch.from_numpy(slaney_filterbank(MEL_CONFIGS[mode]))
    inverse, square = torch.linalg.pinv(bank), bank.T @ bank
    return bank.float().to(device), inverse.float().to(device), square.float().to(device)
