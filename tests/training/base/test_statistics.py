"""Statistics of latents: the reference's numbers, in pieces, of the video sets alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from selva.training.base import statistics
from selva.training.base.statistics import latent_statistics


def rows_of(values: torch.Tensor, video: bool = True) -> Any:
    """Return a stand-in for a memmap whose posterior means are ``values`` (n, N, C)."""
    rows = {"mean": values.numpy()}

    class Rows(SimpleNamespace):
        def __len__(self) -> int:
            return len(values)

    return Rows(rows=rows, has_video=video)


def test_the_numbers_of_the_reference(golden, monkeypatch):
    case = golden("base_training")
    latents = case.inputs()["stats_latents"]
    for chunk in (256, 4, 1):
        monkeypatch.setattr(statistics, "CHUNK", chunk)
        mean, std = latent_statistics([rows_of(latents)])
        assert mean.shape == std.shape == (1, 1, 20) and mean.dtype == torch.float32
        case.check("latent/mean", mean[0, 0])
        case.check("latent/std", std[0, 0])


def test_all_video_sets_count_and_sets_of_sound_only_where_there_are_no_others():
    rng = torch.Generator().manual_seed(0)
    first, second, sound = (torch.randn(n, 5, 3, generator=rng) * n + 100 for n in (2, 4, 3))
    mean, std = latent_statistics([rows_of(first), rows_of(sound, video=False), rows_of(second)])
    together = torch.cat([first, second]).double().flatten(0, 1)
    torch.testing.assert_close(mean[0, 0], together.mean(0).float())
    torch.testing.assert_close(std[0, 0], together.std(0).float())
    mean, _ = latent_statistics([rows_of(sound, video=False)])
    torch.testing.assert_close(mean[0, 0], sound.flatten(0, 1).mean(0))
