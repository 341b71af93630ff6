"""Reading clips ahead of the encoders: what comes out of it, in which order, and what happens to bad ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from make_media import clicks, make_video
from PIL import Image

from selva.extraction import reader as clip_reader
from selva.extraction.reader import ClipReader, ReadClip, ReadSettings, default_workers, read_clips
from selva.features import FeatureBundle, save_features
from selva.inputs.jobs import ClipJob
from selva.models.variants import get_variant

TINY = get_variant("tiny_16k")


def job(path: Path, **changes) -> ClipJob:
    return ClipJob(**{"id": path.stem, "path": path, "start_sec": 0.0, "duration_sec": 1.0, "prompt": "p", **changes})


def settings(folder: Path | None, **changes) -> ReadSettings:
    return ReadSettings(**{"variant": "tiny_16k", "precision": "float32", "output_dir": folder, **changes})


@pytest.fixture
def video(tmp_path) -> Path:
    return make_video(tmp_path / "v.mp4", 1.2, sound=clicks([0.5], 1.3))


class Crashing(ClipReader):
    """A reader that crashes at one clip, as a decoder may at a malicious file."""

    def __getitem__(self, index: int) -> ReadClip:
        if index == 5:
            os.kill(os.getpid(), signal.SIGSEGV)
        return ReadClip(index, "done")


def test_a_clip_is_read_and_its_sound_written(tmp_path, video):
    (clip,) = read_clips(ClipReader([job(video)], settings(tmp_path / "out")), [0], 0)
    assert clip.status == "ready" and clip.duration_sec == 1.0 and clip.sound_file == "v.flac" and clip.fps == 25
    sizes = TINY.clip_image_size, TINY.sync_image_size
    assert clip.clip_frames is not None and clip.sync_frames is not None
    assert clip.clip_frames.shape == (8, 3, sizes[0], sizes[0])
    assert clip.sync_frames.shape == (25, 3, sizes[1], sizes[1])
    assert clip.sound.path is not None and clip.sound.path.exists() and not (tmp_path / "out" / "v.flac").exists()
    assert clip.waveform is None and set(clip.seconds) >= {"hash", "decode"}


def test_the_order_is_that_of_the_list_whatever_the_number_of_workers(tmp_path, video):
    reader = ClipReader([job(video, id=str(i), prompt=str(i)) for i in range(7)], settings(tmp_path, audio="none"))
    here, there = (list(read_clips(reader, range(1, 7), workers)) for workers in (0, 2))
    assert [clip.index for clip in here] == [clip.index for clip in there] == list(range(1, 7))
    for one, two in zip(here, there, strict=True):
        assert one.sync_frames is not None and two.sync_frames is not None
        assert one.digest == two.digest and np.array_equal(one.sync_frames, two.sync_frames)
    assert {clip.process for clip in here} == {os.getpid()} and os.getpid() not in {clip.process for clip in there}


def test_workers_can_be_spawned_where_no_server_forks_them(tmp_path, video, monkeypatch):
    """As on Windows, where a new process imports everything by itself and is sent the reader."""
    monkeypatch.setattr("torch.multiprocessing.get_all_start_methods", lambda: ["spawn"])
    reader = ClipReader([job(video, id=str(i), prompt=str(i)) for i in range(3)], settings(tmp_path, audio="none"))
    clips = list(read_clips(reader, range(3), 1))
    assert [clip.index for clip in clips] == [0, 1, 2] and {clip.status for clip in clips} == {"ready"}
    assert os.getpid() not in {clip.process for clip in clips}


def test_a_crash_costs_the_clip_that_caused_it_and_no_other():
    reader = Crashing([job(Path(f"{i}.mp4")) for i in range(9)], settings(None))
    clips = list(read_clips(reader, range(9), 1))
    assert [clip.index for clip in clips] == list(range(9))
    assert [clip.index for clip in clips if clip.status == "failed"] == [5] and "died" in clips[5].reason


class Large(ClipReader):
    """A reader of clips that do not fit into a pipe."""

    def __getitem__(self, index: int) -> ReadClip:
        return ReadClip(index, "ready", clip_frames=np.zeros(10_000_000, dtype=np.uint8), process=os.getpid())


TAKE_ONE_AND_DIE = """
import os, time
from test_reader import Large, read_clips, settings
clips = read_clips(Large([None] * 9, settings(None)), range(9), 1)
print(next(clips).process, flush=True)
time.sleep(1)
os.kill(os.getpid(), 9)
"""


def test_workers_do_not_outlive_the_main_process():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", TAKE_ONE_AND_DIE], stdout=subprocess.PIPE, text=True,
                               env=environment)
    assert process.stdout is not None
    worker = int(process.stdout.readline())  # not to its end: a worker that stays keeps it open
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    if is_running(worker):
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker stays")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_unforeseen_error_costs_one_clip_too(tmp_path, video, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(clip_reader, "read_video", fail)
    (clip,) = read_clips(ClipReader([job(video)], settings(tmp_path)), [0], 0)
    assert clip.status == "failed" and clip.reason == "unforeseen"


@pytest.mark.parametrize(
    "seconds, sound, reason",
    [(8.0, True, ""), (2.0, True, "every row of a memmap is 8 s"), (8.0, False, "has no sound"),
     (8.0, "silent", "silent")],
)
def test_rows_of_a_memmap_are_8_seconds_with_sound(tmp_path, seconds, sound, reason):
    waveform = clicks([0.5], seconds + 0.1) * (sound != "silent")
    path = make_video(tmp_path / "v.mkv", seconds, fps=10, sound=waveform if sound else None, audio_codec="aac")
    clips = [job(path, duration_sec=8.0)]
    (clip,) = read_clips(ClipReader(clips, settings(None, latents=True)), [0], 0)
    assert clip.status == ("skipped" if reason else "ready") and reason in clip.reason
    if not reason:
        assert clip.waveform is not None
        assert clip.waveform.shape == (128_000,) and np.abs(clip.waveform).max() > 0.5
        (again,) = read_clips(ClipReader(clips, settings(None, latents=True), {0: clip.digest}), [0], 0)
        assert again.status == "done" and again.clip_frames is None
        (other,) = read_clips(ClipReader(clips, settings(None, latents=True), {0: "another"}), [0], 0)
        assert other.status == "ready"


def test_sound_that_is_too_short_for_its_latents_is_padded_and_named(tmp_path):
    path = make_video(tmp_path / "v.mkv", 8.0, fps=10, sound=clicks([0.5], 3.0), audio_codec="flac")
    (clip,) = read_clips(ClipReader([job(path, duration_sec=8.0)], settings(None, latents=True)), [0], 0)
    assert clip.status == "ready" and clip.waveform is not None and clip.waveform.shape == (128_000,)
    assert f"{path}: has 3.00 s of sound from 0 s, for features of 8.00 s" in clip.reason
    assert np.abs(clip.waveform[:10_000]).max() > 0.5 and not clip.waveform[49_000:].any()


def test_latents_are_left_out_where_there_is_no_sound(tmp_path):
    path = make_video(tmp_path / "v.mp4", 1.2)
    (clip,) = read_clips(ClipReader([job(path)], settings(tmp_path, latents=True)), [0], 0)
    assert clip.status == "ready" and clip.waveform is None and "has no sound" in clip.reason


def test_the_content_of_the_mask_and_its_use_count(tmp_path, video):
    mask = tmp_path / "mask.npy"
    digests = []
    for value, strength in ((1, 1.0), (0, 1.0), (0, 0.5)):
        np.save(mask, np.full((4, 4), value, dtype=np.uint8))
        os.utime(mask, ns=(len(digests) + 1, 10**9 * (len(digests) + 1)))
        reader = ClipReader([job(video, mask=mask)], settings(tmp_path, mask_strength=strength))
        (clip,) = read_clips(reader, [0], 0)
        assert clip.settings["mask"]["strength"] == strength
        digests.append(clip.digest)
    assert len(set(digests)) == 3


def test_the_windows_of_a_video_hash_it_once(tmp_path, video, monkeypatch):
    calls = []
    original = clip_reader.source_hash
    monkeypatch.setattr(clip_reader, "source_hash", lambda path: calls.append(path) or original(path))
    clip_reader._hash_of.cache_clear()
    jobs = [job(video, id=str(i), start_sec=0.1 * i, duration_sec=0.7) for i in range(4)]
    assert all(clip.status == "ready" for clip in read_clips(ClipReader(jobs, settings(tmp_path)), range(4), 0))
    assert len(calls) == 1


def test_a_preview_is_made_of_current_clips_too_but_once(tmp_path, video, monkeypatch):
    options = settings(tmp_path, preview_dir=tmp_path / "seen", audio="none")
    reader = ClipReader([job(video)], options)
    monkeypatch.setattr(reader, "_current", lambda *_: 1.0)
    first, second = reader[0], reader[0]
    assert first.status == second.status == "done" and (tmp_path / "seen" / "v.png").exists()
    assert "preview" in first.seconds and "preview" not in second.seconds


def test_a_preview_of_an_older_mask_is_made_again(tmp_path, video, monkeypatch):
    """Features that are current may have been made after the preview, in a run without ``--preview``."""
    np.save(tmp_path / "white.npy", np.ones((4, 4)))
    np.save(tmp_path / "half.npy", np.float64([[1, 0]]))
    pictures = []
    for mask in ("white.npy", "half.npy", "half.npy"):
        reader = ClipReader([job(video, mask=tmp_path / mask)],
                            settings(tmp_path, preview_dir=tmp_path / "seen", audio="none"))
        monkeypatch.setattr(reader, "_current", lambda *_: 1.0)
        assert reader[0].status == "done"
        pictures.append((tmp_path / "seen" / "v.png").read_bytes())
    assert pictures[0] != pictures[1] == pictures[2]


@pytest.mark.parametrize("current", [False, True])
def test_a_preview_never_replaces_a_picture_of_the_users_own(tmp_path, video, monkeypatch, current):
    """Masks are called like the clips, as the previews are."""
    mask = tmp_path / "masks" / "v.png"
    mask.parent.mkdir()
    Image.new("L", (8, 8), 255).save(mask)
    content = mask.read_bytes()

    def read(**more) -> ReadClip:
        options = settings(tmp_path / "out", preview_dir=mask.parent, **more)
        reader = ClipReader([job(video, mask=mask)], options)
        if current:
            monkeypatch.setattr(reader, "_current", lambda *_: 1.0)
        return reader[0]

    clip = read()
    assert clip.status == "failed" and f"{mask}: is in the way of the preview" in clip.reason
    assert mask.read_bytes() == content and not list((tmp_path / "out").rglob("*.flac"))
    assert read(overwrite=True).status != "failed" and mask.read_bytes() != content


def test_workers_follow_the_cores_and_the_clips(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    assert [default_workers(count) for count in (1, 2, 3, 100)] == [0, 0, 3, 7]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers(100) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers(100) == 0


def test_features_of_other_weights_are_not_current(tmp_path, video):
    """Weights of the same names and sizes: random ones for a test, then the real ones."""
    folder = tmp_path / "out"

    def read(weights):
        return ClipReader([job(video)], settings(folder, audio="none", weights=weights))[0]

    clip = read("random")
    for origin, expected in ((None, "done"), ({"weights": "random"}, "ready"), ({"weights": "real"}, "done")):
        save_features(folder / "v.npz", FeatureBundle(
            torch.zeros(1, 8, 4), torch.zeros(1, 8, 4), 1.0, settings=clip.settings, origin=origin))
        assert read("real").status == expected


def test_rows_of_other_weights_are_not_current(tmp_path):
    path = make_video(tmp_path / "v.mkv", 8.0, fps=10, sound=clicks([0.5], 8.1))

    def read(weights, digests=None):
        reader = ClipReader([job(path, duration_sec=8.0)], settings(None, latents=True, weights=weights), digests)
        return reader[0]

    earlier, random = read(""), read("random")
    assert len({earlier.digest, random.digest, read("real").digest}) == 3
    assert read("real", {0: random.digest}).status == "ready"
    kept = read("real", {0: earlier.digest})
    assert kept.status == "done" and kept.digest == earlier.digest
