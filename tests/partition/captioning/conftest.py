"""Small models to listen with."""

from __future__ import annotations

from pathlib import Path

import pytest
from listening_models import put_whisper


@pytest.fixture(scope="session")
def whisper_dir(tmp_path_factory) -> Path:
    return put_whisper(tmp_path_factory.mktemp("models") / "whisper")
