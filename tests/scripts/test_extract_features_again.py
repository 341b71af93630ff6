"""extract_features.py run again, in parts, by several processes, or killed: the same files, and every clip named."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from make_media import clicks, make_video
from script_args import TINY

import extract_features
from selva.data.memmap.reader import MemmapDataset
from selva.extraction.manifest import read_manifest
from selva.features import load_features
from selva.media import write_audio
from selva.models.variants import get_variant
from selva.partition.windows import Window, write_captions, write_clips

SCRIPT = Path(extract_features.__file__)


def extract(videos, out: Path, *more: str) -> int:
    return extract_features.main([str(videos), "--output_dir", str(out), "--prompt", "a knock", *TINY, *more])


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files of a run but its settings and its journals."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "extract_config.yaml"]
    names = {str(path.relative_to(folder)): path for path in files}
    return {name: path.read_bytes() for name, path in sorted(names.items()) if not name.startswith(".")}


def statuses(out: Path) -> dict[str, str]:
    return {row["id"]: row["status"] for row in read_manifest(out / "manifest.jsonl")}


@pytest.fixture(scope="module")
def whole(clip_dir, tmp_path_factory) -> dict[str, bytes]:
    """Files of a run in one process that reads for itself."""
    folder = tmp_path_factory.mktemp("whole")
    assert extract(clip_dir, folder, "--workers", "0") == 0
    return contents(folder)


def test_every_clip_is_in_the_manifest_and_a_second_run_changes_nothing(clip_dir, tmp_path, whole, capsys):
    tables = {"manifest.jsonl", "clips.csv"}
    assert set(whole) == {f"knock_{i}{end}" for i in range(6) for end in (".npz", ".flac")} | tables
    assert extract(clip_dir, tmp_path, "--workers", "2") == 0
    assert contents(tmp_path) == whole  # workers or none
    capsys.readouterr()
    assert extract(clip_dir, tmp_path, "--workers", "0") == 0
    out, err = capsys.readouterr()
    assert out == "" and "0 extracted, 6 already current" in err and contents(tmp_path) == whole
    rows = read_manifest(tmp_path / "manifest.jsonl")
    assert rows[5] == {"id": "knock_5", "source": str(clip_dir / "knock_5.mp4"), "start_sec": 0.0, "status": "done",
                       "reason": "", "files": ["knock_5.npz", "knock_5.flac"], "duration_sec": pytest.approx(1.2)}


def test_parts_make_the_whole(clip_dir, tmp_path, whole, capsys):
    assert extract(clip_dir, tmp_path, "--workers", "0", "--shard", "2/2") == 0
    assert "complete when part 1 is too" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.npz"))) == 3 and not (tmp_path / "manifest.jsonl").exists()
    assert extract(clip_dir, tmp_path, "--workers", "0", "--shard", "1/2") == 0
    assert contents(tmp_path) == whole


def test_the_last_part_names_what_no_part_could_use(clip_dir, tmp_path, capsys):
    for name in ("a", "b", "c"):
        shutil.copy(clip_dir / "knock_0.mp4", tmp_path / f"{name}.mp4")
    (tmp_path / "b.mp4").write_text("no video")
    for part, code in (("2/2", 1), ("1/2", 0)):
        assert extract(tmp_path, tmp_path / "out", "--workers", "0", "--shard", part) == code
    text = capsys.readouterr().err
    assert "all 2 parts together: 3 clips, of which 1 failed and 0 were left out" in text
    assert "not in the result: b (" in text and "cannot be read as video or audio" in text.split("not in the result")[1]


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have, as Linux lists them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        if parent == pid:
            found += [int(path.parent.name), *descendants(int(path.parent.name))]
    return found


def ended(pids: list[int], within_sec: float) -> bool:
    """Return True where processes end by themselves; those that do not are ended."""
    def living() -> list[int]:
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    deadline = time.monotonic() + within_sec
    while living() and time.monotonic() < deadline:
        time.sleep(0.05)
    left = living()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the helper processes as Linux lists them")
def test_a_run_that_is_killed_is_finished_by_the_next(clip_dir, tmp_path, whole):
    command = [sys.executable, str(SCRIPT), str(clip_dir), "--output_dir", str(tmp_path), "--prompt", "a knock", *TINY,
               "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("*.npz"))) < 2:
        time.sleep(0.01)
    helpers = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "manifest.jsonl").exists()
    assert helpers and ended(helpers, within_sec=60)
    assert 2 <= len(list(tmp_path.glob("*.npz"))) < 6
    assert extract(clip_dir, tmp_path, "--workers", "0") == 0
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_processes_of_torchrun_share_the_work_and_its_exit_code(clip_dir, tmp_path, whole):
    def torchrun(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT),
                   "--output_dir", str(tmp_path), "--prompt", "a knock", *TINY, *more]
        # As many threads as the run in this process had: another number rounds differently.
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert torchrun(str(clip_dir)).returncode == 0
    assert contents(tmp_path) == whole
    (tmp_path / "bad.mp4").write_text("not a video")
    result = torchrun(str(tmp_path / "bad.mp4"), str(clip_dir))
    assert result.returncode == 1 and "bad.mp4" in result.stderr
    assert statuses(tmp_path) == {"bad": "failed"} | {f"knock_{i}": "done" for i in range(6)}


def test_changed_settings_and_changed_videos_are_done_again(clip_dir, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("knock_0", "knock_5"):
        (videos / f"{name}.mp4").write_bytes((clip_dir / f"{name}.mp4").read_bytes())
    mask = tmp_path / "mask.npy"
    np.save(mask, np.ones((2, 2), dtype=np.uint8))

    def extracted(*more: str) -> int:
        capsys.readouterr()
        assert extract(videos, tmp_path / "out", "--workers", "0", "--duration", "1", *more) == 0
        return len(capsys.readouterr().out.split())

    assert extracted() == 2 and extracted() == 0
    (videos / "knock_0.mp4").write_bytes((clip_dir / "knock_1.mp4").read_bytes())
    assert extracted() == 1
    assert extracted("--latents") == 2 and extracted("--latents") == 0
    assert extracted("--mask", str(mask)) == 2 and extracted("--mask", str(mask)) == 0
    np.save(mask, np.zeros((2, 2), dtype=np.uint8))
    assert extracted("--mask", str(mask)) == 2 and extracted("--mask", str(mask), "--mask_strength", "0.5") == 2
    assert extracted("--mask", str(mask), "--mask_strength", "0.5", "--overwrite") == 2


def test_clips_that_fail_are_named_and_strict_stops_at_the_first(clip_dir, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes((clip_dir / "knock_5.mp4").read_bytes())
    (videos / "b.mp4").write_text("not a video")
    (videos / "c.mp4").write_bytes((clip_dir / "knock_0.mp4").read_bytes())
    assert extract(videos, tmp_path / "strict", "--strict") == 1
    assert [path.name for path in (tmp_path / "strict").glob("*.npz")] == ["a.npz"]
    assert not (tmp_path / "strict" / "manifest.jsonl").exists()
    assert extract(videos, tmp_path / "out") == 1
    assert statuses(tmp_path / "out") == {"a": "done", "b": "failed", "c": "done"}
    (row,) = (row for row in read_manifest(tmp_path / "out" / "manifest.jsonl") if row["status"] == "failed")
    assert "b.mp4: cannot be read" in row["reason"] and row["files"] == []
    (videos / "b.mp4").write_bytes((clip_dir / "knock_1.mp4").read_bytes())
    assert extract(videos, tmp_path / "out") == 0 and set(statuses(tmp_path / "out").values()) == {"done"}


def test_optional_keys_of_the_feature_files(clip_dir, tmp_path):
    assert extract(clip_dir / "knock_0.mp4", tmp_path, "--latents") == 0
    bundle = load_features(tmp_path / "knock_0.npz")
    assert bundle.latent_mean.shape == bundle.latent_std.shape == (1, 63, 20) and (bundle.latent_std > 0).all()
    assert bundle.fps == 25 and bundle.source_sha256 == bundle.settings["source_sha256"]
    with np.load(tmp_path / "knock_0.npz") as file:
        assert list(file)[:5] == ["clip_features", "sync_features", "duration", "prompt", "variant"]


def test_stored_latents_are_those_of_the_sound_beside_them(clip_dir, tmp_path):
    """Training on them is training on the latents that our own training would compute."""
    from selva.data.latents import encode_latents, load_waveform
    from selva.models.zoo import build_mel
    from selva.sequence import sequence_config
    from selva.weights.load import load_vae

    assert extract(clip_dir / "knock_0.mp4", tmp_path, "--latents", "--duration", "1") == 0
    waveform = load_waveform(tmp_path / "knock_0.flac", sequence_config("16k", 1.0), "peak")
    with torch.no_grad():
        mean, _ = encode_latents(waveform[None], build_mel("16k"), load_vae("tiny_16k"))
    stored = load_features(tmp_path / "knock_0.npz").latent_mean
    torch.testing.assert_close(stored, mean, rtol=0, atol=1e-3 * mean.abs().max().item())  # FLAC has 24 bits


def test_the_sound_can_be_copied_as_it_is(clip_dir, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    make_video(videos / "flac.mkv", 1.2, sound=clicks([0.5], 1.2), audio_codec="flac")
    assert extract(videos, tmp_path / "out", "--audio", "copy") == 0
    assert (tmp_path / "out" / "flac.flac").exists()
    assert read_manifest(tmp_path / "out" / "manifest.jsonl")[0]["files"] == ["flac.npz", "flac.flac"]
    assert extract(clip_dir / "knock_5.mp4", tmp_path / "aac", "--audio", "copy") == 1
    assert "its sound is aac, which cannot be copied" in capsys.readouterr().err
    assert extract(clip_dir / "knock_5.mp4", tmp_path / "none", "--audio", "none") == 0
    assert sorted(contents(tmp_path / "none")) == ["clips.csv", "knock_5.npz", "manifest.jsonl"]


def test_windows_names_and_previews(clip_dir, tmp_path):
    out = tmp_path / "out"
    assert extract(clip_dir / "knock_0.mp4", out, "--windows", "--duration", "1", "--preview", str(tmp_path / "p")) == 0
    ids = list(statuses(out))
    assert ids[:2] == ["knock_0_000", "knock_0_001"] and load_features(out / "knock_0_001.npz").duration == 1.0
    assert sorted(path.stem for path in (tmp_path / "p").glob("*.png")) == ids
    assert extract(clip_dir, tmp_path / "named", "--name", "dog", "--audio", "none") == 0
    assert list(statuses(tmp_path / "named")) == [f"dog_{number:03d}" for number in range(1, 7)]


def test_sound_without_pictures_becomes_a_memmap(tmp_path, capsys):
    recordings, captions = tmp_path / "recordings", tmp_path / "captions.tsv"
    for seed, name in enumerate(("rain", "wind")):
        samples = 0.1 * np.random.default_rng(seed).standard_normal(9 * 16_000)
        write_audio(recordings / f"{name}.flac", torch.from_numpy(samples).float(), 16_000)
    write_clips(tmp_path / "clips.tsv", [Window(f"{name}_0", name, 0, 8 * 16_000) for name in ("rain", "wind")])
    write_captions(captions, {"rain": "rain on a roof"})
    run = [str(tmp_path / "clips.tsv"), "--recordings", str(recordings), "--captions", str(captions), *TINY,
           "--output_dir", str(tmp_path / "set")]
    assert extract_features.main(run) == 1 and "no caption for wind" in capsys.readouterr().err
    rows = read_manifest(tmp_path / "set.manifest.jsonl")
    assert [(row["id"], row["status"]) for row in rows] == [("rain_0", "done"), ("wind_0", "failed")]
    write_captions(captions, {"rain": "rain on a roof", "wind": "wind"})
    assert extract_features.main(run) == 0
    assert MemmapDataset(tmp_path / "set", get_variant("tiny_16k")).prompts == ["rain on a roof", "wind"]
    assert extract_features.main([*run, "--latents"]) == 2 and "only for videos" in capsys.readouterr().err
    assert extract_features.main(run[:3] + run[5:]) == 2


def test_a_memmap_in_parts_is_the_same(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(3):
        make_video(videos / f"v{number}.mp4", 8.0, fps=8, sound=clicks([0.5 + number], 8.1))
    make_video(videos / "w.mp4", 2.0, sound=clicks([0.5], 2.1))
    whole = ["--format", "memmap", "--workers", "0"]
    assert extract(videos, tmp_path / "a" / "set", *whole) == 0
    for part in ("2/2", "1/2"):
        assert not (tmp_path / "b" / "set").exists()
        assert extract(videos, tmp_path / "b" / "set", *whole, "--shard", part) == 0
    one, two = (
        {name: data for name, data in contents(tmp_path / folder).items() if not name.endswith("config.yaml")}
        for folder in "ab"
    )
    assert one == two and "set.manifest.jsonl" in one and "set/sync_features.memmap" in one
    rows = read_manifest(tmp_path / "a" / "set.manifest.jsonl")
    assert [row["status"] for row in rows] == ["done", "done", "done", "skipped"]
