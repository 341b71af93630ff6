"""The one look of all pictures of sounds: magma, a mel axis in kHz, 70 dB from the brightest to black."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

COLOURS = "magma"
RANGE_DB = 70.0  # from the brightest colour to black
SILENCE_DB = -120.0  # level of digital silence, always black
NUM_PIXELS = 160  # of a spectrogram, up
LEVEL_LABEL = "level in dB of full scale"
TICKS_HZ = (100, 500, 1000, 2000, 4000, 8000, 16_000)


def power_spectrogram(samples: Tensor, window: Tensor, hop: int) -> Tensor:
    """Return the power (bins, frames) of mono sound (samples,), where a sine at full scale has 1.

    Args:
        window: (size,) of every frame, in the type of the samples, in which everything is computed.
        hop: samples from one frame to the next; the first begins with the sound, and only full frames count.
    """
    import torch

    spectrum = torch.stft(samples, len(window), hop, window=window, center=False, return_complex=True)
    return (spectrum.abs() * 2 / window.sum()).square()


def mel_levels(sound: Tensor, rate: int) -> np.ndarray:
    """Return (NUM_PIXELS, frames) dB of full scale of (samples,), evenly spaced on the mel scale up to half the rate.

    The first row is the lowest. A row shows the loudest bin that it covers, or what lies at its middle where it covers
    none.
    """
    import numpy as np
    import torch

    size = 1024 if rate < 32_000 else 2048
    samples = torch.nn.functional.pad(sound.double(), (size // 2, size // 2))
    power = power_spectrogram(samples, torch.hann_window(size, dtype=torch.float64), size // 4)  # (bins, frames)
    edges = from_mel(np.linspace(0, to_mel(rate / 2), NUM_PIXELS + 1)) / (rate / 2) * (power.shape[0] - 1)
    image = power.new_empty(NUM_PIXELS, power.shape[1])
    for pixel, (low, high) in enumerate(pairwise(edges)):
        first, last = math.ceil(low), math.floor(high)
        if last >= first:
            image[pixel] = power[first : last + 1].amax(dim=0)
        else:
            below, share = math.floor(low), (low + high) / 2 - math.floor(low)
            image[pixel] = (1 - share) * power[below] + share * power[min(below + 1, len(power) - 1)]
    return 10 * np.log10(image.numpy() + 10 ** (SILENCE_DB / 10))


def draw_levels(axes: Any, levels: np.ndarray, seconds: float, rate: int, loudest: float, size: float = 8,
                unit: str = "") -> Any:
    """Draw what :func:`mel_levels` gives on axes with both units; return the image.

    Args:
        seconds: length of the sound. loudest: level of the brightest colour. size: of the letters, points.
        unit: stands behind every frequency, where the axis has no room for its name.
    """
    loudest = max(loudest, SILENCE_DB + RANGE_DB)
    image = axes.imshow(levels, origin="lower", aspect="auto", extent=(0, seconds, 0, NUM_PIXELS), cmap=COLOURS,
                        vmin=loudest - RANGE_DB, vmax=loudest, interpolation="nearest")
    shown = [hertz for hertz in TICKS_HZ if hertz <= rate / 2]
    axes.set_yticks([float(to_mel(hertz) / to_mel(rate / 2) * NUM_PIXELS) for hertz in shown],
                    [f"{hertz / 1000:g}{unit}" for hertz in shown])
    axes.set_ylabel("" if unit else "kHz", fontsize=size, labelpad=2)
    axes.set_xlabel("seconds", fontsize=size, labelpad=2)
    axes.tick_params(labelsize=size, length=2, pad=2)
    return image


def to_mel(hertz: Any) -> Any:
    """Return mel for Hz (O'Shaughnessy)."""
    import numpy as np

    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def from_mel(mel: Any) -> Any:
    """Return Hz for mel."""
    import numpy as np

    return 700 * (10 ** (np.asarray(mel) / 2595) - 1)
