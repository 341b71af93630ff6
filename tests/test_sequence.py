import json

import pytest
from golden_case import GOLDEN

from selva.sequence import num_sync_segments, sequence_config

TABLE = json.loads((GOLDEN / "sequence_config.json").read_text())["rows"]


@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_lengths_equal_the_reference_table(mode):
    for row in TABLE:
        lengths = sequence_config(mode, row["duration"])
        assert {name: getattr(lengths, name) for name in row[mode]} == row[mode], row["duration"]


def test_eight_seconds_at_44k_are_353280_samples():
    """Pitfall A2: 8 s are 345 latent frames, not 352800 samples and a zero vector."""
    lengths = sequence_config("44k", 8.0)
    assert (lengths.num_audio_frames, lengths.latent_seq_len) == (353_280, 345)


def test_segments_of_frames():
    assert [num_sync_segments(n) for n in (0, 15, 16, 23, 24, 200)] == [0, 0, 1, 1, 2, 24]


@pytest.mark.parametrize("mode, duration", [("48k", 8.0), ("16k", 0.5), ("16k", float("nan")), ("44k", -1.0)])
def test_impossible_lengths_are_refused(mode, duration):
    with pytest.raises(ValueError, match=r"expected"):
        sequence_config(mode, duration)
