"""Made-up clips of which only numbers exist, for tests of sets and their order."""

from __future__ import annotations

from pathlib import Path

import torch

from selva.data.dataset import ClipDataset, TrainingClip
from selva.sequence import sequence_config


def make_clip(name: str, seconds: float = 1.0, value: float = 1.0, has_video: bool = True) -> TrainingClip:
    sequence = sequence_config("16k", seconds)

    def full(*shape):
        return torch.full(shape, value)

    return TrainingClip(
        id=name, prompt="", audio_path=Path("none"), sequence=sequence, mean=full(sequence.latent_seq_len, 4),
        std=full(sequence.latent_seq_len, 4), clip_f=full(sequence.clip_seq_len, 3),
        sync_f=full(sequence.sync_seq_len, 3), text_f=full(7, 3), has_video=has_video,
    )


class WindowedSet(ClipDataset):
    """Clips that exist only as numbers; the mean of clip i, window w, is 100 i + w."""

    def __init__(self, windows, seconds=None):
        self.windows, self.seconds, self.loaded = windows, seconds or [1.0] * len(windows), []

    @property
    def ids(self):
        return [f"clip{i}" for i in range(len(self.windows))]

    def lengths(self, index):
        sequence = sequence_config("16k", self.seconds[index])
        return sequence.latent_seq_len, sequence.clip_seq_len, sequence.sync_seq_len

    def num_windows(self, index):
        return self.windows[index]

    def clip(self, index, window=0):
        self.loaded.append((index, window))
        return make_clip(self.ids[index], self.seconds[index], 100 * index + window)


class WordySet(WindowedSet):
    """Clips of one window with several prompts; prompt n of clip i has features of 10 i + n."""

    def __init__(self, prompts, seconds=None):
        super().__init__([1] * len(prompts), seconds)
        self.prompts = prompts

    def num_prompts(self, index):
        return self.prompts[index]

    def prompt(self, index, number):
        return f"prompt {number}", torch.full((7, 3), 10.0 * index + number)
