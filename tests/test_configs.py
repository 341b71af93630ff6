"""Every preset in configs/ is readable, changes something, and says when to use it; the guide knows every flag."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import train_lora
from selva import cli
from selva.training.config import RunConfig

PRESETS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_preset(path, tmp_path):
    assert path.read_text(encoding="utf-8").startswith("# Use it ")
    required = ["--data_dir", str(tmp_path)]
    args = train_lora.build_parser().parse_args(["--config", str(path), *required])
    plain = train_lora.build_parser().parse_args(required)
    assert cli.config_from(RunConfig, args) != cli.config_from(RunConfig, plain)
    for name, value in yaml.safe_load(path.read_text()).items():
        assert getattr(args, name) == value, name


def test_there_are_presets():
    assert {"first_try", "few_clips", "low_memory", "long_run", "base_recipe"} <= {p.stem for p in PRESETS}


def test_every_flag_is_in_the_training_guide():
    guide = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    flags = {a.option_strings[0] for a in train_lora.build_parser()._actions} - {"-h", "--version"}
    assert [flag for flag in sorted(flags) if f"`{flag}" not in guide] == []
