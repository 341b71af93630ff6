"""Settings declared once: flags, values, YAML, and everything wrong said at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from selva import cli
from selva.extraction.config import ExtractionConfig
from selva.inference.config import InferenceConfig
from selva.lora.config import LoRAConfig
from selva.partition.config import PartitionConfig
from selva.training.config import RunConfig, TrainConfig
from selva.utils.settings import (
    Removed,
    build,
    from_names,
    removed_of,
    required,
    setting,
    settings_of,
    settings_text,
    values_of,
)


@dataclass(frozen=True)
class Inner:
    REMOVED: ClassVar[dict[str, Removed]] = {"old_way": Removed(0.0, "it did nothing")}

    size: int = setting(4, "how large", group="inner")
    kind: Literal["a", "b"] = setting("a", "which kind", group="inner", choices=("a", "b"))

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    source: Path = required("where from", group="outer")
    inner: Inner = field(default_factory=Inner)
    share: float = setting(0.5, "how much", group="outer")
    names: tuple[str, ...] = setting((), "names", group="outer", nargs="*", flag="name")
    limit: float | None = setting(None, "at most", group="outer")
    hidden: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.share < self.inner.size:
            raise ValueError(f"share is {self.share} of {self.inner.size}")


def test_settings_are_listed_in_their_order_with_type_and_default():
    found = [(one.name, one.field, one.kind, one.default) for one in settings_of(Outer)]
    assert found == [("source", "source", Path, None), ("size", "size", int, 4), ("kind", "kind", str, "a"),
                     ("share", "share", float, 0.5), ("name", "names", str, ()), ("limit", "limit", float, None)]


def test_values_go_into_the_dataclasses_and_come_out_again():
    values = {"source": Path("x"), "size": 2, "kind": "b", "share": 0.25, "name": ("n",), "limit": None, "other": 1}
    built = build(Outer, values)
    assert built == Outer(source=Path("x"), inner=Inner(2, "b"), share=0.25, names=("n",))
    assert values_of(built) == {name: value for name, value in values.items() if name != "other"}
    assert build(Outer, values_of(built)) == built


def test_everything_wrong_is_said_at_once_inside_and_out():
    with pytest.raises(ValueError, match=r"size is 0; share is 2\.0 of 0"):
        build(Outer, {"source": Path("x"), "size": 0, "share": 2.0})
    with pytest.raises(ValueError, match=r"^size is 0; share is 0\.5 of 0$"):
        build(Outer, {"source": Path("x"), "size": 0})


@pytest.mark.parametrize("value", [0.0, 0, None, 0.25])
def test_settings_of_earlier_versions_are_passed_over_where_they_were_off(tmp_path, capsys, value: Any):
    assert removed_of(Outer) == Inner.REMOVED
    parser = cli.ArgumentParser("x")
    parser.add_settings(Outer)
    parser.add_common(seed=False, device=False)
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"source": "a", "old-way": value}), encoding="utf-8")
    told = "old_way is 0.25, and this version no longer has it: it did nothing"
    if value == 0.25:
        with pytest.raises(SystemExit):
            parser.parse_args(["--config", str(path)])
        assert f"--config {path}: {told}\n" in capsys.readouterr().err
        with pytest.raises(ValueError, match=f"^{told}$"):
            from_names(Outer, {"source": "a", "old_way": value})
    else:
        assert cli.config_from(Outer, parser.parse_args(["--config", str(path)])).inner == Inner()
        assert from_names(Outer, {"source": "a", "old_way": value}) == Outer(source=Path("a"))
    with pytest.raises(SystemExit):
        parser.parse_args(["--source", "a", "--old-way", "0"])
    assert "error: this version no longer has --old_way: it did nothing\n" in capsys.readouterr().err


def test_the_parser_is_made_from_the_settings(tmp_path):
    parser = cli.ArgumentParser("x")
    parser.add_settings(Outer)
    parser.add_common(seed=False, device=False)
    args = parser.parse_args(["--source", "a", "--name", "p", "q", "--kind", "b"])
    config = cli.config_from(Outer, args)
    assert (config.source, list(config.names), config.inner) == (Path("a"), ["p", "q"], Inner(4, "b"))
    assert config.limit is None
    path = tmp_path / "s.yaml"
    path.write_text(settings_text(cli.saved_settings(args)), encoding="utf-8")
    assert cli.config_from(Outer, parser.parse_args(["--config", str(path)])) == config
    with pytest.raises(SystemExit):
        parser.parse_args(["--name", "p"])  # --source is required
    with pytest.raises(cli.UsageError, match="share is 9"):
        cli.config_from(Outer, parser.parse_args(["--source", "a", "--share", "9"]))


def test_settings_text_is_yaml_of_plain_values():
    text = settings_text({"b": Path("x/y"), "a": (1, 2.5), "c": None})
    assert yaml.safe_load(text) == {"a": [1, 2.5], "b": "x/y", "c": None} and text.startswith("a:")


def test_targets_carry_their_ranks_through_the_settings():
    config = build(LoRAConfig, {"target": ["attn.qkv", "linear1:4"], "lora_dropout": 0.5, "rank": 8})
    assert (config.targets, config.target_ranks, config.dropout) == (("attn.qkv", "linear1"), {"linear1": 4}, 0.5)
    assert build(LoRAConfig, values_of(config)) == config


@pytest.mark.parametrize("config", [RunConfig, ExtractionConfig, InferenceConfig, PartitionConfig])
def test_no_name_stands_for_two_settings_and_every_one_has_help(config: type):
    settings = list(settings_of(config))
    names = [one.name for one in settings]
    assert len(names) == len(set(names))
    assert all(one.info.help and one.info.group for one in settings)


def test_defaults_are_those_of_the_dataclass():
    args = RunConfig(data_dir=Path())
    assert args.training == TrainConfig() and args.lora == LoRAConfig()
