"""infer.py: sound for videos, features and prompts, with and without adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from infer_run import run, sound
from make_media import clicks, decode, make_video
from script_args import TINY

import train_lora
from selva.checkpoint import save_adapter
from selva.inference import engine
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.lora.state import lora_parameters
from selva.media import mux
from selva.weights.load import load_generator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    model = load_generator("tiny_16k")
    inject_lora(model, LoRAConfig(rank=2), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("adapter") / "loud.pt"
    save_adapter(path, model, {"variant": "tiny_16k", "clip_features": "use", "steps": 1})
    return path


def test_a_video_gets_its_sound(clip_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--video", clip_dir / "knock_0.mp4", "--prompt", "a knock", "--output", out) == 0
    assert capsys.readouterr().out.split() == [str(out / "knock_0.flac"), str(out / "knock_0.mp4")]
    assert sorted(p.suffix for p in out.iterdir()) == [".flac", ".mp4", ".yaml"]
    info = soundfile.info(out / "knock_0.flac")
    assert (info.samplerate, info.frames, info.channels) == (16_000, 32_000, 1)
    frames, samples, rate = decode(out / "knock_0.mp4")
    assert len(frames) == 50 and rate == 16_000
    assert samples.shape[1] / rate == pytest.approx(2.0, abs=1024 / rate)


def test_the_same_seed_gives_the_same_bytes(clip_dir, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run("--video", clip_dir / "knock_0.mp4", "--prompt", "x", "--seed", seed, "--output",
                   tmp_path / f"{name}.flac") == 0
    a, b, c = (tmp_path / f"{n}.flac" for n in "abc")
    assert a.read_bytes() == b.read_bytes() and not np.array_equal(sound(a), sound(c))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_give_what_the_video_gives(clip_dir, feature_dir, tmp_path, precision):
    """Pitfall B5: features are float32, whatever the generator runs in."""
    more = ["--clip_features", "use", "--precision", precision]
    assert run("--video", clip_dir / "knock_0.mp4", "--prompt", "a knock", "--output", tmp_path / "v.wav", *more) == 0
    assert run("--features", feature_dir / "knock_0.npz", "--output", tmp_path / "f.wav", *more) == 0
    assert np.array_equal(sound(tmp_path / "v.wav"), sound(tmp_path / "f.wav"))


@pytest.mark.parametrize("duration, samples", [("8", 32_000), ("1", 16_000)])
def test_features_are_cut_but_never_stretched(feature_dir, tmp_path, capsys, duration, samples):
    """Pitfall B8: latent frames, CLIP frames and sync tokens follow from one duration, here at most 2 s."""
    path = tmp_path / "sound.wav"
    assert run("--features", feature_dir / "knock_0.npz", "--duration", duration, "--output", path) == 0
    assert soundfile.info(path).frames == samples
    said = "end before the length that was asked for, and the sound with them: " in (log := capsys.readouterr().err)
    assert said is (duration == "8") is ("knock_0.npz (2 instead of 8 s)" in log)


def test_without_an_adapter_selva_is_given_no_clip_features(feature_dir, tmp_path):
    """Pitfall B2."""
    for name, more in (("default", []), ("empty", ["--clip_features", "empty"]), ("use", ["--clip_features", "use"])):
        assert run("--features", feature_dir / "knock_0.npz", "--output", tmp_path / f"{name}.wav", *more) == 0
    default, empty, use = (sound(tmp_path / f"{name}.wav") for name in ("default", "empty", "use"))
    assert np.array_equal(default, empty) and not np.array_equal(default, use)


def test_a_prompt_alone(tmp_path, capsys):
    assert run("--prompt", "rain on: a roof", "--duration", "1.5", "--output", tmp_path) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.name == "rain_on_a_roof.flac" and soundfile.info(path).frames == 24_000


def test_strength_zero_is_the_base_model_and_one_is_not(feature_dir, tmp_path, adapter):
    base = ["--features", feature_dir / "knock_0.npz", "--clip_features", "use"]
    settings = {
        "none": [],
        "zero": ["--adapter", adapter, "--strength", "0"],
        "one": ["--adapter", adapter],
        "half": ["--adapter", adapter, "--strength", "0.5"],
        "halves": ["--adapter", adapter, "--strength", "0.25", "--adapter", adapter, "--strength", "0.25"],
    }
    for name, more in settings.items():
        assert run(*base, "--precision", "fp32", "--output", tmp_path / f"{name}.wav", *more) == 0
    sounds = {name: sound(tmp_path / f"{name}.wav") for name in settings}
    assert np.array_equal(sounds["none"], sounds["zero"])
    assert not np.array_equal(sounds["none"], sounds["one"]) and not np.array_equal(sounds["half"], sounds["one"])
    half, halves = sounds["half"] / 2**31, sounds["halves"] / 2**31
    assert np.linalg.norm(half - halves) < 1e-2 * np.linalg.norm(half - sounds["one"] / 2**31)


@pytest.mark.parametrize(
    "more", [["--negative_prompt", "music"], ["--cfg_strength", "1.0"], ["--cfg_strength", "0"], ["--num_steps", "4"],
             ["--clip_features", "use"], ["--prompt", "a bell"], ["--solver", "midpoint"], ["--solver", "heun"],
             ["--solver", "ab2"], ["--cfg_interval", "0.3", "1"], ["--normalize", "lufs"]]
)
def test_every_setting_changes_the_sound(feature_dir, tmp_path, more):
    assert run("--features", feature_dir / "knock_0.npz", "--output", tmp_path / "plain.wav") == 0
    assert run("--features", feature_dir / "knock_0.npz", "--output", tmp_path / "other.wav", *more) == 0
    assert not np.array_equal(sound(tmp_path / "plain.wav"), sound(tmp_path / "other.wav"))


def test_start_and_duration_cut_the_video(clip_dir, tmp_path):
    assert run("--video", clip_dir / "knock_0.mp4", "--prompt", "x", "--start", "0.4", "--duration", "1", "--output",
               tmp_path / "cut.mp4") == 0
    frames, samples, rate = decode(tmp_path / "cut.mp4")
    assert len(frames) == 25 and samples.shape[1] / rate == pytest.approx(1.0, abs=1024 / rate)
    assert not list(tmp_path.glob("*.flac"))


# -- picture and sound -------------------------------------------------------------------------------------------------


def stream_ends(path: Path) -> dict[str, float]:
    """Return the times at which the pictures and the sound of a file end, by its packets."""
    ends: dict[str, float] = {}
    with av.open(str(path)) as container:
        for packet in container.demux():
            if packet.pts is not None and not packet.is_discard:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                ends[packet.stream.type] = max(end, ends.get(packet.stream.type, 0.0))
    return ends


def coded_pictures(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("name, copied", [("whole.mp4", True), ("whole.mkv", True), ("old.avi", False)])
def test_the_video_has_both_streams_of_one_length(tmp_path, name, copied):
    """The pictures are copied where the container allows it, and encoded again where not."""
    video = make_video(tmp_path / name, 1.48)
    assert run("--video", video, "--prompt", "x", "--output", tmp_path / "out") == 0
    result = tmp_path / "out" / f"{video.stem}.mp4"
    ends = stream_ends(result)
    assert set(ends) == {"video", "audio"} and abs(ends["video"] - ends["audio"]) <= 1 / 25
    assert ends["video"] == pytest.approx(1.48, abs=0.041)  # AVI has no time stamps of its own
    assert (coded_pictures(result) == coded_pictures(video)) == copied
    assert soundfile.info(result.with_suffix(".flac")).frames == pytest.approx(1.48 * 16_000, abs=640)


@pytest.mark.parametrize("start, seconds", [(0.0, 4.0), (0.52, 3.0)])
def test_clicks_stay_on_the_flashes(tmp_path, monkeypatch, start, seconds):
    """A click track in place of the generated sound, through everything that writes, and decoded again."""
    flashes = [1.0, 1.6, 2.4, 3.2]
    bright = {round(time * 25) for time in flashes}
    video = make_video(tmp_path / "flash.mp4", 4.0, bframes=2,
                       pictures=lambda i: np.full((64, 64, 3), 255 if i in bright else 0, np.uint8))
    track = torch.from_numpy(clicks([time - start for time in flashes if time - start < seconds], seconds)[0])
    monkeypatch.setattr(engine, "decode_latents", lambda *_args, **_more: track[None])
    assert run("--video", video, "--prompt", "x", "--start", start, "--duration", seconds, "--output",
               tmp_path / "out") == 0
    frames, samples, rate = decode(tmp_path / "out" / "flash.mp4")
    seen = [time for time, picture in frames if picture.mean() > 127]
    loud = np.flatnonzero(np.abs(samples[0]) > 0.3 * np.abs(samples).max()) / rate
    heard = loud[np.diff(loud, prepend=-1) > 0.1]  # where each click begins
    assert len(seen) == len(heard) >= 3
    assert max(abs(a - b) for a, b in zip(seen, heard, strict=True)) < 0.020


@pytest.mark.parametrize("more, seconds, said", [
    ([], 8.0, True), (["--duration", "8"], 8.0, False), (["--long"], 9.0, False),
    (["--long", "--duration", "8.5"], 8.5, False),
])
def test_long_videos(tmp_path, capsys, more, seconds, said):
    video = make_video(tmp_path / "long.mp4", 9.0)
    assert run("--video", video, "--prompt", "x", *more, "--output", tmp_path / "out") == 0
    assert soundfile.info(tmp_path / "out" / "long.flac").frames == round(seconds * 16_000)
    assert stream_ends(tmp_path / "out" / "long.mp4")["video"] == pytest.approx(seconds, abs=0.041)
    assert ("only the first 8 s get sound in long.mp4 (9.0 s); --long" in capsys.readouterr().err) == said


def test_masks_hide_what_is_not_to_be_heard(clip_dir, tmp_path):
    mask = np.zeros((64, 96), np.uint8)
    mask[:, :40] = 1
    np.save(tmp_path / "mask.npy", mask)
    (tmp_path / "masks").mkdir()
    shutil.copy(tmp_path / "mask.npy", tmp_path / "masks" / "knock_0.npy")
    settings = {
        "none": [], "mask": ["--mask", "mask.npy"], "folder": ["--mask", "masks"],
        "off": ["--mask", "mask.npy", "--mask_strength", "0"],
        "clip": ["--mask", "mask.npy", "--no_mask_sync"], "sync": ["--mask", "mask.npy", "--no_mask_clip"],
    }
    sounds = {}
    for name, more in settings.items():
        more = [str(tmp_path / m) if m.startswith("mask") else m for m in more]
        assert run("--video", clip_dir / "knock_0.mp4", "--prompt", "x", "--clip_features", "use", *more, "--output",
                   tmp_path / f"{name}.wav") == 0
        sounds[name] = sound(tmp_path / f"{name}.wav").tobytes()
    assert sounds["none"] == sounds["off"] and sounds["mask"] == sounds["folder"]
    assert len({sounds[name] for name in ("none", "mask", "clip", "sync")}) == 4


def test_a_part_of_a_video_is_encoded_once_for_all_variations(tmp_path, monkeypatch):
    video, encoded = make_video(tmp_path / "a.mp4", 2.0, bframes=2), []
    original = mux._encoded_pictures
    monkeypatch.setattr(mux, "_encoded_pictures", lambda *args: encoded.append(1) or original(*args))
    assert run("--video", video, "--prompt", "x", "--start", "0.4", "--num_variations", "3", "--output", tmp_path) == 0
    results = [tmp_path / f"a_{number}.mp4" for number in (1, 2, 3)]
    assert len(encoded) == 1 and coded_pictures(results[0]) == coded_pictures(results[1]) == coded_pictures(results[2])
    assert [stream_ends(path)["video"] for path in results] == pytest.approx([1.6] * 3, abs=0.001)
    assert len({sound(path.with_suffix(".flac")).tobytes() for path in results}) == 3
    assert run("--video", video, "--prompt", "x", "--num_variations", "2", "--output", tmp_path / "whole") == 0
    assert len(encoded) == 1 and coded_pictures(tmp_path / "whole" / "a_2.mp4") == coded_pictures(video)


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_an_adapter_from_train_lora_changes_the_sound(feature_dir, tmp_path):
    quick = ["--steps", "4", "--batch_size", "2", "--rank", "2", "--lr", "1e-2", "--warmup_steps", "0"]
    assert train_lora.main(["--data_dir", str(feature_dir), "--output_dir", str(tmp_path / "run"), *TINY, *quick]) == 0
    trained = ["--adapter", tmp_path / "run" / "adapter_final.pt"]
    one = ["--features", feature_dir / "knock_0.npz", "--clip_features", "use"]
    for name, more in (("base", []), ("one", trained), ("zero", [*trained, "--strength", "0"])):
        assert run(*one, *more, "--output", tmp_path / f"{name}.wav") == 0
    base, one, zero = (sound(tmp_path / f"{name}.wav") for name in ("base", "one", "zero"))
    assert np.array_equal(base, zero) and not np.array_equal(base, one)


def test_strength_zero_needs_no_other_flag_to_be_the_base_model(feature_dir, tmp_path, adapter):
    for name, more in (("none", []), ("zero", ["--adapter", adapter, "--strength", "0"])):
        assert run("--features", feature_dir / "knock_0.npz", "--output", tmp_path / f"{name}.wav", *more) == 0
    assert (tmp_path / "none.wav").read_bytes() == (tmp_path / "zero.wav").read_bytes()


def test_a_comparison_is_what_single_runs_make(two_clips, tmp_path, adapter, capsys):
    """Exchanging adapters in one process leaves no trace: every sound equals, bit for bit, that of its own run."""
    (tmp_path / "list.txt").write_text(f"base  # as it comes\n{adapter} 0\n\n{adapter} 0.5 half\nbase\n")
    assert run(two_clips, "--prompt", "x", "--compare", tmp_path / "list.txt", "--output", tmp_path / "cmp") == 1
    assert "line 5: the label 'base' is used twice" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text(f"base  # as it comes\n{adapter} 0\n\n{adapter} 0.5 half\n")
    arguments = [two_clips, "--prompt", "x", "--compare", tmp_path / "list.txt", "--output", tmp_path / "cmp"]
    assert run(*arguments) == 0
    printed = [Path(line).relative_to(tmp_path / "cmp") for line in capsys.readouterr().out.splitlines()]
    settings = {"base": [], "loud 0": ["--adapter", adapter, "--strength", "0"],
                "half": ["--adapter", adapter, "--strength", "0.5"]}
    assert set(map(str, printed)) == {
        *(f"{label}/knock_{n}.{suffix}" for label in settings for n in (0, 5) for suffix in ("flac", "mp4")),
        "comparison.png", "comparison.json", "comparison.html",
    }
    for label, more in settings.items():
        assert run(two_clips, "--prompt", "x", "--clip_features", "use", *more, "--audio_only", "--output",
                   tmp_path / "single" / label) == 0
        for name in ("knock_0.flac", "knock_5.flac"):
            assert np.array_equal(sound(tmp_path / "cmp" / label / name), sound(tmp_path / "single" / label / name))
    content = json.loads((tmp_path / "cmp" / "comparison.json").read_text())
    assert [setting["label"] for setting in content["settings"]] == list(settings) and len(content["sounds"]) == 6
    assert all(one["has_reference"] and one["log_spectral_distance_db"] > 0 for one in content["sounds"])
    capsys.readouterr()
    assert run(*arguments) == 0
    assert "0 made, 6 already there" in capsys.readouterr().err
    assert json.loads((tmp_path / "cmp" / "comparison.json").read_text()) == content


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "give a video, --features or --prompt"),
        (["--video", "nowhere.mp4"], 2, "nowhere.mp4: no such file"),
        (["--prompt", "x", "--adapter", "{tmp}/run"], 2, "is a folder, expected a file; in it: adapter_final.pt"),
        (["--prompt", "x", "--adapter", "{tmp}/peft"], 2, "is a folder of PEFT; make a file of it: scripts/adapter"),
        (["--prompt", "x", "--prompts", "{tmp}"], 2, ": is a folder, expected a file"),
        (["--prompt", "x", "--output", "a.mp4"], 2, "a video is only written with --video"),
        (["--prompt", "x", "--output", "a.mp3"], 2, ".mp3 is not written; expected a name ending in"),
        (["--prompt", "x", "--strength", "1"], 2, "1 --strength for 0 --adapter"),
        (["--prompt", "x", "--num_steps", "0"], 2, "num_steps is 0"),
        (["--prompt", "x", "--duration", "0.1"], 2, "at least 0.64"),
        (["--prompt", "x", "--adapter", "{tmp}/junk.pt"], 1, "junk.pt"),
        (["--prompt", "x", "--adapter", "{tmp}/other.pt"], 1, "was trained for variant small_16k"),
        (["--video", "{tmp}/junk.pt", "--prompt", "x"], 1, "junk.pt"),
        (["{tmp}/junk.pt", "--features", "{tmp}/junk.pt"], 2, "give videos or --features, not both"),
        (["--prompt", "x", "--compare", "{tmp}/list", "--adapter", "{tmp}/other.pt"], 2, "adapters stand in its list"),
        (["--prompt", "x", "--compare", "{tmp}/list", "--output", "a.flac"], 2, "--compare writes a folder"),
        (["--prompt", "x", "--compare", "{tmp}/list"], 1, "line 2: nowhere.pt: no such file; line 3: the strength is"),
        (["{tmp}", "--prompt", "x"], 2, "no videos in this folder"),
        (["{tmp}/clips.tsv", "--prompt", "x"], 2, "clips.tsv"),
        (["--features", "{tmp}"], 2, "no .npz in this folder"),
        (["{tmp}/junk.pt", "{tmp}/list", "--prompt", "x", "--output", "a.flac"], 2, "is one file, but there are 2"),
        (["{tmp}/junk.pt", "--prompt", "x", "--variant", "small_16k"], 1, "video_enc_sup_5.pth"),  # not only the first
        (["--prompt", "x", "--reference", "{tmp}"], 2, "--reference belongs to --compare"),
        (["--prompt", "x", "--target", "-20"], 2, "together with --normalize"),
        (["--prompt", "x", "--cfg_interval", "0.5", "0.2"], 2, "cfg_interval is (0.5, 0.2)"),
        (["--prompt", "x", "--mask", "m.png"], 2, "belong to videos"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, adapter, arguments, code, message):
    """Pitfall H4 among them: an adapter of another variant is refused."""
    (tmp_path / "clips.tsv").write_text("name\nx\n")
    for place in ("run/adapter_final.pt", "peft/adapter_config.json"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).touch()
    (tmp_path / "list").write_text("base\nnowhere.pt 1\nother.pt x\n")
    (tmp_path / "junk.pt").write_bytes(b"<html>not found</html>")
    content = torch.load(adapter, weights_only=True)
    content["meta"]["variant"] = "small_16k"
    torch.save(content, tmp_path / "other.pt")
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    assert run(*arguments) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not (tmp_path / "out").exists()
