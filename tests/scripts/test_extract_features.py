"""extract_features.py on generated videos, in-process."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
import yaml
from make_media import make_video
from script_args import TINY

import extract_features
from selva.features import load_features


def names(folder, suffix):
    return sorted(p.stem for p in folder.glob(f"*{suffix}"))


def test_bundles_and_sound_for_every_video(feature_dir):
    expected = [f"knock_{i}" for i in range(6)]
    assert names(feature_dir, ".npz") == names(feature_dir, ".flac") == expected
    bundle = load_features(feature_dir / "knock_0.npz")
    assert (bundle.duration, bundle.prompt, bundle.variant) == (2.0, "a knock", "tiny_16k")
    assert bundle.clip_features.shape[1] == 16 and bundle.sync_features.shape[1] == 40
    short = load_features(feature_dir / "knock_5.npz")
    assert short.duration == pytest.approx(1.2) and short.sync_features.shape[1] == 16
    # 63 latent frames reach to 2.016 s; the video has sound for its 2 s only
    assert soundfile.info(feature_dir / "knock_0.flac").duration == pytest.approx(2.0, abs=0.07)


def test_the_file_has_the_published_keys_first(feature_dir):
    with np.load(feature_dir / "knock_0.npz", allow_pickle=False) as data:
        assert data.files[:5] == ["clip_features", "sync_features", "duration", "prompt", "variant"]


def test_a_second_run_does_only_what_is_missing_or_different(clip_dir, feature_dir, capsys):
    """Pitfalls B6 and B7: a run redoes what has another prompt, nothing else, and under the same names."""
    run = [str(clip_dir), "--output_dir", str(feature_dir), *TINY]
    before = {p: p.stat().st_mtime_ns for p in feature_dir.glob("*.npz")}
    (feature_dir / "knock_2.flac").unlink()
    (feature_dir / "knock_4.npz").write_bytes(b"half a file")
    capsys.readouterr()
    assert extract_features.main([*run, "--prompt", "a knock"]) == 0
    assert {p.split("/")[-1] for p in capsys.readouterr().out.split()} == {"knock_2.npz", "knock_4.npz"}
    untouched = [p for p in before if p.stem not in ("knock_2", "knock_4")]
    assert all(p.stat().st_mtime_ns == before[p] for p in untouched)
    assert extract_features.main([*run, "--prompt", "another prompt"]) == 0
    assert len(capsys.readouterr().out.split()) == 6


def test_the_sync_features_follow_the_prompt_and_the_text_features_too(clip_dir, tmp_path):
    """Pitfall B6."""
    bundles = []
    for prompt in ("a knock", "rain"):
        run = [str(clip_dir / "knock_5.mp4"), "--output_dir", str(tmp_path / prompt), "--prompt", prompt, *TINY]
        assert extract_features.main(run) == 0
        bundles.append(load_features(tmp_path / prompt / "knock_5.npz"))
    one, two = bundles
    assert torch.equal(one.clip_features, two.clip_features)
    assert not torch.allclose(one.sync_features, two.sync_features)
    assert not torch.allclose(one.text_features, two.text_features)


def test_features_are_computed_in_float32_unless_asked_otherwise(clip_dir, tmp_path, capsys):
    """Pitfall B5: the precision is stored with the features, and another one makes them anew."""
    run = [str(clip_dir / "knock_5.mp4"), "--output_dir", str(tmp_path), "--prompt", "x", *TINY]
    exact, rounded = ([], ["--precision", "bf16"])
    bundles = []
    for more in (exact, rounded):
        capsys.readouterr()
        assert extract_features.main([*run, *more]) == 0
        assert capsys.readouterr().out.endswith("knock_5.npz\n")
        bundles.append(load_features(tmp_path / "knock_5.npz"))
    assert [bundle.settings["precision"] for bundle in bundles] == ["float32", "bfloat16"]
    for name in ("clip_features", "sync_features", "text_features"):
        full, half = (getattr(bundle, name) for bundle in bundles)
        assert full.dtype == half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0, atol=0.05 * full.abs().max().item())  # eight bits
        assert not torch.equal(full, half) and not torch.equal(full, full.bfloat16().float())


def test_prompts_file_start_and_duration(clip_dir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("knock_0.npz: wood: hard\n", encoding="utf-8")
    out = tmp_path / "out"
    run = [str(clip_dir / "knock_0.mp4"), str(clip_dir / "knock_1.mp4"), "--output_dir", str(out), "--prompts",
           str(prompts), "--prompt", "other", "--start", "0.5", "--duration", "1.0", *TINY]
    assert extract_features.main(run) == 0
    first, second = (load_features(out / f"knock_{i}.npz") for i in (0, 1))
    assert (first.prompt, second.prompt) == ("wood: hard", "other")
    assert first.duration == 1.0 and first.settings["start_sec"] == 0.5
    assert soundfile.info(out / "knock_0.flac").duration == pytest.approx(1.024, abs=1e-3)
    assert yaml.safe_load((out / "extract_config.yaml").read_text())["start"] == 0.5
    again = ["--config", str(out / "extract_config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert extract_features.main(again) == 0
    assert (tmp_path / "again" / "knock_0.npz").read_bytes() == (out / "knock_0.npz").read_bytes()


def test_bad_videos_are_named_and_the_others_done(clip_dir, tmp_path, capsys):
    """Pitfall A8: none is dropped without its name, and the exit code tells."""
    source = (clip_dir / "knock_0.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(source[: len(source) // 2])
    (tmp_path / "text.mp4").write_text("not a video")
    make_video(tmp_path / "good.mp4", 1.0)
    assert extract_features.main([str(tmp_path), "--output_dir", str(tmp_path / "out"), "--prompt", "x", *TINY]) == 1
    out, err = capsys.readouterr()
    assert out.strip().endswith("good.npz") and "cut.mp4" in err and "text.mp4" in err
    assert "has no sound" in err and "Traceback" not in err
    assert "1 extracted, 0 already current, 0 left out, 2 failed" in err
    assert names(tmp_path / "out", ".npz") == ["good"] and names(tmp_path / "out", ".flac") == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give at least one video"),
        (["nowhere.mp4"], "nowhere.mp4: no such file"),
        (["{clips}", "--duration", "0.3"], "expected at least 0.64"),
        (["{clips}", "--variant", "small"], "invalid choice: 'small'"),
        (["{clips}/knock_0.mp4", "--shard", "0/4"], "from 1/8 to 8/8"),
        (["{clips}/knock_0.mp4", "--workers", "-1"], "--workers is -1"),
        (["{clips}/knock_0.mp4", "--overlap", "1"], "only windows overlap"),
        (["{clips}", "--format", "memmap", "--duration", "4"], "--duration is 4, but the rows of a memmap are 8 s"),
        (["{clips}", "--format", "memmap", "--audio", "copy"], "leave --audio out"),
    ],
)
def test_wrong_usage(clip_dir, tmp_path, capsys, arguments, message):
    arguments = [a.format(clips=clip_dir) for a in arguments]
    assert extract_features.main([*TINY, *arguments, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_missing_weights_are_named_before_anything_is_done(clip_dir, tmp_path, capsys):
    run = [str(clip_dir), "--output_dir", str(tmp_path / "out"), "--variant", "small_16k", "--selva_dir", str(tmp_path)]
    assert extract_features.main(run) == 1
    err = capsys.readouterr().err
    assert "video_enc_sup_5.pth" in err and "download_weights.py --variant small_16k" in err
    assert not (tmp_path / "out").exists()
