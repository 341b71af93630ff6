"""Every preset in configs/ is readable, changes something, and says when to use it; the guide knows every flag."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import train_lora
from scripts import train_base
from selva import cli
from selva.models.variants import VARIANTS
from selva.training.base.config import BaseTrainConfig
from selva.training.config import RunConfig
from selva.training.schedule import learning_rate
from selva.utils.errors import UserError

ALL = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
OF_BASE = [path for path in ALL if path.stem.startswith(("base_", "finetune")) and path.stem != "base_recipe"]
PRESETS = [path for path in ALL if path not in OF_BASE]


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_preset(path, tmp_path):
    assert path.read_text(encoding="utf-8").startswith("# Use it ")
    script, config, flag = (train_base, BaseTrainConfig, "--data") if path in OF_BASE else (
        train_lora, RunConfig, "--data_dir")
    required = [flag, str(tmp_path)]
    args = script.build_parser().parse_args(["--config", str(path), *required])
    plain = script.build_parser().parse_args(required)
    assert cli.config_from(config, args) != cli.config_from(config, plain)
    for name, value in yaml.safe_load(path.read_text()).items():
        assert getattr(args, name) == value, name


def test_no_preset_for_cards_overrides_the_precision_of_the_card(tmp_path):
    """A card of before 2020 computes in fp16; bf16 in a preset would make it slow."""
    args = train_lora.build_parser().parse_args(["--config", str(ALL[0].with_name("low_memory.yaml")), "--data_dir",
                                                 str(tmp_path)])
    assert args.precision == "auto" and args.grad_checkpointing


@pytest.mark.parametrize("script, data, where", [
    (train_lora, "--data_dir", ""), (train_lora, "--data_dir", "previous_001"), (train_base, "--data", ""),
])
def test_settings_of_an_old_run_start_no_run_in_its_folder(tmp_path, capsys, script, data, where):
    """They name its folder; who gives other data means a new run."""
    old, new = tmp_path / "old", tmp_path / "new"
    settings = old / where / "config.yaml"
    settings.parent.mkdir(parents=True)
    new.mkdir()
    settings.write_text(f"{data[2:]}: [{old}]\noutput_dir: {old}\nvariant: tiny_16k\n", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    given = ["--config", str(settings), data, str(new)]
    assert script.main(given) == cli.EXIT_USAGE
    assert f"is of the run in {old}, where a new run would be written too; give another" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    for allowed in (["--output_dir", str(tmp_path / "other")], ["--resume", "auto"], ["--dry_run"]):
        script.main([*given, *allowed])  # fails for want of clips
        assert "is of the run in" not in capsys.readouterr().err


def test_there_are_presets():
    assert {"first_try", "few_clips", "low_memory", "long_run", "base_recipe"} <= {p.stem for p in PRESETS}


def test_every_variant_has_a_preset_of_its_base_training():
    found = {yaml.safe_load(path.read_text())["variant"] for path in OF_BASE if path.stem != "finetune"}
    assert found == set(VARIANTS)


def test_the_defaults_of_a_base_training_are_the_published_recipe(tmp_path):
    """As MMAudio's settings have them."""
    config = BaseTrainConfig(data=[str(tmp_path)])
    assert (config.steps, config.batch_size, config.lr, config.warmup_steps) == (300_000, 512, 1e-4, 1000)
    assert (config.betas, config.weight_decay, config.grad_clip) == ((0.9, 0.95), 1e-6, 1.0)
    assert (config.eps("bf16"), config.eps("fp32"), config.null_prob) == (1e-6, 1e-8, 0.1)
    assert (config.timestep_mode, config.logit_normal_sigma, config.latent) == ("logit_normal", 1.0, "sample")
    rates = {step: learning_rate(step, config) for step in (0, 999, 1000, 240_999, 241_000, 270_999, 271_000, 299_999)}
    assert list(rates.values()) == pytest.approx([1e-4 / 1001, 1e-1 / 1001, *[1e-4] * 2, *[1e-5] * 2, *[1e-6] * 2])


@pytest.mark.parametrize("wrong, message", [
    ({"data": ["nowhere"]}, "--data nowhere: no such folder"), ({"batch_size": 0}, "batch_size is 0"),
    ({"data": [".:0"]}, "expected a number above 0"), ({"ema_sigma_rel": (0.4,)}, "at most 0.288"),
    ({"ema_sigma_rel": (0.1, 0.1)}, "every width once"), ({"init": "nothing.pth"}, "--init nothing.pth: no such file"),
    ({"resume": "nothing"}, "--resume nothing: no such file"), ({"shard": "zero"}, "shard is 'zero'"),
    ({"adam_eps": 0.0}, "adam_eps is 0.0"), ({"null_prob": 2}, "null_prob is 2"),
])
def test_wrong_settings_of_a_base_training_are_refused(wrong, message):
    with pytest.raises(UserError, match=re.escape(message)):
        BaseTrainConfig(**{"data": ["."], **wrong})


def test_every_flag_is_in_the_training_guide():
    guide = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    flags = {a.option_strings[0] for a in train_lora.build_parser()._actions} - {"-h", "--version"}
    assert [flag for flag in sorted(flags) if f"`{flag}" not in guide] == []
