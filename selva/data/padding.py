"""Silence after sound that is shorter than its features: which latents are of it, and what the model sees in its place.

    sound of 2 s, features of 8 s    |######..................|    # sound   . zeros, appended to the waveform
    spectrogram, VAE                 |#####|..................|    latents whose spectrogram holds sound only | padding

A model that is trained on the padding learns that sounds end in silence. Training therefore leaves these latents out of
the loss, and gives the network the latent of digital silence there, the same in every clip, so that nothing but the
sound decides the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selva.sequence import LATENT_DOWNSAMPLE, SHORTEST_SEC, SequenceConfig
from selva.utils.device import to_device

# The sound of a video may end a little before its pictures. So much silence is appended without a word and trained on.
MAX_AUDIO_SHORTFALL_SEC = 0.25
# A window of the spectrogram is four hops long and its middle is that of its hop, so the last one of a latent frame
# reaches this many hops beyond the end of the frame.
OVERHANG_HOPS = 1.5


@dataclass(frozen=True)
class Padding:
    """The padding of clips of one length.

    Attributes:
        mask: (..., N) bool, True where a latent frame is of padding.
        silence: (C,) latent of digital silence, as the VAE gives it.
    """

    mask: Tensor
    silence: Tensor

    def to(self, device: torch.device) -> Padding:
        return Padding(to_device(self.mask, device), to_device(self.silence, device))


def join_paddings(paddings: Sequence[Padding | None], num_frames: int) -> Padding | None:
    """Return the padding of a batch from those of its clips, (N,) each; None where no clip has any."""
    found = next((padding for padding in paddings if padding is not None), None)
    if found is None:
        return None
    nothing = torch.zeros(num_frames, dtype=torch.bool, device=found.mask.device)
    return Padding(torch.stack([nothing if p is None else p.mask for p in paddings]), found.silence)


def num_sound_frames(sound_sec: float, start_sec: float, sequence: SequenceConfig) -> int:
    """Return the number of latent frames of a window whose spectrogram holds nothing but sound; all if it is full.

    A frame counts if the sound covers every window of its spectrogram. What the convolutions and the attention of the
    VAE bring from farther away cannot be told apart; there it is digital silence, in every padded clip.

    Args:
        sound_sec: length of the whole sound. start_sec: where the window begins in it.

    Returns:
        0 to ``latent_seq_len``; all of them where no more than ``MAX_AUDIO_SHORTFALL_SEC`` is missing, and at least
        one where the window begins within the sound.
    """
    left_sec = sound_sec - start_sec
    if left_sec >= sequence.num_audio_frames / sequence.sampling_rate - MAX_AUDIO_SHORTFALL_SEC:
        return sequence.latent_seq_len
    if left_sec <= 0:
        return 0
    hops = left_sec * sequence.sampling_rate / sequence.hop_length
    return max(1, int((hops - OVERHANG_HOPS) / LATENT_DOWNSAMPLE))


def windows_with_sound(starts_sec: Sequence[float], sound_sec: float) -> list[int]:
    """Return the numbers of the windows of a clip to train on: the first, and others with 0.64 s of sound at least."""
    return [i for i, start in enumerate(starts_sec) if i == 0 or sound_sec - start >= SHORTEST_SEC]
