"""extract_features.py on generated videos, in-process."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
import yaml
from make_media import make_video
from script_args import TINY

import extract_features
from selva.data.folder import scan_folder
from selva.extraction.manifest import read_manifest
from selva.features import load_features
from selva.inputs.delimited import read_text_table


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
        (["{clips}", "--mask", "{clips}", "--preview", "{clips}/../{clips.name}"], "is the folder of the masks"),
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


# -- clips.csv, recordings beside the videos, what is said in one line -------------------------------------------------


def table_of(folder):
    return {row["clip"]: row for _, row in read_text_table(folder / "clips.csv", ",", ("clip",)).rows}


def test_a_table_says_which_clip_is_of_which_video(clip_dir, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("knock_1: wood\n", encoding="utf-8")
    run = ["--output_dir", str(out), "--prompts", str(tmp_path / "prompts.txt"), "--prompt", "a knock", "--name", "k"]
    videos = [str(clip_dir / f"knock_{number}.mp4") for number in (0, 1, 5)]
    assert extract_features.main([*videos[:2], *run, "--duration", "1", *TINY]) == 0
    rows = table_of(out)
    assert list(rows) == ["k_001", "k_002"]
    assert list(rows["k_002"].values()) == [
        "k_002", videos[1], "0", "1", "k_002.flac", videos[1], "wood", "prompts.txt"]
    assert (rows["k_001"]["prompt"], rows["k_001"]["prompt_from"]) == ("a knock", "--prompt")
    assert extract_features.main([videos[2], *run, "--duration", "1", *TINY]) == 0
    assert {row["video"] for row in table_of(out).values()} == set(videos), "earlier clips have lost their rows"
    (out / "clips.csv").write_text("clip,mine\n")
    capsys.readouterr()
    assert extract_features.main([videos[2], *run, "--duration", "1", *TINY]) == 0
    assert (out / "clips.csv").read_text() == "clip,mine\n" and "stays as it is" in capsys.readouterr().err


def test_recordings_are_paired_with_videos_by_name(clip_dir, tmp_path, capsys):
    """The sound beside the features is the recording's, of the same stretch; another recording is noticed."""
    sounds, out = tmp_path / "sounds", tmp_path / "out"
    sounds.mkdir()
    rate = 48_000
    for name, frequency in (("KNOCK_0", 440), ("other", 880)):
        tone = 0.5 * np.sin(2 * np.pi * frequency * np.arange(2 * rate) / rate)
        soundfile.write(sounds / f"{name}.wav", tone, rate)
    run = [str(clip_dir / "knock_0.mp4"), str(clip_dir / "knock_1.mp4"), "--output_dir", str(out), "--prompt", "x",
           "--start", "0.5", "--duration", "1", "--audio_dir", str(sounds), *TINY]
    assert extract_features.main(run) == 0
    err = capsys.readouterr().err
    assert "no recording for 1 of 2 videos" in err and "no video for other.wav" in err
    found, found_rate = soundfile.read(out / "knock_0.flac")
    expected, _ = soundfile.read(sounds / "KNOCK_0.wav")
    assert found_rate == rate
    np.testing.assert_allclose(found[:rate], expected[rate // 2 : rate // 2 + rate], atol=1e-4)
    assert table_of(out)["knock_0"]["sound_from"] == str(sounds / "KNOCK_0.wav")
    assert table_of(out)["knock_1"]["sound_from"] == str(clip_dir / "knock_1.mp4")
    assert extract_features.main(run) == 0 and capsys.readouterr().out == ""
    soundfile.write(sounds / "KNOCK_0.wav", expected / 2, rate)
    assert extract_features.main(run) == 0
    assert capsys.readouterr().out.split() == [str(out / "knock_0.npz")]
    np.testing.assert_allclose(soundfile.read(out / "knock_0.flac")[0][:rate], found[:rate] / 2, atol=1e-4)


@pytest.mark.parametrize("audio", ["extract", "copy"])
def test_a_silent_sound_is_named_in_every_run(clip_dir, tmp_path, capsys, audio):
    sounds, out = tmp_path / "sounds", tmp_path / "out"
    sounds.mkdir()
    soundfile.write(sounds / "knock_0.wav", np.zeros(96_000), 48_000)
    soundfile.write(sounds / "knock_1.wav", 0.1 * np.ones(96_000), 48_000)
    run = [str(clip_dir / "knock_0.mp4"), str(clip_dir / "knock_1.mp4"), "--output_dir", str(out), "--prompt", "x",
           "--audio", audio, "--duration", "1", "--audio_dir", str(sounds), *TINY]
    for again in (False, True):
        assert extract_features.main(run) == 0
        said = capsys.readouterr()
        assert (said.out == "") is again and "1 clip is silent, and training will refuse it: knock_0\n" in said.err
        reasons = [json.loads(line)["reason"] for line in (out / "manifest.jsonl").read_text().splitlines()]
        assert "its sound is silent" in reasons[0] and "silent" not in reasons[1]


def test_two_recordings_for_one_video_and_none_for_any_are_refused(clip_dir, tmp_path, capsys):
    run = [str(clip_dir / "knock_0.mp4"), "--output_dir", str(tmp_path / "out"), "--audio_dir", str(tmp_path), *TINY]
    (tmp_path / "bark.wav").touch()
    assert extract_features.main(run) == 2 and "such as knock_0.wav" in capsys.readouterr().err
    for name in ("knock_0.wav", "knock_0.flac"):
        (tmp_path / name).touch()
    assert extract_features.main(run) == 2 and "several recordings" in capsys.readouterr().err


def test_the_unused_rest_of_a_long_video_is_said_at_the_end_and_in_the_manifest(tmp_path, capsys):
    make_video(tmp_path / "long.mp4", 10.0, fps=8)
    out = tmp_path / "out"
    run = [str(tmp_path / "long.mp4"), "--output_dir", str(out), "--prompt", "x", "--audio", "none", *TINY]
    assert extract_features.main(run) == 0
    assert "only the beginning of 1 longer video is used; --windows" in capsys.readouterr().err
    (row,) = read_manifest(out / "manifest.jsonl")
    assert row["reason"] == "2.0 s of 10.0 s unused"
    assert extract_features.main([*run, "--duration", "1"]) == 0 and "longer video" not in capsys.readouterr().err
    table = tmp_path / "clips.tsv"
    table.write_text("id\tpath\tstart\tduration\nlong\tlong.mp4\t0\t2\n")
    chosen = [str(table), "--output_dir", str(tmp_path / "chosen"), "--prompt", "x", "--audio", "none", *TINY]
    assert extract_features.main(chosen) == 0 and "longer video" not in capsys.readouterr().err


def test_levels_are_said_in_one_line(tmp_path, capsys):
    for number in range(3):
        sound = np.clip(0.99 * np.sign(np.sin(np.arange(32_000) * (0.1 + 0.01 * number))), -1, 1)
        make_video(tmp_path / f"loud_{number}.mp4", 2.0, sound=sound.astype(np.float32)[None])
    run = [str(tmp_path), "--output_dir", str(tmp_path / "out"), "--prompt", "x", "--duration", "1", *TINY]
    assert extract_features.main(run) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "full scale" in line or "scaled" in line]
    assert len(lines) == 1 and "3 sounds went beyond full scale when decoded, by up to" in lines[0]


def test_other_prompts_travel_with_the_features_and_leave_those_alone(clip_dir, tmp_path, capsys):
    """Other programs read the one prompt as before; a changed list is extracted again."""
    for number in (4, 5):
        shutil.copy(clip_dir / f"knock_{number}.mp4", tmp_path)
    (tmp_path / "knock_5.txt").write_text("rap\ntap\na knock\n")
    run = [str(tmp_path), "--output_dir", str(tmp_path / "features"), *TINY]
    assert extract_features.main([*run, "--prompt", "a knock"]) == 0
    assert "1 clip has several prompts" in capsys.readouterr().err
    bundle = load_features(tmp_path / "features" / "knock_5.npz")
    assert bundle.prompt == "a knock" and bundle.other_prompts == ("rap", "tap")
    assert load_features(tmp_path / "features" / "knock_4.npz").other_prompts == ()
    with np.load(tmp_path / "features" / "knock_5.npz", allow_pickle=False) as data:
        assert str(data["prompt"]) == "a knock" and "other_prompts" not in data.files
    (clip,) = (clip for clip in scan_folder(tmp_path / "features").clips if clip.id == "knock_5")
    assert (clip.prompt, clip.other_prompts) == ("a knock", ("rap", "tap"))
    (tmp_path / "knock_5.txt").write_text("rap\na knock\n")
    assert extract_features.main([*run, "--prompt", "a knock"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "features" / "knock_5.npz")]
    assert torch.equal(load_features(tmp_path / "features" / "knock_5.npz").sync_features, bundle.sync_features)
    rows = [str(tmp_path), "--output_dir", str(tmp_path / "rows"), "--format", "memmap", "--prompt", "a knock", *TINY]
    assert extract_features.main(rows) in (0, 1)  # clips of 2 s are no rows of 8 s
    err = capsys.readouterr().err
    assert f"as {(tmp_path / 'rows.prompts.txt').resolve()}: knock_5" in err


def test_folders_whose_names_are_not_utf_8(old_folder, tmp_path, capsys):
    soundfile.write(tmp_path / "tone.wav", 0.2 * np.sin(np.arange(16_000) / 10), 16_000)
    shutil.copy(tmp_path / "tone.wav", old_folder / "tone.wav")
    for source, more in ((old_folder / "knock_5.mp4", []), (old_folder / "tone.wav", ["--sound_only"])):
        out = old_folder / source.stem
        run = [str(source), "--output_dir", str(out), "--prompt", "x", "--duration", "1", "--workers", "0", *TINY]
        assert extract_features.main([*run, *more]) == 0, capsys.readouterr().err
        assert names(out, ".npz") == names(out, ".flac") == [source.stem]
        (row,) = read_manifest(out / "manifest.jsonl")
        assert row["source"] == str(source)
        assert list(table_of(out)) == [source.stem]
        assert extract_features.main([*run, *more]) == 0 and "0 extracted, 1 already current" in capsys.readouterr().err
