"""infer.py for many clips: what is made again, what fails, what is never overwritten."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from infer_run import QUICK, run, sound
from make_media import decode, make_video

import infer
from selva.inference import engine

ROOT = Path(__file__).parents[2]


def manifest(folder: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return {row["id"]: row for row in rows}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "manifest.jsonl"}


def test_a_second_run_makes_only_what_is_missing_or_other(two_clips, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(two_clips, "--prompt", "a knock", "--output", out) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(out / f"knock_{n}.{s}") for n in (0, 5) for s in ("flac", "mp4")]
    first = times(out)
    assert run(two_clips, "--prompt", "a knock", "--output", out, "--batch_size", "1", "--offload", "none") == 0
    captured = capsys.readouterr()
    assert times(out) == first and captured.out.split() == printed and "0 made, 2 already there" in captured.err

    (out / "knock_0.mp4").unlink()  # as if the run had been stopped there
    make_video(two_clips / "knock_5.mp4", 1.0)  # other content under the same name
    assert run(two_clips, "--prompt", "a knock", "--output", out) == 0
    assert all(times(out)[name] != first[name] for name in first)
    second = times(out)
    assert run(two_clips / "knock_0.mp4", "--prompt", "a knock", "--seed", "1", "--output", out) == 0
    changed = {name for name, time in times(out).items() if time != second[name]}
    assert changed == {"knock_0.flac", "knock_0.mp4", "knock_0.yaml"}
    assert run(two_clips / "knock_0.mp4", "--prompt", "a knock", "--seed", "1", "--output", out, "--overwrite") == 0
    assert times(out)["knock_0.flac"] != second["knock_0.flac"]


def test_one_bad_clip_does_not_stop_the_others(two_clips, tmp_path, capsys):
    (two_clips / "a_bad.mp4").write_bytes(b"no video at all")
    assert run(two_clips, "--prompt", "a knock", "--output", tmp_path / "out", "--audio_only") == 1
    captured = capsys.readouterr()
    assert captured.out.split() == [str(tmp_path / "out" / f"knock_{n}.flac") for n in (0, 5)]
    assert "a_bad.mp4" in captured.err and "1 of 3 clips failed" in captured.err and "Traceback" not in captured.err
    rows = manifest(tmp_path / "out")
    assert list(rows) == ["a_bad", "knock_0", "knock_5"] and rows["a_bad"]["files"] == []
    assert [row["status"] for row in rows.values()] == ["failed", "done", "done"]
    assert [row["duration_sec"] for row in rows.values()] == pytest.approx([None, 2.0, 1.2])
    assert "a_bad.mp4" in rows["a_bad"]["reason"]
    make_video(two_clips / "a_bad.mp4", 1.0)
    assert run(two_clips, "--prompt", "a knock", "--output", tmp_path / "out", "--audio_only") == 0
    assert "1 made, 2 already there" in capsys.readouterr().err
    assert {row["status"] for row in manifest(tmp_path / "out").values()} == {"done"}


def test_a_manifest_of_another_program_is_never_replaced(two_clips, capsys):
    path = two_clips / "manifest.jsonl"
    path.write_text('{"audio_filepath": "knock_0.wav", "text": "a knock"}\n')
    assert run(two_clips, "--prompt", "a knock", "--audio_only", "--output", two_clips) == 1
    assert f"{path}: line 1 is no row of a manifest" in capsys.readouterr().err
    assert "audio_filepath" in path.read_text() and not list(two_clips.glob("*.flac"))


def test_a_folder_whose_name_is_not_utf_8(old_folder, tmp_path):
    assert run(old_folder, "--prompt", "a knock", "--output", old_folder / "out") == 0
    assert manifest(old_folder / "out")["knock_5"]["source"] == str(old_folder / "knock_5.mp4")
    assert (old_folder / "out" / "knock_5.flac").is_file()


def test_a_stopped_run_goes_on(two_clips, tmp_path, capsys, monkeypatch):
    save, saved = engine.Sound.save, []

    def stopped(sound, path):
        if saved:
            raise KeyboardInterrupt
        saved.append(path)
        return save(sound, path)

    arguments = [two_clips, "--prompt", "a knock", "--audio_only", "--output", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(engine.Sound, "save", stopped)
        assert run(*arguments) == 130
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    capsys.readouterr()
    assert run(*arguments) == 0
    captured = capsys.readouterr()
    assert "1 made, 1 already there" in captured.err and len(captured.out.split()) == 2
    assert {row["status"] for row in manifest(tmp_path / "out").values()} == {"done"}


def test_a_sound_that_is_not_finite_is_a_failure_of_its_clip(two_clips, tmp_path, capsys, monkeypatch):
    decode_latents = engine.decode_latents

    def broken(latents, *args, **more):
        return decode_latents(latents, *args, **more) * (float("nan") if latents.shape[1] < 60 else 1)

    monkeypatch.setattr(engine, "decode_latents", broken)  # for the shorter clip only
    assert run(two_clips, "--prompt", "a knock", "--output", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "knock_5: the sound has samples that are NaN" in captured.err and "Traceback" not in captured.err
    assert [Path(path).stem for path in captured.out.split()] == ["knock_0"] * 2


@pytest.mark.parametrize("where", ["read", "clip", "sync", "sample", "sample alone", "decode"])
def test_an_error_of_a_library_is_a_failure_of_its_clip(two_clips, tmp_path, capsys, monkeypatch, where):
    """A decoder's RuntimeError, or a graphics card without memory, does not end the batch."""
    extractor, generator = engine.FeatureExtractor, engine.SoundGenerator
    owner, name, is_bad = {
        "read": (extractor, "read", lambda path, *_: path.stem == "knock_5"),
        "clip": (extractor, "clip_features", lambda frames: len(frames) < 12),
        "sync": (extractor, "sync_features", lambda frames, _: len(frames) < 40),
        "sample": (generator, "sample", lambda items, *_: any(x.request.video.stem == "knock_5" for x in items)),
        "sample alone": (generator, "sample", lambda items, *_: len(items) > 1),
        "decode": (generator, "decode", lambda items, _: items[0].request.video.stem == "knock_5"),
    }[where]
    original = getattr(owner, name)

    def failing(self, *args):
        if is_bad(*args):
            raise RuntimeError("the library failed")
        return original(self, *args)

    monkeypatch.setattr(owner, name, failing)
    arguments = [two_clips, "--prompt", "a knock", "--clip_features", "use", "--audio_only", "--output", tmp_path / "o"]
    assert run(*arguments) == (0 if where == "sample alone" else 1)
    captured = capsys.readouterr()
    assert "the library failed" in captured.err and "Traceback" not in captured.err
    made = [Path(path).stem for path in captured.out.split()]
    if where == "sample alone":
        assert made == ["knock_0", "knock_5"] and "2 sounds cannot be generated together" in captured.err
    else:
        assert made == ["knock_0"] and "knock_5: the library failed" in captured.err
        assert [row["status"] for row in manifest(tmp_path / "o").values()] == ["done", "failed"]


@pytest.mark.parametrize("suffix", [".mov", ".m4v"])
def test_a_vp9_video_becomes_any_video(tmp_path, capsys, suffix):
    path = make_video(tmp_path / "v.webm", 1.0, codec="libvpx-vp9", options={"b": "2M", "cpu-used": "8"})
    assert run("--video", path, "--prompt", "x", "--output", tmp_path / f"out{suffix}") == 0
    frames, samples, rate = decode(tmp_path / f"out{suffix}")
    assert len(frames) == 25 and samples.shape[1] / rate == pytest.approx(1.0, abs=1024 / rate)


def test_a_sound_is_kept_when_its_video_cannot_be_written(clip_dir, tmp_path, capsys, monkeypatch):
    def refuse(_source, _waveform, _rate, path, *_):
        raise OSError(f"{path}: cannot be written (Invalid argument)")

    monkeypatch.setattr("selva.inference.request.mux_video", refuse)
    arguments = ["--video", clip_dir / "knock_0.mp4", "--prompt", "x", "--output"]
    (tmp_path / "out.flac").write_bytes(b"somebody's recording")
    assert run(*arguments, tmp_path / "out.mov") == 1
    assert "out.mov: cannot be written (Invalid argument); its sound is kept in" in capsys.readouterr().err
    assert (tmp_path / "out.flac").read_bytes() == b"somebody's recording"
    assert len(sound(tmp_path / "out_sound.flac")) == 32_000
    assert run(*arguments, tmp_path / "folder") == 1
    assert f"its sound is kept in {tmp_path / 'folder' / 'knock_0.flac'}" in capsys.readouterr().err
    assert np.array_equal(sound(tmp_path / "folder" / "knock_0.flac"), sound(tmp_path / "out_sound.flac"))
    monkeypatch.undo()
    assert run(*arguments, tmp_path / "folder") == 0  # not taken for finished
    assert (tmp_path / "folder" / "knock_0.mp4").exists()


def test_a_recording_is_not_replaced_by_mistake(feature_dir, tmp_path, capsys):
    recorded = (feature_dir / "knock_0.flac").read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(feature_dir / "knock_0.flac", out)
    assert run("--features", feature_dir / "knock_0.npz", "--output", out) == 2
    assert "knock_0.flac: there already, and not made by infer.py" in capsys.readouterr().err
    assert (out / "knock_0.flac").read_bytes() == recorded
    assert run("--features", feature_dir / "knock_0.npz", "--output", out, "--overwrite") == 0
    assert (out / "knock_0.flac").read_bytes() != recorded


def test_what_was_made_is_no_input_of_the_next_call(two_clips, caplog):
    words = (two_clips, "--recursive", "--prompt", "x", "--duration", "1.28", "--output", two_clips / "out")
    assert run(*words) == 0
    made = sorted(path.name for path in (two_clips / "out").iterdir())
    assert run(*words) == 0
    assert sorted(path.name for path in (two_clips / "out").iterdir()) == made
    assert "2 videos in" in caplog.text and "not taken, as the sounds of this call go there" in caplog.text


def test_only_the_very_file_that_is_named_may_be_replaced(tmp_path, capsys):
    """Two variations of take.flac are called take_1.flac and take_2.flac, which nobody has named."""
    own = tmp_path / "take_2.flac"
    own.write_text("a recording")
    words = ("--prompt", "x", "--duration", "1.28")
    assert run(*words, "--output", tmp_path / "take.flac", "--num_variations", "2") == 2
    assert "take_2.flac: there already, and not made by infer.py" in capsys.readouterr().err
    assert own.read_text() == "a recording"
    assert run(*words, "--output", own) == 0
    assert own.read_bytes()[:4] == b"fLaC"


def test_settings_of_the_user_are_never_replaced(tmp_path, capsys):
    mine = tmp_path / "dog.yaml"
    mine.write_text("prompt: a dog  # barks\nduration: 1.28\n")
    for more in ([], ["--overwrite"]):
        assert run("--config", mine, "--output", tmp_path / "dog.flac", *more) == 2
        assert "dog.yaml: not written by infer.py, but the settings of the sound would replace it" in \
            capsys.readouterr().err
    assert mine.read_text().startswith("prompt: a dog  # barks")
    assert run("--config", mine, "--output", tmp_path / "bark.flac") == 0
    assert run("--config", tmp_path / "bark.yaml", "--seed", "3") == 0  # its own settings


@pytest.mark.parametrize("output", ["", "knock_0.flac", "knock_0.wav"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_the_sound_that_features_are_trained_with_is_never_replaced(feature_dir, capsys, output, more):
    recorded = (feature_dir / "knock_0.flac").read_bytes()
    assert run("--features", feature_dir / "knock_0.npz", "--output", feature_dir / output, *more) == 2
    error = capsys.readouterr().err
    assert "lies beside features of its name" in error and "knock_0.npz" in error
    assert (feature_dir / "knock_0.flac").read_bytes() == recorded and not (feature_dir / "knock_0.wav").exists()


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--num_variations", "2", "--overwrite"]])
def test_no_input_is_ever_a_target(two_clips, capsys, monkeypatch, more):
    """Neither a clip's own video, nor that of another clip: the first variation of dog.mp4 is called dog_1.mp4."""
    shutil.copy(two_clips / "knock_5.mp4", two_clips / "knock_0_1.mp4")
    before = {path: path.read_bytes() for path in two_clips.iterdir()}
    monkeypatch.setattr(engine.SoundGenerator, "sample", None)  # it is told before
    assert run(two_clips, "--prompt", "x", "--output", two_clips, *more) == 2
    error = capsys.readouterr().err
    assert "knock_0_1.mp4: would be replaced" in error or "knock_0_1.mp4, " in error
    assert "--overwrite" not in error and {path: path.read_bytes() for path in two_clips.iterdir()} == before


def test_links_to_an_input_are_that_input(two_clips, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "knock_0.mp4").symlink_to(two_clips / "knock_0.mp4")
    assert run(two_clips / "knock_0.mp4", "--prompt", "x", "--output", out, "--overwrite") == 2
    assert "is itself an input" in capsys.readouterr().err


def test_a_negative_prompt_without_guidance_is_named(tmp_path, capsys):
    assert run("--prompt", "x", "--negative_prompt", "music", "--cfg_strength", "0", "--output", tmp_path) == 0
    assert "--negative_prompt 'music' has no effect" in capsys.readouterr().err


def test_a_table_says_prompt_start_and_duration(clip_dir, tmp_path, capsys):
    table = tmp_path / "clips.tsv"
    table.write_text(f"id\tpath\tprompt\tstart\tduration\nfirst\t{clip_dir}/knock_0.mp4\ta gong\t0.4\t1\n"
                     f"second\t{clip_dir}/knock_0.mp4\t\t\t\n")
    assert run(table, "--prompt", "a knock", "--output", tmp_path / "out") == 0
    assert [Path(p).name for p in capsys.readouterr().out.split()] == [
        "first.flac", "first.mp4", "second.flac", "second.mp4"
    ]
    lengths = [soundfile.info(tmp_path / "out" / f"{name}.flac").frames for name in ("first", "second")]
    assert lengths == [16_000, 32_000] and list(manifest(tmp_path / "out")) == ["first", "second"]
    alone = ["--video", clip_dir / "knock_0.mp4", "--prompt", "a gong", "--start", "0.4", "--duration", "1"]
    assert run(*alone, "--output", tmp_path / "alone.flac") == 0
    assert np.array_equal(sound(tmp_path / "alone.flac"), sound(tmp_path / "out" / "first.flac"))
    first = tmp_path / "out" / "first.flac"
    first.unlink()
    assert infer.main(["--config", str(first.with_suffix(".yaml"))]) == 0
    assert np.array_equal(sound(tmp_path / "alone.flac"), sound(first))  # under its own name, not the video's


def test_typed_words_win_for_a_named_video_and_its_own_in_a_folder(two_clips, tmp_path):
    (two_clips / "knock_0.txt").write_text("a sidecar")
    for source, expected in ((two_clips / "knock_0.mp4", "typed"), (two_clips, "a sidecar")):
        assert run(source, "--prompt", "typed", "--output", tmp_path / "out", "--audio_only") == 0
        assert f"prompt: {expected}" in (tmp_path / "out" / "knock_0.yaml").read_text()


def test_variations_have_numbers_and_seeds_of_their_own(feature_dir, tmp_path, capsys):
    out, one = tmp_path / "out", ["--features", feature_dir / "knock_0.npz", "--precision", "fp32"]
    assert run(*one, "--num_variations", "3", "--seed", "7", "--output", out) == 0
    printed = [Path(path).name for path in capsys.readouterr().out.split()]
    assert printed == ["knock_0_1.flac", "knock_0_2.flac", "knock_0_3.flac"]
    sounds = [sound(out / name) / 2**31 for name in printed]
    for number, seed in ((0, 7), (2, 9)):
        assert run(*one, "--seed", seed, "--output", tmp_path / "alone.wav") == 0
        alone = sound(tmp_path / "alone.wav") / 2**31
        # A batch rounds differently, and finding phases for a mel multiplies that; another seed is another sound.
        assert np.linalg.norm(sounds[number] - alone) < 1e-2 * np.linalg.norm(alone)
    assert np.linalg.norm(sounds[0] - sounds[1]) > 0.1 * np.linalg.norm(sounds[0])


def test_the_settings_beside_a_sound_make_it_again(two_clips, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(two_clips, "--prompt", "a knock", "--num_variations", "2", "--batch_size", "1", "--output", out) == 0
    names = ("knock_5_2.flac", "knock_5_2.mp4")
    before = [(out / name).read_bytes() for name in names]
    again = ["--config", str(out / "knock_5_2.yaml")]
    capsys.readouterr()
    assert infer.main(again) == 0 and "1 already there" in capsys.readouterr().err
    for name in names:
        (out / name).unlink()
    everything = {path.name for path in out.iterdir()} | set(names)
    assert infer.main(again) == 0
    assert [(out / name).read_bytes() for name in names] == before
    assert {path.name for path in out.iterdir()} == everything


def test_a_single_sound_can_have_a_name(feature_dir, tmp_path, capsys):
    one = ["--features", feature_dir / "knock_0.npz"]
    assert run(*one, "--name", "take v1.2", "--output", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"take v1.2.flac", "take v1.2.yaml"}
    for arguments, said in (
        (["--features", feature_dir, "--name", "x"], "--name x: is one name, but there are 6 clips"),
        ([*one, "--name", "a/b"], "--name a/b: an id is a file name"),
        ([*one, "--name", "x", "--output", tmp_path / "y.flac"], "the file has a name already"),
    ):
        assert run(*arguments) == 2 and said in capsys.readouterr().err


def test_a_folder_of_features(feature_dir, tmp_path, capsys):
    assert run("--features", feature_dir, "--output", tmp_path / "out") == 0
    assert len(capsys.readouterr().out.split()) == 6 and len(manifest(tmp_path / "out")) == 6


def test_paths_go_to_stdout_and_everything_else_to_stderr(tmp_path):
    command = [sys.executable, str(ROOT / "infer.py"), *QUICK, "--prompt", "x", "--duration", "1", "--output", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "out/x.flac\n"
    assert "sampling" in done.stderr and "peak memory" in done.stderr and "dBTP" in done.stderr
