"""A full disk: an error that names the file, and nothing half-written under a final name."""

from __future__ import annotations

import signal
from contextlib import contextmanager

import pytest
import torch

from selva.features import FeatureBundle, save_features
from selva.media import write_audio
from selva.utils.files import atomic_write_text

resource = pytest.importorskip("resource")


@contextmanager
def files_up_to(num_bytes: int):
    """Let no file grow beyond a size, as if the disk were full then; the system's own error is another one."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def noise():
    return 0.3 * torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("suffix", [".flac", ".wav"])
@pytest.mark.parametrize("missing", [4096, 1, 100_000, None])
def test_sound_that_does_not_fit(tmp_path, noise, suffix, missing):
    path = tmp_path / f"a{suffix}"
    write_audio(path, noise[:, ::2], 16_000)
    old = path.read_bytes()
    write_audio(tmp_path / f"b{suffix}", noise, 16_000)
    size = (tmp_path / f"b{suffix}").stat().st_size
    limit = 0 if missing is None else size - missing
    with files_up_to(limit), pytest.raises(OSError, match=rf"a\{suffix}"):
        write_audio(path, noise, 16_000)
    assert path.read_bytes() == old
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}"]


def test_features_and_texts_that_do_not_fit(tmp_path):
    bundle = FeatureBundle(torch.ones(1, 8, 400), torch.ones(1, 8, 400), 1.0)
    with files_up_to(4096), pytest.raises(OSError, match=r"dog\.npz"):
        save_features(tmp_path / "dog.npz", bundle)
    with files_up_to(4096), pytest.raises(OSError, match=r"list\.txt"):
        atomic_write_text(tmp_path / "list.txt", "x" * 10_000)
    assert not list(tmp_path.iterdir())
