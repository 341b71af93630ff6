"""Fixtures of the tests of memmaps."""

from __future__ import annotations

import os

import pytest
from memmap_writing import CLIPS, extract, files


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    """Skip the waits for the disk: tests and kills read the system's cache, only a power cut needs more."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_run") / "data"
    assert extract(folder) == ([clip_id for clip_id, _ in CLIPS], True)
    return files(folder)
