"""Fixtures that the tests of the scripts share: a small set of clips, and its features."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from make_media import make_video
from script_args import TINY

import extract_features


def knocks(seed: int, seconds: float, rate: int = 16_000) -> np.ndarray:
    """Return (1, samples) float32 decaying tones at a few random times."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    starts = rng.uniform(0, seconds - 0.2, 3)
    tones = sum(np.exp(-30 * np.clip(t - s, 0, None)) * np.sin(1500 * (t - s)) * (t >= s) for s in starts)
    return (0.4 * tones / np.abs(tones).max()).astype(np.float32)[None]


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory) -> Path:
    """Five videos of 2 s and one of 1.2 s, with sound."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        seconds = 1.2 if i == 5 else 2.0
        make_video(folder / f"knock_{i}.mp4", seconds, size=(96, 64), sound=knocks(i, seconds))
    return folder


@pytest.fixture(scope="session")
def _features(tmp_path_factory, clip_dir) -> Iterator[Path]:
    """The features and sounds of all clips, to be copied: training would leave its cache for all later tests."""
    folder = tmp_path_factory.mktemp("data") / "features"
    assert extract_features.main([str(clip_dir), "--output_dir", str(folder), "--prompt", "a knock", *TINY]) == 0
    before = sorted(path.name for path in folder.iterdir())
    yield folder
    assert sorted(path.name for path in folder.iterdir()) == before, "a test has written to what all share"


@pytest.fixture
def feature_dir(_features, tmp_path) -> Path:
    """A fresh copy of the features and sounds of all clips, free to be spoilt."""
    return Path(shutil.copytree(_features, tmp_path / "features"))


@pytest.fixture
def old_folder(clip_dir, latin1_folder) -> Path:
    """A folder whose name is Latin-1, as on disks from before UTF-8, with one of the clips."""
    shutil.copy(clip_dir / "knock_5.mp4", latin1_folder)
    return latin1_folder


@pytest.fixture
def two_clips(clip_dir, tmp_path) -> Path:
    """A folder with two of the clips."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in (0, 5):
        shutil.copy(clip_dir / f"knock_{number}.mp4", folder)
    return folder
