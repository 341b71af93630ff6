"""train_lora.py on extracted features, in-process and killed from outside."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from script_args import TINY

import infer
import train_lora
from selva import cli
from selva.checkpoint import load_adapter
from selva.flow import SamplingConfig
from selva.lora.layers import lora_layers
from selva.training import run_folder, setup
from selva.training import sample as preview
from selva.training.config import RunConfig
from selva.weights import load as weights

ROOT = Path(__file__).parents[2]
QUICK = [*TINY, "--steps", "4", "--batch_size", "2", "--warmup_steps", "1", "--save_every", "2", "--val_every", "2",
         "--rank", "2", "--log_every", "1"]


def train(data: Path, out: Path, *more: str) -> int:
    return train_lora.main(["--data_dir", str(data), "--output_dir", str(out), *QUICK, *more])


def distance(first, second):
    """Return the length of the difference of two adapters, all their tensors taken as one vector."""
    assert first.keys() == second.keys()
    return torch.cat([(first[key] - second[key]).flatten() for key in first]).norm().item()


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_adapter(path).tensors)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_writes_everything_it_promises(feature_dir, tmp_path, capsys):
    """Pitfalls G1 and G2: a 16 kHz model in the default precision, bfloat16, also on a CPU."""
    out = tmp_path / "run"
    assert train(feature_dir, out) == 0
    written = {p.name for p in out.iterdir()}
    assert written == {
        "adapter_step00002.pt", "adapter_step00004.pt", "adapter_best.pt", "adapter_final.pt", "meta.json",
        "metrics.jsonl", "config.yaml", "loss_raw.png", "loss_smoothed.png", "report.html", "README.md",
        "sample_step00002.wav", "sample_step00002.png", "sample_step00004.wav", "sample_step00004.png",
    } - ({"adapter_best.pt"} - written)
    stdout, stderr = capsys.readouterr()
    assert stdout.strip() == str(out / "adapter_final.pt")
    assert "8 layers adapted" in stderr and "5 clips to train on, 1 held out" in stderr and "step 4/4" in stderr

    adapter = load_adapter(out / "adapter_final.pt")
    assert len(adapter.layer_names()) == 8 and all(name.endswith("attn.qkv") for name in adapter.layer_names())
    assert same(tensors(out / "adapter_final.pt"), tensors(out / "adapter_step00004.pt"))
    meta = json.loads((out / "meta.json").read_text())
    published = {"variant", "rank", "alpha", "target", "steps", "timestep_mode", "logit_normal_sigma",
                 "curriculum_switch", "lora_dropout", "lora_plus_ratio"}
    assert published <= meta.keys() and meta["clip_features"] == "use"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in rows if "val_loss" in r] == [0, 2, 4]
    info = soundfile.info(out / "sample_step00002.wav")
    assert info.samplerate == 16_000 and info.frames > 16_000


def test_the_defaults_are_those_of_the_base_models_but_for_the_times():
    """Pitfalls A3, A4, C1, C2, E3, F10: what the published trainer has as an option or not at all is the default.

    Times are uniform, as that trainer has them: new sounds were learned no worse so (docs/findings.md).
    """
    args = train_lora.build_parser().parse_args(["--data_dir", "."])
    run = cli.config_from(RunConfig, args)
    config, lora_config = run.training, run.lora
    assert (config.timestep_mode, config.logit_normal_sigma, config.null_prob, config.latent) == (
        "uniform", 1.0, 0.1, "sample")
    assert (config.weight_decay, config.betas, args.normalize_audio) == (1e-6, (0.9, 0.95), "peak")
    assert lora_config.init == "standard" and [lora_config.scale(rank) for rank in (4, 128)] == [1.0, 1.0]


def test_only_what_is_needed_is_loaded(feature_dir, tmp_path, monkeypatch):
    """Pitfalls G1 and H3: no vocoder to encode sound, no encoder without work, never the image tower."""
    loaded = []
    load = weights._load
    monkeypatch.setattr(weights, "_load", lambda name, part, *rest, **more: (
        loaded.append(part), load(name, part, *rest, **more))[1])
    assert train(feature_dir, tmp_path / "a", "--no_preview", "--steps", "1") == 0
    assert sorted(loaded) == ["generator", "vae"]  # the features hold their text
    loaded.clear()
    (feature_dir / "prompts.txt").write_text("knock_0.npz: another prompt\n")
    assert train(feature_dir, tmp_path / "b", "--no_preview", "--steps", "1") == 0
    assert sorted(loaded) == ["clip_text", "generator"]  # the sound is encoded already


def test_samples_have_guidance_and_a_held_out_clip(feature_dir, tmp_path, capsys, monkeypatch):
    """Pitfall I1: a sample is made as infer.py would make it, of a clip that is not trained on, with fixed noise."""
    calls = []
    sample = preview.sample_latents

    def record(generator, clip_f, sync_f, text_f, seeds, config, **options):
        calls.append((seeds, config))
        return sample(generator, clip_f, sync_f, text_f, seeds, config, **options)

    monkeypatch.setattr(preview, "sample_latents", record)
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for path in feature_dir.glob("knock_5.*"):  # the only clip of 1.2 s
        path.rename(held_out / path.name)
    assert train(feature_dir, tmp_path / "run", "--val_dir", str(held_out)) == 0
    assert "5 clips to train on, 1 held out" in capsys.readouterr().err
    (seeds, config), second = calls
    assert (seeds, config) == second and config == SamplingConfig() and config.cfg_strength == 4.5
    assert soundfile.info(tmp_path / "run" / "sample_step00004.wav").duration == pytest.approx(1.2, abs=0.04)


def test_the_settings_file_of_a_run_repeats_it(feature_dir, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(feature_dir, one, "--no_preview") == 0
    assert train_lora.main(["--config", str(one / "config.yaml"), "--output_dir", str(two)]) == 0
    assert same(tensors(one / "adapter_final.pt"), tensors(two / "adapter_final.pt"))


def test_every_published_flag_is_accepted(feature_dir, tmp_path):
    assert train(feature_dir, tmp_path / "run", "--no_preview", "--alpha", "4", "--target", "attn.qkv", "linear1",
                 "--lr", "1e-3", "--grad_accum", "2", "--precision", "fp32", "--seed", "7", "--timestep_mode",
                 "curriculum", "--logit_normal_sigma", "0.5", "--curriculum_switch", "0.5", "--lora_dropout", "0.1",
                 "--lora_plus_ratio", "4") == 0
    config = json.loads((tmp_path / "run" / "meta.json").read_text())["lora_config"]
    assert (config["alpha"], config["targets"], config["dropout"]) == (4.0, ["attn.qkv", "linear1"], 0.1)


@pytest.mark.parametrize("extra", [["--dora"], ["--init", "pissa"], ["--rslora"]])
def test_adapters_of_every_kind_reach_inference(feature_dir, tmp_path, extra, capsys):
    out = tmp_path / "run"
    target = ["--target", "attn.qkv:4", "attn+mlp"]
    assert train(feature_dir, out, "--no_preview", "--lr", "0.01", *target, *extra) == 0
    assert "ComfyUI-SelVA will refuse this adapter" in capsys.readouterr().err
    written = json.loads((out / "meta.json").read_text())["target"]
    assert written == ["attn.qkv", "linear1", "ffn.w1", "ffn.w2", "ffn.w3"]
    sounds = []
    for more in ([], ["--adapter", str(out / "adapter_final.pt")]):
        path = tmp_path / "sound.wav"
        assert infer.main([*TINY, "--features", str(feature_dir / "knock_0.npz"), "--num_steps", "2", "--clip_features",
                           "use", "--output", str(path), *more]) == 0
        sounds.append(path.read_bytes())
    assert sounds[0] != sounds[1]


def test_tensorboard_is_asked_for_only_when_wanted(feature_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(feature_dir, tmp_path / "a", "--no_preview") == 0
    assert train(feature_dir, tmp_path / "b", "--no_preview", "--tensorboard") == 1
    assert "pip install tensorboard" in capsys.readouterr().err


def test_resume_gives_the_same_bits_and_keeps_the_finished_adapter(feature_dir, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(feature_dir, whole, "--no_preview", "--lora_dropout", "0.1") == 0
    assert train(feature_dir, parts, "--no_preview", "--lora_dropout", "0.1", "--steps", "2") == 0
    assert train(feature_dir, parts, "--no_preview", "--lora_dropout", "0.1", "--resume", "auto") == 0
    assert same(tensors(whole / "adapter_final.pt"), tensors(parts / "adapter_final_001.pt"))
    assert yaml.safe_load((parts / "config.yaml").read_text())["resume"] is None  # a run like it begins anew
    assert not same(tensors(whole / "adapter_final.pt"), tensors(parts / "adapter_final.pt"))
    rows = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]


def test_sounds_to_preserve_are_trained_on_and_resumed_exactly(feature_dir, tmp_path, capsys):
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))
    preserve = ("--no_preview", "--preserve", "rain", "a bell", "--preserve_share", "0.4")
    assert train(feature_dir, plain, "--no_preview", "--preserve_near", "0.5") == 0
    assert "--preserve_near 0.5 has no effect without --preserve" in capsys.readouterr().err
    assert train(feature_dir, whole, *preserve) == 0
    assert train(feature_dir, parts, *preserve, "--steps", "2") == 0
    assert train(feature_dir, parts, *preserve, "--resume", "auto") == 0
    assert same(tensors(whole / "adapter_final.pt"), tensors(parts / "adapter_final_001.pt"))
    assert not same(tensors(whole / "adapter_final.pt"), tensors(plain / "adapter_final.pt"))
    meta = json.loads((whole / "meta.json").read_text())
    assert meta["preserve"] == ["rain", "a bell"] and meta["preserve_share"] == 0.4 and meta["num_clips"] == 5
    assert train(feature_dir, parts, "--no_preview", "--resume", "auto", "--steps", "9") == 1
    assert "preserve was ['rain', 'a bell'] and is [] now" in capsys.readouterr().err
    other = ("--preserve_near", "0.5", "--resume", "auto", "--steps", "9")
    assert train(feature_dir, parts, *preserve, *other) == 1
    assert "preserve_near was 0.0 and is 0.5 now" in capsys.readouterr().err


def test_a_run_of_before_goes_on_with_its_way_to_make_sounds_to_preserve(feature_dir, tmp_path, capsys, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    preserve = ("--no_preview", "--preserve", "rain", "a bell")
    with monkeypatch.context() as then:
        then.setattr(setup, "UNGUIDED", setup.EARLIER_UNGUIDED)
        assert train(feature_dir, whole, *preserve) == 0
        assert train(feature_dir, parts, *preserve, "--steps", "2") == 0
    step_file = parts / "adapter_step00002.pt"
    content = torch.load(step_file, weights_only=True)
    assert (content["meta"].pop("preserve_solver"), content["meta"].pop("preserve_steps")) == ("euler", 25)
    torch.save(content, step_file)
    assert train(feature_dir, parts, *preserve, "--resume", str(step_file)) == 0
    assert "sounds to preserve are made by 25 steps of euler, as when the run began" in capsys.readouterr().err
    assert same(tensors(whole / "adapter_final.pt"), tensors(parts / "adapter_final_001.pt"))
    assert train(feature_dir, parts, *preserve, "--resume", "auto", "--steps", "5") == 0
    meta = json.loads((parts / "meta.json").read_text())
    assert (meta["preserve_solver"], meta["preserve_steps"]) == ("euler", 25)
    assert train(feature_dir, tmp_path / "now", *preserve) == 0
    meta = json.loads((tmp_path / "now" / "meta.json").read_text())
    assert (meta["preserve_solver"], meta["preserve_steps"]) == ("ab2", 12)
    assert not same(tensors(whole / "adapter_final.pt"), tensors(tmp_path / "now" / "adapter_final.pt"))


def test_a_probed_rate_is_said_kept_and_resumed_exactly(feature_dir, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    probing = ("--no_preview", "--lr_probe", "--lr", "0.5")
    assert train(feature_dir, whole, *probing) == 0
    assert "where the loss of 4 fixed batches was lowest" in capsys.readouterr().err
    rate = json.loads((whole / "meta.json").read_text())["train_config"]["lr"]
    assert 1e-5 < rate < 0.4 and yaml.safe_load((whole / "config.yaml").read_text())["lr"] == rate
    assert train(feature_dir, parts, *probing, "--steps", "2") == 0
    capsys.readouterr()
    assert train(feature_dir, parts, *probing, "--resume", "auto") == 0
    told = capsys.readouterr().err
    assert f"learning rate {rate:.2e}, as it was chosen when the run began" in told and "fixed batches" not in told
    assert same(tensors(whole / "adapter_final.pt"), tensors(parts / "adapter_final_001.pt"))
    assert train(feature_dir, tmp_path / "other", *probing, "--init_from", str(whole / "adapter_final.pt")) == 2


def test_a_fresh_start_moves_the_old_run_aside(feature_dir, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(feature_dir, out, "--no_preview") == 0
    before = tensors(out / "adapter_final.pt")
    assert train(feature_dir, out, "--no_preview", "--seed", "1") == 0
    assert same(before, tensors(out / "previous_001" / "adapter_final.pt"))
    assert "previous_001" in capsys.readouterr().err and (out / "adapter_final.pt").exists()


def test_resuming_with_another_adapter_shape_is_refused(feature_dir, tmp_path, capsys):
    """Pitfall F7."""
    out = tmp_path / "run"
    assert train(feature_dir, out, "--no_preview", "--steps", "2") == 0
    assert train(feature_dir, out, "--no_preview", "--resume", "auto", "--rank", "4") == 1
    assert "rank was 2 and is 4 now" in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143),
                                          (getattr(signal, "SIGHUP", signal.SIGTERM), 143)])
def test_a_signal_ends_in_a_state_to_resume_from(feature_dir, tmp_path, number, code):
    """Pitfall F8: at any step, also for a single one more."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train_lora.py"), "--data_dir", str(feature_dir), "--output_dir", str(out),
               *QUICK, "--no_preview", "--steps", "100000", "--save_every", "100000", "--val_every", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, SIGHUP is ignored, and what is started inherits that
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.signal(number, before)
    try:
        for line in process.stderr:
            if line.startswith("step 2/"):
                process.send_signal(number)
                break
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    (saved,) = out.glob("adapter_step*.pt")
    step = int(saved.stem.removeprefix("adapter_step"))
    meta = load_adapter(saved).meta
    assert (meta["step"], meta["steps"]) == (step, 100_000)  # what was done, and what was planned
    assert train(feature_dir, out, "--no_preview", "--resume", "auto", "--steps", str(step + 1)) == 0


def test_killed_runs_leave_no_half_written_file(feature_dir, tmp_path):
    """Pitfall F8."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train_lora.py"), "--data_dir", str(feature_dir), "--output_dir", str(out),
               *QUICK, "--no_preview", "--steps", "100000", "--save_every", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while len(list(out.glob("adapter_step*.pt"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    files = list(out.glob("adapter_*.pt"))
    assert len(files) >= 3
    for path in files:
        load_adapter(path)


def test_two_processes_train_as_one_with_the_same_global_batch(feature_dir, tmp_path):
    settings = ["--no_preview", "--precision", "fp32", "--val_every", "2", "--grad_accum", "2", "--lr", "1e-2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(feature_dir, one, *settings, "--batch_size", "2") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train_lora.py"), "--data_dir", str(feature_dir), "--output_dir", str(two), *QUICK, *settings,
               "--batch_size", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(two / "adapter_final.pt")]
    assert result.stderr.count("step 4/4") == 1
    # Sums over the batch are taken in another order, and Adam turns that rounding into steps: what counts is how small
    # the difference is beside the way that the training went between its two step files.
    final = tensors(one / "adapter_final.pt")
    moved = distance(final, tensors(one / "adapter_step00002.pt"))
    assert distance(final, tensors(two / "adapter_final.pt")) < 1e-3 * moved
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    losses = [[row.get("loss", row.get("val_loss")) for row in of_one_run] for of_one_run in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_dry_run_writes_nothing(feature_dir, tmp_path, capsys):
    before = sorted(p.name for p in feature_dir.iterdir())
    assert train(feature_dir, tmp_path / "run", "--dry_run") == 0
    err = capsys.readouterr().err
    assert "8 layers adapted" in err and "s/step" in err and "nothing was written" in err
    assert "tiny_16k hardly learns at a rate of 0.0001, which is for the published models; configs/tiny_new_sou" in err
    said = ("a step on an NVIDIA GPU in", "largest --batch_size for", "held out")
    first, then, last = map(err.index, said)
    assert first < then < last  # before anything is read
    assert not (tmp_path / "run").exists() and sorted(p.name for p in feature_dir.iterdir()) == before
    assert train(feature_dir, tmp_path / "run", "--dry_run", "--lr", "1e-3") == 0
    assert "hardly learns" not in capsys.readouterr().err


def test_how_many_blocks_are_recomputed(feature_dir, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("selva.training.train.estimate", lambda run: seen.append(run.generator.gradient_checkpointing))
    for flags in ((), ("--grad_checkpointing",), ("--checkpoint_blocks", "2")):
        assert train(feature_dir, tmp_path / "run", "--dry_run", *flags) == 0
    assert seen == [False, True, 2]


def test_compiling_is_refused_where_nothing_can_compile(feature_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no_such_compiler")
    assert train(feature_dir, tmp_path / "run", "--compile") == 1
    assert "--compile needs a C++ compiler (no_such_compiler)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sounds_to_preserve_are_made_by_the_base_model_and_compiled_is_what_is_trained(
    feature_dir, tmp_path, monkeypatch
):
    """An adapter that has learned nothing adds nothing to these sounds but time."""
    happened = []
    monkeypatch.setattr("selva.training.train.prepare_to_compile", lambda device: happened.append(str(device)))
    monkeypatch.setattr("selva.training.setup.compile_blocks_", lambda g: happened.append(("compile", adapted(g))))
    monkeypatch.setattr("selva.training.setup.with_preserved",
                        lambda g, clips, *a, **k: happened.append(("preserve", adapted(g))) or clips)

    def adapted(generator) -> bool:
        return any(True for _ in lora_layers(generator))

    assert train(feature_dir, tmp_path / "run", "--dry_run", "--compile", "--preserve", "rain") == 0
    assert happened == ["cpu", ("preserve", False), ("compile", True)]


def test_clips_of_another_folder_can_be_held_out(feature_dir, tmp_path, capsys):
    assert train(feature_dir, tmp_path / "run", "--no_preview", "--val_dir", str(feature_dir)) == 0
    assert "6 clips to train on, 6 held out" in capsys.readouterr().err


def test_only_the_last_step_files_are_kept(feature_dir, tmp_path):
    assert train(feature_dir, tmp_path / "run", "--no_preview", "--save_every", "1", "--keep_last", "2") == 0
    names = sorted(p.name for p in (tmp_path / "run").glob("adapter_step*"))
    assert names == ["adapter_step00003.pt", "adapter_step00004.pt"]


def test_a_full_disk_is_survived(feature_dir, tmp_path, capsys, monkeypatch):
    real = run_folder.save_checkpoint

    def save(path, *args, **kwargs):
        if path.name == "adapter_step00002.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(run_folder, "save_checkpoint", save)
    assert train(feature_dir, tmp_path / "run", "--no_preview") == 0
    assert "the disk is full" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").glob("adapter_step*")] == ["adapter_step00004.pt"]


def test_a_sample_that_cannot_be_made_does_not_end_the_run(feature_dir, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("the sound is not finite")

    monkeypatch.setattr("selva.training.sample.TrainingSample.write", fail)
    assert train(feature_dir, tmp_path / "run") == 0
    assert "no sample at step 2: the sound is not finite" in capsys.readouterr().err


def test_a_disk_without_room_is_refused_before_training(feature_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    assert train(feature_dir, tmp_path / "run", "--no_preview") == 1
    assert "0 MiB are free" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_finished_run_is_continued_only_with_more_steps(feature_dir, tmp_path, capsys):
    """Pitfall F8: a finished run goes on from its last step file."""
    out = tmp_path / "run"
    assert train(feature_dir, out, "--no_preview") == 0
    assert train(feature_dir, out, "--no_preview", "--resume", "auto") == 1
    assert "give a larger --steps" in capsys.readouterr().err
    before = tensors(out / "adapter_final.pt")
    (out / "adapter_final.pt").unlink()  # as if killed between the last step and the result
    assert train(feature_dir, out, "--no_preview", "--resume", "auto") == 0
    assert same(before, tensors(out / "adapter_final.pt"))


def test_settings_that_change_what_is_learned_may_not_change(feature_dir, tmp_path, capsys):
    """Pitfall F7."""
    out = tmp_path / "run"
    assert train(feature_dir, out, "--no_preview", "--steps", "2") == 0
    assert train(feature_dir, out, "--no_preview", "--resume", "auto", "--null_prob", "0.5", "--latent", "mode") == 1
    err = capsys.readouterr().err
    assert "null_prob was 0.1 and is 0.5 now" in err and "latent was 'sample' and is 'mode' now" in err


def test_changed_clips_are_refused_and_a_new_run_starts_from_the_adapter(feature_dir, tmp_path, capsys):
    out, new = tmp_path / "run", tmp_path / "new"
    assert train(feature_dir, out, "--no_preview", "--steps", "2", "--lr", "1e-2") == 0
    resume = ("--no_preview", "--resume", "auto")
    capsys.readouterr()
    assert train(feature_dir, out, *resume, "--duration", "1.2") == 1
    assert "another length or other windows (--duration): knock_" in capsys.readouterr().err
    (feature_dir / "prompts.txt").write_text("knock_5.npz: a bell\n")
    assert train(feature_dir, out, *resume) == 1
    err = capsys.readouterr().err
    assert "another prompt: knock_5" in err and f"--init_from {out / 'adapter_step00002.pt'}" in err
    start = tensors(out / "adapter_final.pt")
    first = ("--no_preview", "--init_from", str(out / "adapter_final.pt"), "--steps", "2", "--lr", "1e-9")
    assert train(feature_dir, new, *first, "--rank", "4") == 0
    assert f"starting at the adapter {out / 'adapter_final.pt'}" in capsys.readouterr().err
    for key, value in tensors(new / "adapter_final.pt").items():
        part = value[:2] if key.endswith("lora_A") else value[:, :2]
        torch.testing.assert_close(part, start[key], rtol=0, atol=1e-6)
    # A run that was started so is continued like any other, also where that adapter is gone.
    (out / "adapter_final.pt").unlink()
    assert train(feature_dir, new, *first, "--rank", "4", "--steps", "3", "--resume", "auto") == 0


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--init_from", "nowhere.pt"], 2, "--init_from nowhere.pt: no such file"),
        (["--init_from", "x", "--init", "pissa"], 2, "--init pissa starts at the base model"),
        (["--rank", "100000"], 1, "more directions than a layer has: "),
        (["--val_clips", "-1"], 2, "val_clips is -1"),
    ],
)
def test_starts_that_cannot_be(feature_dir, tmp_path, capsys, arguments, code, message):
    assert train(feature_dir, tmp_path / "run", "--no_preview", *arguments) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not (tmp_path / "run").exists()


def test_the_average_is_what_is_saved(feature_dir, tmp_path):
    plain, average = tmp_path / "plain", tmp_path / "average"
    assert train(feature_dir, plain, "--no_preview") == 0
    assert train(feature_dir, average, "--no_preview", "--ema_decay", "0.99") == 0
    one, two = (torch.load(f / "adapter_step00004.pt", weights_only=True) for f in (plain, average))
    assert same(one["lora"], two["lora"]) and not same(one["state_dict"], two["state_dict"])
    assert same(two["state_dict"], tensors(average / "adapter_final.pt"))


def spoil_nothing_left(folder: Path) -> None:
    for path in folder.glob("*.npz"):
        path.unlink()


def spoil_pickle(folder: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "executed"),)

    (folder / "knock_1.npz").write_bytes(pickle.dumps(Bomb()))


SPOILT = {
    "sound without features": (lambda f: (f / "knock_1.npz").unlink(), "knock_1.flac: no features beside it"),
    "features without sound": (lambda f: (f / "knock_1.flac").unlink(), "knock_1.npz: no sound beside it"),
    "truncated features": (lambda f: (f / "knock_1.npz").write_bytes((f / "knock_1.npz").read_bytes()[:3000]),
                           "knock_1.npz"),
    "truncated sound": (lambda f: (f / "knock_1.flac").write_bytes((f / "knock_1.flac").read_bytes()[:2000]),
                        "knock_1.flac"),
    "silent sound": (lambda f: soundfile.write(f / "knock_1.flac", [0.0] * 33_000, 16_000), "silen"),
    "a pickle with code": (spoil_pickle, "knock_1.npz"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_an_unusable_clip_stops_the_run_and_can_be_skipped(feature_dir, tmp_path, capsys, kind):
    """Pitfalls A6 and A8: nothing is dropped without being named, and never by default."""
    spoil, message = SPOILT[kind]
    spoil(feature_dir)
    out = tmp_path / "run"
    assert train(feature_dir, out, "--no_preview") == 1
    err = capsys.readouterr().err
    assert message in err and "--skip_invalid" in err and "Traceback" not in err
    assert not out.exists() and not (feature_dir / "executed").exists()
    assert train(feature_dir, out, "--no_preview", "--skip_invalid", "--steps", "1") == 0
    err = capsys.readouterr().err
    assert any(message in line for line in err.splitlines() if "skipped: " in line) and "error: " not in err
    page = (out / "report.html").read_text(encoding="utf-8")
    assert message in page.split("skipped, as it cannot be used:")[1] and (out / "adapter_final.pt").exists()


def test_short_sound_is_padded_named_and_left_out_of_the_loss(feature_dir, tmp_path, capsys):
    soundfile.write(feature_dir / "knock_1.flac", [0.1, -0.1] * 5_000, 16_000)
    losses = {}
    for name, flags in {"masked": (), "full": ("--padded_loss", "full")}.items():
        assert train(feature_dir, tmp_path / name, "--no_preview", *flags) == 0
        assert "1 of 6 clips: the sound is shorter than the features" in (err := capsys.readouterr().err)
        assert "knock_1 (0.62 of 2.00 s)" in err
        losses[name] = (tmp_path / name / "metrics.jsonl").read_text()
    assert losses["masked"] != losses["full"]
    assert train(feature_dir, tmp_path / "full", "--resume", "auto", "--steps", "8") == 1
    assert "padded_loss was 'full' and is 'masked' now" in capsys.readouterr().err


def test_an_empty_folder(feature_dir, tmp_path, capsys):
    spoil_nothing_left(feature_dir)
    assert train(feature_dir, tmp_path / "run") == 1
    assert "no clip can be trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--variant", "medium_16k"], 2, "invalid choice: 'medium_16k'"),
        (["--variant", "small_16k"], 1, "generator_small_16k_sup_5.pth"),
        (["--data_dir", "nowhere"], 2, "--data_dir nowhere: no such folder"),
        (["--report_to", "wandb,trackio"], 2, "expected some of tensorboard wandb trackio, with spaces"),
        (["--data_dir", __file__], 2, "test_train_lora.py: is a file, expected a folder"),
        (["--rank", "0", "--lr", "-1"], 2, "lr is -1.0"),
        (["--resume", "nowhere.pt"], 2, "--resume nowhere.pt: no such file"),
        (["--target", "attn.qvk"], 1, "attn.qvk"),
        (["--device", "cuda:7"], 2, "--device cuda:7"),
        (["--val_fraction", "1"], 2, "val_fraction is 1.0"),
        (["--preserve", "rain", "--preserve_share", "1"], 2, "preserve_share is 1.0"),
        (["--preserve", "rain", "--preserve_near", "1.5"], 2, "preserve_near is 1.5, expected 0 to 1"),
    ],
)
def test_mistakes_are_one_line(feature_dir, tmp_path, capsys, arguments, code, message):
    assert train(feature_dir, tmp_path / "run", "--no_preview", *arguments) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "made_for, message",
    [("mmaudio_small_16k", "made with the encoders of mmaudio_small_16k"), ("", "1024 wide, but tiny_16k takes")],
)
def test_features_of_another_model_are_refused(feature_dir, tmp_path, capsys, made_for, message):
    np.savez(feature_dir / "knock_1.npz", clip_features=np.zeros((1, 16, 1024), np.float32),
             sync_features=np.zeros((1, 40, 768), np.float32), duration=2.0, prompt="x", variant=made_for)
    assert train(feature_dir, tmp_path / "run", "--no_preview") == 1
    assert message in capsys.readouterr().err
