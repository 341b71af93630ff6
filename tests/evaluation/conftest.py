"""Small folders of sounds to evaluate."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
from struck_sounds import RATE, strikes


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Generated sounds that lie 0, 40 and 200 ms beside their recordings."""
    generated, reference = tmp_path / "generated", tmp_path / "reference"
    generated.mkdir()
    reference.mkdir()
    for name, late in (("a", 0.0), ("b", 0.04), ("c", 0.2)):
        soundfile.write(reference / f"{name}.wav", strikes([1.0, 2.5, 4.0], 600), RATE)
        soundfile.write(generated / f"{name}.flac", strikes([1.0 + late, 2.5 + late, 4.0 + late], 600), RATE)
    return generated, reference
