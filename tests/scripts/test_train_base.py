"""Training a base model from the command line: its files, going on, exports that other scripts load, the example."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from make_data import put_memmap
from script_args import TINY

import infer
import train_lora
from scripts import train_base
from selva.models.zoo import build_generator
from selva.training.base.checkpoint import all_checkpoints, read_numbers
from selva.weights.load import load_generator, read_checkpoint

SHORT = [*TINY, "--batch_size", "2", "--warmup_steps", "1", "--save_every", "2", "--val_every", "4", "--log_every", "2",
         "--samples", "1", "--lr_schedule", "constant", "--precision", "fp32"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("sets")
    put_memmap(folder / "video", 6)
    put_memmap(folder / "sound", 5, video=False)
    return [f"{folder / 'video'}:2", str(folder / "sound")]


def train(sets: list[str], folder: Path, *more: str) -> int:
    return train_base.main(["--data", *sets, "--output_dir", str(folder), *SHORT, *more])


@pytest.fixture(scope="module")
def run(sets, tmp_path_factory) -> Path:
    """A whole run of four steps."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert train(sets, folder, "--steps", "4", "--sample_every", "4") == 0
    return folder


def exported(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "export" / f"tiny_16k_{name}.pth")


def test_the_files_of_a_run(run):
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml", "metrics.jsonl", "loss_raw.png", "loss_smoothed.png", "export/tiny_16k_ema.safetensors",
        "samples/step_00000004/01.flac", "samples/step_00000004/01.png", "samples/recorded/01.flac",
        "samples/captions.tsv",
        "checkpoints/step_00000002/run.json", "checkpoints/step_00000004/.metadata", "ema_ckpts/0.4.pt",
        "ema_ckpts/1.4.pt", "ema_ckpts/tracks.json",
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]  # the mean of two steps each
    validations = [row for row in rows if "val_loss" in row]
    assert [(row["step"], len(row["val_loss_bins"])) for row in validations] == [(0, 25), (4, 25)]
    assert validations[1]["val_loss"] == pytest.approx(sum(validations[1]["val_loss_bins"]) / 25)
    (heard,) = [row for row in rows if "eval_onset_f1" in row]
    assert heard["step"] == 4 and heard["eval_log_spectral_distance_db"] > 0
    last = next(row for row in reversed(rows) if "loss" in row)
    assert last["seen_0"] + last["seen_1"] == 8 and 0 <= last["wait_share"] <= 1 and last["rows_per_sec"] > 0
    assert 0 < last["matmul_share"] < 1


def test_a_run_from_scratch_stores_the_statistics_of_the_video_set(run, sets):
    weights = exported(run)
    assert 0.4 < weights["latent_mean"].mean() < 0.6 and 0.2 < weights["latent_std"].mean() < 0.4  # of uniform numbers
    assert weights["empty_string_feat"].abs().max() > 0


def test_the_export_is_a_generator_of_the_published_names(run):
    generator = build_generator("tiny_16k")
    for name in ("last", "ema"):
        generator.load_published(exported(run, name))
        safe = read_checkpoint(run / "export" / f"tiny_16k_{name}.safetensors")
        assert all(torch.equal(value, exported(run, name)[key]) for key, value in safe.items())
    assert not torch.equal(exported(run)["final_layer.conv.weight"], exported(run, "ema")["final_layer.conv.weight"])


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run, sets, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    newest = all_checkpoints(folder / "checkpoints")[-1]
    shutil.rmtree(newest)  # as if it had been killed before
    assert train(sets, folder, "--steps", "4", "--sample_every", "0", "--resume", "auto") == 0
    for name in ("last", "ema"):
        assert all(torch.equal(value, exported(run, name)[key]) for key, value in exported(folder, name).items())
    assert read_numbers(all_checkpoints(folder / "checkpoints")[-1])["seen"] == read_numbers(newest_of(run))["seen"]


def test_snapshots_of_a_longer_run_keep_their_distance(run, sets, tmp_path, caplog):
    """Those of before would be no multiples of the new distance, and be thinned away."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert train(sets, folder, "--steps", "6", "--sample_every", "0", "--resume", "auto", "--ema_every", "5") == 0
    names = {path.name for path in (folder / "ema_ckpts").glob("0.*.pt")}
    assert names == {f"0.{step}.pt" for step in range(1, 7)}
    assert "go on at every 1 step, as this run began, not at every 5" in caplog.text


def test_a_run_that_goes_on_with_other_rates_says_so(run, sets, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert train(sets, folder, "--steps", "5", "--sample_every", "0", "--resume", "auto", "--lr", "0.5",
                 "--lr_milestones", "0.5") == 0
    assert ("goes on with other settings than before: --lr was 0.0001 and is 0.5, --lr_milestones was 0.8 0.9 and is "
            "0.5. To keep what was before, give --lr 0.0001 --lr_milestones 0.8 0.9 with --resume") in caplog.text


def newest_of(run: Path) -> Path:
    return all_checkpoints(run / "checkpoints")[-1]


@pytest.mark.parametrize("more, message", [
    (["--null_prob", "0.2"], "null_prob was 0.1 and is 0.2 now"), (["--steps", "2"], "give a larger --steps"),
    (["--seed", "1"], "seed was 42 and is 1 now"), (["--hold_out", "0"], "rows was 5 and is 6 now"),
])
def test_going_on_with_another_training_is_refused(run, sets, more, message, caplog):
    assert train(sets, run, "--steps", "6", "--sample_every", "0", "--resume", "auto", *more) == 1
    assert message in caplog.text


def test_the_rows_of_a_set_decide_too(run, sets, caplog):
    assert train([sets[0].replace(":2", ":3"), sets[1]], run, "--steps", "6", "--resume", "auto") == 1
    assert "weight was 2.0 and is 3.0 now" in caplog.text


def test_a_fresh_start_moves_an_old_run_aside(run, sets, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert train(sets, folder, "--steps", "1", "--sample_every", "0") == 0
    assert (folder / "previous_001" / "checkpoints" / "step_00000004").is_dir()
    assert [path.name for path in all_checkpoints(folder / "checkpoints")] == ["step_00000001"]


def test_what_is_later_than_the_step_that_is_gone_on_from_is_moved_aside(run, sets, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    first = str(folder / "checkpoints" / "step_00000002")
    assert train(sets, folder, "--steps", "3", "--sample_every", "0", "--resume", first) == 0
    assert [path.name for path in all_checkpoints(folder / "checkpoints")] == ["step_00000002", "step_00000003"]
    aside = folder / "previous_001"
    assert (aside / "checkpoints" / "step_00000004" / ".metadata").is_file()
    assert (aside / "samples" / "step_00000004" / "01.flac").is_file() and (aside / "ema_ckpts" / "0.4.pt").is_file()
    assert (folder / "ema_ckpts" / "0.2.pt").is_file() and not (folder / "ema_ckpts" / "0.4.pt").exists()


def test_a_run_that_goes_on_in_another_folder_leaves_the_first_as_it_is(run, sets, tmp_path):
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    assert train(sets, tmp_path / "other", "--steps", "4", "--sample_every", "0", "--resume",
                 str(run / "checkpoints" / "step_00000002")) == 0
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
    assert all(torch.equal(value, exported(run)[key]) for key, value in exported(tmp_path / "other").items())
    assert yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())["resume"] is None


def test_a_part_of_published_weights_is_trained(sets, tmp_path):
    assert train(sets, tmp_path / "run", "--steps", "1", "--sample_every", "0", "--init", "published", "--trainable",
                 "final_layer.*") == 0
    before, after = load_generator("tiny_16k").state_dict(), exported(tmp_path / "run")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.startswith("final_layer.")}


def test_a_dry_run_writes_nothing(sets, tmp_path, caplog):
    assert train(sets, tmp_path / "run", "--steps", "1000", "--dry_run") == 0
    assert not (tmp_path / "run").exists()
    assert "dry run" in caplog.text and "a checkpoint takes 0.06 GiB" in caplog.text


def test_weights_of_another_variant_are_refused(run, sets, tmp_path, caplog):
    wrong = tmp_path / "wrong.pth"
    torch.save({"a": torch.zeros(1)}, wrong)
    assert train(sets, tmp_path / "run", "--steps", "1", "--init", str(wrong)) == 1
    assert "expected a generator of tiny_16k" in caplog.text


def test_a_folder_that_is_no_memmap_is_refused(tmp_path, caplog):
    (tmp_path / "clips").mkdir()
    assert train([str(tmp_path / "clips")], tmp_path / "run", "--steps", "1") == 1
    assert "is no memmap" in caplog.text


def test_the_export_makes_sounds(run, tmp_path):
    arguments = [*TINY, "--prompt", "a bell rings", "--num_steps", "2", "--precision", "fp32"]
    own = ["--generator", str(run / "export" / "tiny_16k_ema.safetensors")]
    assert infer.main([*arguments, "--output", str(tmp_path / "a.wav"), *own]) == 0
    assert infer.main([*arguments, "--output", str(tmp_path / "b.wav")]) == 0
    assert (tmp_path / "a.wav").read_bytes() != (tmp_path / "b.wav").read_bytes()
    # Asked for once more, the sound of another generator is not taken for the same.
    before = (tmp_path / "a.wav").read_bytes()
    assert infer.main([*arguments, "--output", str(tmp_path / "a.wav"), "--overwrite"]) == 0
    assert (tmp_path / "a.wav").read_bytes() != before


def test_an_adapter_is_trained_on_the_export(run, sets, tmp_path, caplog):
    own = ["--generator", str(run / "export" / "tiny_16k_ema.pth")]
    data = sets[0].removesuffix(":2")
    arguments = [*TINY, "--data_dir", data, "--output_dir", str(tmp_path / "lora"), "--steps", "1", "--batch_size", "1",
                 "--no_preview", "--val_fraction", "0"]
    assert train_lora.main([*arguments, *own]) == 0
    adapter = tmp_path / "lora" / "adapter_final.pt"
    sound = [*TINY, "--prompt", "a bell", "--num_steps", "1", "--adapter", str(adapter)]
    assert infer.main([*sound, *own, "--output", str(tmp_path / "a.wav")]) == 0
    assert "was trained on" not in caplog.text
    assert infer.main([*sound, "--output", str(tmp_path / "b.wav")]) == 0
    assert "was trained on" in caplog.text
    assert train_lora.main([*arguments, "--steps", "2", "--resume", "auto"]) == 1
    assert "generator was" in caplog.text


@pytest.mark.slow
def test_the_example(tmp_path, capsys):
    assert train_base.main(["--example", "--output_dir", str(tmp_path / "example")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith("clip_00000.mp4") and all(Path(line).exists() for line in printed)
    assert train_base.main(["--example", "--output_dir", str(tmp_path / "example")]) == 2
