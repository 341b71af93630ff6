import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.train_tiny import main
from selva.flow import SamplingConfig
from selva.models.textsynch import TextSynch
from selva.sampling import decode_latents, sample_latents
from selva.weights import load as weights
from toyworld.training.stages import STAGES, Recipe

ARGS = ["--scale", "0.001", "--steps", "2", "--batch_size", "2", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def short_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.train_tiny.Recipe", lambda: Recipe(codec_sec=1.5, sync_sec=1.5, generator_sec=2.56))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of a whole small training, and the folder of its exported weights."""
    folder = tmp_path_factory.mktemp("tiny")
    run, assets = folder / "run", folder / "assets"
    assert main(["--output_dir", str(run), "--export", str(assets), *ARGS]) == 0
    return run, assets


def test_every_stage_leaves_weights_and_metrics(trained):
    run, _ = trained
    for stage in STAGES:
        row = json.loads((run / stage / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["step"] == 2 and row["loss"] > 0 and len(row) > 4, stage  # with the measures of the stage
        assert torch.load(run / stage / "weights.pt", weights_only=True)


def test_the_export_is_what_the_package_loads(trained, monkeypatch):
    _, assets = trained
    assert sum(path.stat().st_size for path in assets.iterdir()) < 15_000_000
    assert {tensor.dtype for path in assets.iterdir() for tensor in load_file(path).values()} == {torch.float16}
    monkeypatch.setattr(weights, "ASSETS", assets)
    generator = weights.load_generator("tiny_16k")
    generator.set_sequence(40, 10, 8)
    text = weights.load_clip_text("tiny_16k").encode(["a bell rings"])
    clip = weights.load_clip_image("tiny_16k").encode(torch.rand(10, 3, 64, 64))[None]
    frames = torch.rand(1, 16, 3, 80, 80) * 2 - 1
    encoder = weights.load_video_encoder("tiny_16k")
    assert isinstance(encoder, TextSynch)
    sync = encoder.encode(frames, *weights.load_t5("tiny_16k").encode(["a bell rings"]))
    latents = sample_latents(generator, clip, sync, text, [0], SamplingConfig(num_steps=2))
    sound = decode_latents(latents, weights.load_vae("tiny_16k"), weights.load_vocoder("tiny_16k"))
    assert sound.shape == (1, 40 * 512) and sound.isfinite().all()


def test_finished_stages_are_left_alone_and_longer_ones_continue(trained, capsys):
    run, _ = trained
    before = (run / "vae" / "weights.pt").read_bytes()
    assert main(["--output_dir", str(run), "--stages", "vae", *ARGS]) == 0
    assert "vae: finished before" in capsys.readouterr().err and (run / "vae" / "weights.pt").read_bytes() == before
    assert main(["--output_dir", str(run), "--stages", "vae", *ARGS, "--steps", "3"]) == 0
    captured = capsys.readouterr()
    assert "vae: continues after 2 of 3 steps" in captured.err
    assert captured.out.split() == [str(run / "vae" / "weights.pt")]


def test_a_stage_needs_the_ones_before_it(tmp_path, capsys):
    assert main(["--output_dir", str(tmp_path), "--stages", "generator", *ARGS]) == 1
    assert "stage 'clip' has to be finished first" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_weights(trained, tmp_path):
    run, _ = trained
    args = ["--output_dir", str(tmp_path), "--stages", "clip"]
    assert main([*args, *ARGS]) == 0
    assert (tmp_path / "clip" / "weights.pt").read_bytes() == (run / "clip" / "weights.pt").read_bytes()
    assert main([*args, "--restart", *ARGS, "--seed", "1"]) == 0
    assert (tmp_path / "clip" / "weights.pt").read_bytes() != (run / "clip" / "weights.pt").read_bytes()


def test_wrong_usage_is_refused(tmp_path, capsys):
    assert main(["--output_dir", str(tmp_path), "--scale", "0"]) == 2
    assert main(["--output_dir", str(tmp_path), "--stages", "gan"]) == 2
    assert "--scale is 0.0" in capsys.readouterr().err
