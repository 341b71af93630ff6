"""selva.evaluation.desync: decisions and their score against the published ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_case import GoldenCase

from selva.evaluation import desync
from selva.models.config import VideoEncoderConfig
from selva.models.synchformer_av import SynchformerAV
from selva.utils.errors import UserError

SMALL = VideoEncoderConfig(embed_dim=32, depth=1, num_heads=4, mlp_dim=48, image_size=32)


def test_logits_become_the_published_offsets():
    case = GoldenCase("metrics")
    first, last = (case.inputs()[f"desync_logits_{part}"].clone() for part in ("first", "last"))
    first[0] = 0
    last[0] = 0
    last[0, [4, 17]] = 1
    grid = np.abs(desync.offset_grid())
    for part, logits in (("first", first), ("last", last)):
        assert np.array_equal(desync.offsets_of(logits), grid[case.stored[f"desync/top_{part}"].astype(int)])
    score = np.concatenate((desync.offsets_of(first), desync.offsets_of(last))).mean()
    assert score == pytest.approx(case.stored["desync/score"][0], rel=1e-6)


def test_the_first_and_the_last_segments_are_compared(monkeypatch):
    network = SynchformerAV(SMALL).eval()
    monkeypatch.setattr(network, "compare", lambda visual, audio: (visual[:, 0, 0] + audio[:, -1, 0])[:, :21])
    visual, audio = torch.randn(20, 24, 8, 32), torch.randn(20, 25, 6, 32)
    found = desync.decisions(network, visual, audio)
    assert found.shape == (20, 2)
    assert np.array_equal(found[:, 0], desync.offsets_of((visual[:, 0, 0] + audio[:, 13, 0])[:, :21]))
    assert np.array_equal(found[:, 1], desync.offsets_of((visual[:, 10, 0] + audio[:, 23, 0])[:, :21]))
    exactly = desync.decisions(network, visual[:, :14], audio[:, :14])  # both decisions look at the same
    assert np.array_equal(exactly[:, 0], exactly[:, 1])
    with pytest.raises(UserError, match=r"4\.8 s"):
        desync.decisions(network, visual[:, :13], audio)
