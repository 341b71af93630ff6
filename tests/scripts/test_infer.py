"""infer.py: sound for videos, features and prompts, with and without adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from make_media import decode
from script_args import TINY

import infer
from selva.checkpoint import save_adapter
from selva.lora import LoRAConfig, inject_lora, lora_parameters
from selva.weights import load_generator

QUICK = [*TINY, "--num_steps", "3"]


def run(*arguments: str) -> int:
    return infer.main([*QUICK, *map(str, arguments)])


def sound(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int32")[0]


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
def test_features_are_cut_but_never_stretched(feature_dir, tmp_path, duration, samples):
    """Pitfall B8: latent frames, CLIP frames and sync tokens follow from one duration, here at most 2 s."""
    path = tmp_path / "sound.wav"
    assert run("--features", feature_dir / "knock_0.npz", "--duration", duration, "--output", path) == 0
    assert soundfile.info(path).frames == samples


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
    np.testing.assert_allclose(sounds["half"] / 2**31, sounds["halves"] / 2**31, atol=1e-3)


@pytest.mark.parametrize(
    "more", [["--negative_prompt", "music"], ["--cfg_strength", "1.0"], ["--cfg_strength", "0"], ["--num_steps", "4"],
             ["--clip_features", "use"], ["--prompt", "a bell"]]
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


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "give a video, --features or --prompt"),
        (["--video", "nowhere.mp4"], 2, "nowhere.mp4: no such file"),
        (["--prompt", "x", "--output", "a.mp4"], 2, "a video is only written with --video"),
        (["--prompt", "x", "--output", "a.mp3"], 2, "expected a folder or a name ending in"),
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
        (["--prompt", "x", "--reference", "{tmp}"], 2, "--reference belongs to --compare"),
        (["--prompt", "x", "--target", "-20"], 2, "together with --normalize"),
        (["--prompt", "x", "--cfg_interval", "0.5", "0.2"], 2, "cfg_interval is (0.5, 0.2)"),
        (["--prompt", "x", "--mask", "m.png"], 2, "belong to videos"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, adapter, arguments, code, message):
    """Pitfall H4 among them: an adapter of another variant is refused."""
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
