"""What decides whether features are current, and for which generators they serve."""

from __future__ import annotations

import pytest
import torch

from selva.datasets import scan_folder
from selva.extraction import FeatureExtractor, source_hash
from selva.features import FeatureBundle, save_features
from selva.models.zoo import get_variant
from selva.sequence import sequence_config
from selva.training_data import plan_windows

CPU = torch.device("cpu")


def extractor(variant: str = "small_16k", precision: torch.dtype = torch.float32) -> FeatureExtractor:
    return FeatureExtractor(get_variant(variant), None, CPU, precision)


@pytest.mark.parametrize("position", [0, 1_234_567, 2_999_999])
def test_every_byte_of_a_video_counts(tmp_path, position):
    """Pitfall B7: sampled chunks of a file would miss a change between them."""
    content = bytearray(3_000_000)
    path = tmp_path / "v.mp4"
    path.write_bytes(content)
    before = source_hash(path)
    content[position] = 1
    path.write_bytes(content)
    assert source_hash(path) != before


def test_every_setting_counts(tmp_path):
    """Pitfall B7: prompt, range, precision, encoders and the version of the code."""
    path = tmp_path / "v.mp4"
    path.write_bytes(b"x")
    ours = extractor().settings(path, "rain", 8.0, 0.0)
    assert ours == extractor().settings(path, "rain", 8.0, 0.0) and "extraction_version" in ours
    others = [
        extractor().settings(path, "snow", 8.0, 0.0),
        extractor().settings(path, "rain", 4.0, 0.0),
        extractor().settings(path, "rain", 8.0, 1.0),
        extractor(precision=torch.bfloat16).settings(path, "rain", 8.0, 0.0),
        extractor("mmaudio_small_16k").settings(path, "rain", 8.0, 0.0),
        extractor("tiny_16k").settings(path, "rain", 8.0, 0.0),
    ]
    assert all(other != ours for other in others)


@pytest.mark.parametrize("variant", ["small_44k", "medium_44k", "large_44k"])
def test_all_sizes_of_a_family_share_their_features(tmp_path, variant):
    """Pitfall B9: their encoders are the same."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    assert extractor(variant).settings(path, "rain", 8.0, 0.0) == extractor().settings(path, "rain", 8.0, 0.0)
    lengths, config = sequence_config("16k", 2.0), get_variant("small_16k").generator
    save_features(tmp_path / "a.npz", FeatureBundle(
        clip_features=torch.ones(1, lengths.clip_seq_len, config.clip_dim),
        sync_features=torch.ones(1, lengths.sync_seq_len, config.sync_dim),
        duration=2.0, prompt="rain", variant="small_16k",
    ))
    (tmp_path / "a.wav").write_bytes(b"sound")
    (clip,) = scan_folder(tmp_path).clips
    assert plan_windows(clip, get_variant(variant), 8.0) == (sequence_config("44k", 2.0), (0,))
