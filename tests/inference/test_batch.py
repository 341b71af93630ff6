"""selva.inference.batch: clips that go together."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from make_media import make_video

from selva.audio.loudness import normalize_loudness
from selva.inference import batch
from selva.inference.batch import BatchClip, BatchManifest, SoundBatch, Variation, rounds
from selva.inference.engine import WHOLE_VIDEO_SEC
from selva.inference.outputs import SoundFiles
from selva.inference.request import Sound, SoundRequest


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


def finished(folder: Path, number: int) -> BatchClip:
    files = SoundFiles(folder / f"{number}.flac", None)
    variation = Variation(0, 42, files, {})
    return BatchClip(str(number), SoundRequest(prompt="x"), [variation], made=[variation], duration_sec=8.0)


def test_the_manifest_of_ten_thousand_clips_is_appended_to(tmp_path, monkeypatch):
    """Nothing is written twice but once at the end, and no sound is opened: 1,000 clips took 80 s of that."""
    monkeypatch.setattr(batch, "audio_length", None)
    written = []
    monkeypatch.setattr(batch, "atomic_write_text", lambda path, text: written.append(text) or path.write_text(text))
    manifest, incomplete = BatchManifest(tmp_path, 10_000), tmp_path / "manifest.incomplete.jsonl"
    (tmp_path / "manifest.jsonl").write_text("old")
    lines = []
    for number in range(10_000):
        manifest.add(finished(tmp_path, number))
        if number in (0, 1, 5_000):
            assert not (tmp_path / "manifest.jsonl").exists()
            lines.append(incomplete.read_text().count("\n"))
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(number) for number in range(10_000)]
    assert {(row["status"], row["duration_sec"]) for row in rows} == {("done", 8.0)}
    assert len(written) == 1 and lines == [1, 2, 5_001] and not incomplete.exists()


def test_a_sound_that_was_just_made_is_not_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "audio_length", None)
    waveform = torch.linspace(-0.5, 0.5, 8000)
    sound = Sound(waveform, 16_000, normalize_loudness(waveform, 16_000)[1])
    clip = finished(tmp_path, 1)
    clip.made, clip.duration_sec = [], None
    maker = SimpleNamespace(generator=SimpleNamespace(times=batch_times(), normalize="peak"))
    SoundBatch._write(maker, clip, clip.variations[0], sound, "mark")  # pyright: ignore[reportArgumentType]
    BatchManifest(tmp_path, 1).add(clip)
    assert json.loads((tmp_path / "manifest.jsonl").read_text())["duration_sec"] == 0.5


def batch_times():
    from selva.utils.progress import StageTimes

    return StageTimes()
