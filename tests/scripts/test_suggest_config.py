"""scripts/suggest_config.py: a settings file that train_lora.py takes as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from script_args import TINY

import train_lora
from scripts import suggest_config
from selva import cli
from selva.training.config import RunConfig
from selva.training.suggest import BUILT_IN


def test_the_file_is_one_that_training_takes(feature_dir, tmp_path, capsys):
    file = tmp_path / "dog.yaml"
    assert suggest_config.main([str(feature_dir), "--gpu_memory", "0", "--output", str(file)]) == 0
    args = train_lora.build_parser().parse_args(["--config", str(file)])
    config = cli.config_from(RunConfig, args)
    assert config.model.variant == "tiny_16k" and "text_cond_proj" in config.lora.targets
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("-")]
    assert lines and all("  # " in line for line in lines)
    assert suggest_config.main([str(feature_dir), "--gpu_memory", "0", "--output", str(file)]) == cli.EXIT_USAGE
    capsys.readouterr()
    large = [str(feature_dir), "--variant", "small_16k", "--gpu_memory", "24"]
    assert suggest_config.main(large) == 0  # a step is computed, without a GPU
    said = capsys.readouterr()
    assert "batch_size: 4  # fits into 24.0 GiB" in said.out
    assert "made with the encoders of tiny_16k, which are not those of small_16k; extract again" in said.err
    assert "variant: small_16k  # as asked for; but the features there are made with the encoders of tiny" in said.out
    assert suggest_config.main([str(feature_dir), "--variant", "tiny_16k"]) == 0
    assert "extract again" not in "".join(capsys.readouterr())


def test_settings_are_validated_without_training(feature_dir, tmp_path, capsys):
    """Also those of an old run, with other data."""
    out = tmp_path / "out"
    flags = ["--data_dir", str(feature_dir), "--output_dir", str(out), *TINY]
    assert train_lora.main([*flags, "--validate_only", "--rank", "8"]) == 0
    text = capsys.readouterr().out
    assert "rank is 8, suggested 16: as configs/tiny_new_sound.yaml" in text
    assert text.endswith("can be trained with\n") and not out.exists()
    quick = ["--steps", "2", "--batch_size", "2", "--rank", "2", "--no_preview", "--warmup_steps", "0"]
    assert train_lora.main([*flags, *quick]) == 0
    new = shutil.copytree(feature_dir, tmp_path / "new")
    reused = ["--config", str(out / "config.yaml"), "--data_dir", str(new), "--output_dir", str(tmp_path / "second")]
    assert train_lora.main([*reused, "--validate_only"]) == 0
    assert train_lora.main(reused) == 0
    meta = json.loads((tmp_path / "second" / "meta.json").read_text(encoding="utf-8"))
    assert (meta["rank"], meta["steps"]) == (2, 2)


def test_the_preset_of_the_built_in_model_is_what_is_suggested_for_it(feature_dir, capsys):
    """With the settings of the published models it would learn nothing."""
    preset = Path(__file__).parents[2] / "configs" / "tiny_new_sound.yaml"
    settings = yaml.safe_load(preset.read_text(encoding="utf-8"))
    assert {name: settings[name] for name in BUILT_IN} == BUILT_IN
    assert train_lora.main(["--config", str(preset), "--data_dir", str(feature_dir), "--batch_size", "6",
                            "--validate_only"]) == 0
    assert capsys.readouterr().out == "these settings can be trained with\n"


def test_clips_that_cannot_be_used_are_found_by_it(feature_dir, tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    assert train_lora.main(["--data_dir", str(tmp_path / "empty"), *TINY, "--validate_only"]) == cli.EXIT_FAILED
    assert "no clip can be trained on" in caplog.text
    (feature_dir / "bad.npz").write_bytes(b"nothing")
    shutil.copy(next(feature_dir.glob("*.wav"), None) or next(feature_dir.glob("*.flac")), feature_dir / "bad.wav")
    assert train_lora.main(["--data_dir", str(feature_dir), *TINY, "--validate_only"]) == cli.EXIT_FAILED
    assert "1 file cannot be used: bad.npz" in caplog.text


def test_an_empty_folder_is_said(tmp_path, caplog):
    assert suggest_config.main([str(tmp_path)]) == cli.EXIT_FAILED
    assert "no clip can be trained on" in caplog.text
