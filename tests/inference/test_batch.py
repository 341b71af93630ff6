"""selva.inference.batch: clips that go together."""

from __future__ import annotations

from pathlib import Path

from make_media import make_video

from selva.inference.batch import BatchClip, rounds
from selva.inference.engine import WHOLE_VIDEO_SEC
from selva.inference.request import SoundRequest


def clip(video: Path | None = None, duration_sec: float | None = None) -> BatchClip:
    return BatchClip("x", SoundRequest(video=video, prompt="x", duration_sec=duration_sec), [])


def sizes(clips: list[BatchClip]) -> list[tuple[int, int]]:
    return [(first, len(part)) for first, part in rounds(clips)]


def test_rounds_are_bounded_by_clips_and_by_seconds_of_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("selva.inference.batch.ROUND_SEC", 20.0)
    long, missing = make_video(tmp_path / "long.mp4", 12.0, fps=5), tmp_path / "missing.mp4"
    assert sizes([]) == []
    assert sizes([clip()] * 33) == [(0, 16), (16, 16), (32, 1)]
    assert sizes([clip(missing)] * 5) == [(0, 2), (2, 2), (4, 1)]  # 8 s each
    assert sizes([clip(long, WHOLE_VIDEO_SEC)] * 2 + [clip(long, 4.0)]) == [(0, 1), (1, 2)]
    assert sizes([clip(missing, WHOLE_VIDEO_SEC)] * 5) == [(0, 5)]
    monkeypatch.setattr("selva.inference.batch.ROUND_SEC", 5.0)
    assert sizes([clip(long, WHOLE_VIDEO_SEC)] * 2) == [(0, 1), (1, 1)]  # more than a round alone is a round
