"""The parts that all scripts share: settings files, exit codes, devices."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from selva import cli
from selva.media.mask_settings import MaskOptions
from selva.utils.device import resolve_device
from selva.utils.errors import UserError


def parser() -> cli.ArgumentParser:
    result = cli.ArgumentParser("A script.")
    group = result.add_argument_group("things")
    group.add_argument("--data_dir", type=Path, required=True, help="data")
    group.add_argument("--rank", type=int, default=16, help="rank")
    group.add_argument("--mode", choices=("a", "b"), default="a", help="mode")
    group.add_argument("--target", nargs="+", default=["attn.qkv"], help="layers")
    group.add_argument("--adapter", type=Path, action="append", default=[], help="adapters")
    group.add_argument("--quick", action="store_true", help="be quick")
    group.add_argument("--preview", action=cli.BooleanFlag, default=True, help="listen")
    result.add_common(precision="bf16")
    return result


def settings(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def test_command_line_wins_over_file_over_default(tmp_path):
    config = settings(tmp_path, "data_dir: from file\nrank: 4\nmode: b\n")
    args = parser().parse_args([*config, "--rank", "8"])
    assert (args.data_dir, args.rank, args.mode, args.seed) == (Path("from file"), 8, "b", 42)


def test_a_list_at_the_end_of_a_file_takes_no_positional_argument(tmp_path):
    given = parser()
    given.add_argument("input", nargs="*", type=Path, help="clips")
    config = settings(tmp_path, "data_dir: d\ntarget: [x, y]\n")
    for arguments in (["clips", "more", *config], [*config, "clips", "more"]):
        args = given.parse_args(arguments)
        assert args.target == ["x", "y"] and args.input == [Path("clips"), Path("more")]


def test_every_kind_of_value_can_come_from_a_file(tmp_path):
    config = settings(tmp_path, "data-dir: d\ntarget: [x, y]\nadapter: [p, q]\nquick: true\npreview: false\nseed: -3\n")
    args = parser().parse_args(config)
    assert (args.target, args.adapter) == (["x", "y"], [Path("p"), Path("q")])
    assert (args.quick, args.preview, args.seed) == (True, False, -3)
    assert parser().parse_args([*config, "--adapter", "r"]).adapter == [Path("r")]


def test_hyphens_are_accepted():
    args = parser().parse_args(["--data-dir=a-b", "--no-preview"])
    assert args.data_dir == Path("a-b") and args.preview is False


def test_resolved_settings_read_back(tmp_path):
    given = ["--data_dir", "d", "--target", "x", "y", "--no_preview", "--adapter", "p", "--seed", "7"]
    args = parser().parse_args(given)
    cli.write_settings(tmp_path / "config.yaml", args)
    again = parser().parse_args(["--config", str(tmp_path / "config.yaml")])
    assert {k: v for k, v in vars(again).items() if k != "config"} == {
        k: v for k, v in vars(args).items() if k != "config"
    }
    assert "debug" not in yaml.safe_load((tmp_path / "config.yaml").read_text())


@pytest.mark.parametrize(
    "text, message",
    [
        ("rnak: 3", "unknown settings rnak"),
        ("rank: many", "invalid int value: 'many'"),
        ("mode: c", "invalid choice: 'c'"),
        ("quick: 3", "quick is 3, expected true or false"),
        ("rank: [1, 2]", "expected a single value"),
        ("- a list", "holds a list"),
        ("{", "cannot be read as YAML"),
        ("debug: true", "unknown settings debug"),
    ],
)
def test_mistakes_in_a_file_are_usage_errors(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--data_dir", "d", *settings(tmp_path, text)])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_missing_settings_file(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--data_dir", "d", "--config", "no/such.yaml"])
    assert stop.value.code == 2 and "no/such.yaml" in capsys.readouterr().err


def run(action, argv=()) -> int:
    @cli.entry_point
    def main(argv=None):
        return action()

    return main(list(argv))


def fail(error: BaseException):
    raise error


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("x.npz: is wrong"), 1, "error: x.npz: is wrong"),
        (FileNotFoundError(2, "No such file or directory", "a.wav"), 1, "error: a.wav: No such file or directory"),
        (cli.UsageError("--rank is 0"), 2, "error: --rank is 0"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (SystemExit(2), 2, ""),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "--grad_checkpointing"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.93 GiB, max allowed: 18.13 GiB). Tried to allocate "
                      "256 MiB on private pool."), 1, "--grad_checkpointing"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 1000 bytes."), 1, "--batch_size"),
        (MemoryError(), 1, "--batch_size"),
    ],
)
def test_every_end_has_its_code_and_one_line(capsys, error, code, line):
    assert run(lambda: fail(error)) == code
    stderr = capsys.readouterr().err
    assert line in stderr and "Traceback" not in stderr


def test_a_defect_of_ours_is_not_hidden(capsys):
    """A ValueError of Python or a library is one too: zip() of unequal lengths, a conversion that fails."""
    for error in (TypeError("a bug"), RuntimeError("shapes do not fit, out of reach of memory"), ValueError("a bug")):
        with pytest.raises(type(error)):
            run(lambda error=error: fail(error))
        assert "please report it" in capsys.readouterr().err


def test_a_defect_ends_a_process_of_several_at_once_with_its_traceback(capsys, monkeypatch):
    """The interpreter's teardown would wait for messages of the others."""
    def left(code):
        raise SystemExit(code)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", left)
    with pytest.raises(SystemExit, match="1"):
        run(lambda: fail(TypeError("a bug")))
    error = capsys.readouterr().err
    assert "please report it" in error and "Traceback" in error and "TypeError: a bug" in error


def test_debug_shows_the_traceback(capsys):
    assert run(lambda: fail(UserError("x")), ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_ends_with_its_code_and_restores_the_handler(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert "terminated" in capsys.readouterr().err


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "cuda:99" if not torch.cuda.is_available() else "xpu"):
        with pytest.raises(cli.UsageError, match="--device"):
            resolve_device(name)


def test_help_shows_groups_defaults_and_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "things:" in text and "rank (default: 16)" in text and "--no_preview" in text


def test_mask_flags_become_mask_settings():
    parser = cli.ArgumentParser("x")
    parser.add_settings(MaskOptions)
    args = parser.parse_args(["--mask", "m.png", "--mask_strength", "0.5", "--no-mask_clip"])
    masks = cli.config_from(MaskOptions, args)
    settings = masks.of_clip(masks.mask)
    assert (settings.path, settings.strength, settings.clip, settings.sync) == (Path("m.png"), 0.5, False, True)
    assert masks.of_clip(None) is None
    neither = cli.config_from(MaskOptions, parser.parse_args(["--no_mask_clip", "--no_mask_sync"]))
    with pytest.raises(ValueError, match="neither"):
        neither.of_clip(Path("m.png"))


def test_settings_files_give_flags_of_several_values(tmp_path, capsys):
    parser = cli.ArgumentParser("x")
    parser.add_common()
    parser.add_argument("--interval", type=float, nargs=2)
    path = tmp_path / "s.yaml"
    path.write_text("interval: [0.5, 1]\n")
    assert parser.parse_args(["--config", str(path)]).interval == [0.5, 1.0]
    path.write_text("interval: 0.5\n")
    with pytest.raises(SystemExit):
        parser.parse_args(["--config", str(path)])
    assert "interval is 0.5, expected 2 values" in capsys.readouterr().err


def inputs_parser() -> cli.ArgumentParser:
    made = parser()
    made.add_argument("inputs", nargs="*", type=Path)
    return made


@pytest.mark.parametrize(
    "text, message",
    [
        ("inputs: 2024", "inputs is 2024, expected a text or a list of texts; put what looks like a number"),
        ("inputs:\n  - a.mp4\n  -\n", "inputs is ['a.mp4', None], expected a text or a list"),
        ("inputs: [2024-01-31]", "expected a text or a list"),
        ("inputs: {a: b}", "expected a text or a list"),
        ("inputs: [[a]]", "expected a text or a list"),
        ("data_dir: 2024-13-45", "cannot be read as YAML: month must be in 1..12"),
        ('data_dir: !!int ""', "cannot be read as YAML: "),
        ("data_dir: !!float x", "cannot be read as YAML: "),
        ("data_dir: !!timestamp x", "cannot be read as YAML: "),
        ("data_dir: " + "[" * 3000 + "]" * 3000, "cannot be read as YAML: it is nested too deeply"),
        ("data_dir: 0777", "data_dir is 0777, which YAML reads as 511; put it between quotation marks"),
        ("data_dir: 1:30", "data_dir is 1:30, which YAML reads as 90"),
        ("target: [x, on]", "target is on, which YAML reads as True"),
        ("seed: 0500", "seed is 0500, which YAML reads as 320; put it between quotation marks if it is a text, or "
         "write the number plainly (line 1)"),
        ("data_dir: d\nseed: 1:30", "seed is 1:30, which YAML reads as 90"),
        ("rank: 0x10", "rank is 0x10, which YAML reads as 16"),
        ("rank: 4\ndata_dir: d\nrank: 8", "rank stands in line 1 and again in line 3, and YAML would take the last "
         "one; give it once"),
        ("target: [x, ]\nadapter: [~]", "adapter is [None], expected a single value or a list"),
        ("data_dir: [[a]]", "data_dir is [['a']], expected a single value"),
        ("rank: 2024-01-31", "invalid int value: '2024-01-31'"),
    ],
)
def test_yaml_of_wrong_types_is_a_usage_error_with_the_files_name(tmp_path, capsys, text, message):
    config = settings(tmp_path, text)
    with pytest.raises(SystemExit) as stop:
        inputs_parser().parse_args(["--data_dir", "d", *config])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error) < 4000
    assert "settings.yaml" in error or message.startswith("invalid int")


def test_an_alias_that_grows_without_bounds_is_not_printed(tmp_path, capsys):
    deep = "data_dir:\n- &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"- &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(settings(tmp_path, deep))
    assert stop.value.code == 2 and len(capsys.readouterr().err) < 4000


def test_texts_that_look_like_numbers_are_taken_as_they_are_written(tmp_path):
    args = inputs_parser().parse_args(settings(tmp_path, 'data_dir: 2024\ninputs: ["2024"]\ntarget: [1.5]\n'))
    assert (args.data_dir, args.inputs, args.target) == (Path("2024"), [Path("2024")], ["1.5"])


# -- names of other trainers, "did you mean", the environment, patterns ------------------------------------------------


def training_parser() -> cli.ArgumentParser:
    from selva.training.config import RunConfig

    result = cli.ArgumentParser("A script.")
    result.add_settings(RunConfig)
    result.add_common()
    return result


ALIASES = {
    "learning_rate": ("lr", "0.001", 0.001), "max_train_steps": ("steps", "7", 7), "network_dim": ("rank", "4", 4),
    "train_batch_size": ("batch_size", "2", 2), "gradient_accumulation_steps": ("grad_accum", "3", 3),
    "mixed_precision": ("precision", "bf16", "bf16"), "network_alpha": ("alpha", "8", 8.0),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_names_of_other_trainers_are_the_same_setting(tmp_path, alias):
    name, text, value = ALIASES[alias]
    given = training_parser().parse_args(["--data_dir", "d", f"--{alias}", text])
    from_file = training_parser().parse_args(["--data_dir", "d", *settings(tmp_path, f"{alias}: {text}\n")])
    assert getattr(given, name) == getattr(from_file, name) == value and not hasattr(given, alias)
    over = ["--data_dir", "d", *settings(tmp_path, f"{alias}: {text}\n"), f"--{name}", text.replace(text[0], "9")]
    if name != "precision":
        assert str(getattr(training_parser().parse_args(over), name)).startswith("9")


def test_no_mixed_precision_is_fp32():
    assert training_parser().parse_args(["--data_dir", "d", "--mixed_precision", "no"]).precision == "fp32"


def usage_error(capsys, parser: cli.ArgumentParser, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_one_setting_under_two_names_in_a_file_is_refused(tmp_path, capsys):
    text = usage_error(capsys, training_parser(), *settings(tmp_path, "lr: 1.0\nlearning_rate: 2.0\n"))
    assert "lr and learning_rate are the same setting" in text


@pytest.mark.parametrize("given, expected", [
    (["--data", "d"], "unknown flag --data; did you mean --data_dir"),
    (["--leraning_rate", "1"], "unknown flag --leraning_rate; did you mean --learning_rate"),
    (["--epochs=3"], "unknown flag --epochs; did you mean --steps"),
    (["--output_name", "dog"], "unknown flag --output_name; did you mean --output_dir"),
    (["--zzz"], "unknown flag --zzz\n"),
    (["--lr", "0,5"], "invalid float value: '0,5'; write 0.5, with a point\n"),
])
def test_an_unknown_flag_is_named_before_all_else_with_the_nearest(capsys, given, expected):
    text = usage_error(capsys, training_parser(), *given)  # --data_dir is missing too
    assert expected in text.splitlines(keepends=True)[0] and "usage:" not in text


def test_an_unknown_setting_in_a_file_is_named_with_the_nearest(tmp_path, capsys):
    text = usage_error(capsys, training_parser(), *settings(tmp_path, "lerning_rate: 1.0\nepochs: 2\n"))
    assert "lerning_rate; did you mean learning_rate" in text and "epochs; did you mean steps" in text


def test_a_prompt_that_begins_with_hyphens_is_no_flag():
    args = training_parser().parse_args(["--data_dir", "d", "--preserve", "--loud bark"])
    assert args.preserve == ["--loud bark"]


def test_the_environment_gives_model_and_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SELVA_DIR", "some/weights")
    monkeypatch.setenv("SELVA_VARIANT", "small_16k")
    args = training_parser().parse_args(["--data_dir", "d"])
    assert (args.variant, args.selva_dir) == ("small_16k", Path("some/weights"))
    config = settings(tmp_path, "variant: tiny_16k\n")
    assert training_parser().parse_args(["--data_dir", "d", *config]).variant == "tiny_16k"
    args = training_parser().parse_args(["--data_dir", "d", "--variant=large_44k", "--selva_dir", "w"])
    assert (args.variant, args.selva_dir) == ("large_44k", Path("w"))
    monkeypatch.setenv("SELVA_VARIANT", "small")
    assert "the environment variable SELVA_VARIANT is 'small'" in usage_error(
        capsys, training_parser(), "--data_dir", "d")


@pytest.fixture
def folder_file(tmp_path, monkeypatch):
    """Return a function that writes the `selva.yaml` of the folder that the test then runs in."""
    for variable in ("SELVA_DIR", "SELVA_VARIANT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda text: (tmp_path / "selva.yaml").write_text(text, encoding="utf-8")


def test_a_file_in_the_folder_gives_what_scripts_share_and_says_so(folder_file, caplog):
    folder_file("variant: small_16k\nselva-dir: my weights\ndevice: cpu\nprecision: bf16\n")
    with caplog.at_level("INFO"):
        args = training_parser().parse_args(["--data_dir", "d"])
    assert (args.variant, args.selva_dir, args.device, args.precision) == (
        "small_16k", Path("my weights"), "cpu", "bf16")
    assert "selva.yaml: --variant=small_16k --selva_dir=my weights --device=cpu --precision=bf16" in caplog.text
    assert "no_settings_file" not in cli.saved_settings(args)
    assert training_parser().parse_args(["--data_dir", "d", "--no_settings_file"]).variant == "large_44k"
    folder_file("no YAML: [")
    with pytest.raises(SystemExit) as stop:
        training_parser().parse_args(["--help"])
    assert stop.value.code == 0


def test_what_is_said_more_closely_wins(folder_file, tmp_path, monkeypatch, caplog):
    """Order: flag, --config, environment, selva.yaml."""
    folder_file("variant: small_16k\ndevice: cpu\n")
    parse = training_parser().parse_args
    monkeypatch.setenv("SELVA_VARIANT", "medium_44k")
    assert parse(["--data_dir", "d"]).variant == "medium_44k"
    config = settings(tmp_path, "variant: tiny_16k\n")
    assert parse(["--data_dir", "d", *config]).variant == "tiny_16k"
    with caplog.at_level("INFO"):
        args = parse(["--data_dir", "d", *config, "--variant", "large_44k"])
    assert (args.variant, args.device) == ("large_44k", "cpu")
    assert "selva.yaml: --device=cpu;" in caplog.text


def test_a_script_takes_of_the_file_what_it_has(folder_file):
    from selva.extraction.config import ExtractionConfig
    from selva.partition.config import PartitionConfig

    folder_file("generator: g.pth\nprecision: bf16\nvariant: tiny_16k\n")
    extraction = cli.ArgumentParser("A script.")
    extraction.add_settings(ExtractionConfig)
    extraction.add_common()
    args = extraction.parse_args(["--output_dir", "o"])
    assert (args.variant, args.precision) == ("tiny_16k", "fp32")  # features are float32 unless the call says otherwise
    cutting = cli.ArgumentParser("A script.")
    cutting.add_settings(PartitionConfig)
    cutting.add_common(device=False)
    folder_file("no YAML: [")  # which a script without such settings does not read
    assert cutting.parse_args(["--data_dir", "d", "--output_dir", "o"]).seed == 42
    assert "--no_settings_file" in extraction.format_help() and "--no_settings_file" not in cutting.format_help()


@pytest.mark.parametrize("text, message", [
    ("varaint: tiny_16k", "unknown settings varaint; did you mean variant?"),
    ("steps: 3", "unknown settings steps (it takes what scripts share: variant, selva_dir, generator, device, precis"),
    ("variant: small", "variant is 'small', expected one of small_16k"),
    ("variant: [", "cannot be read as YAML"),
    ("- variant", "holds a list"),
    ("selva_dir: 0777", "selva_dir is 0777, which YAML reads as 511"),
])
def test_mistakes_in_the_file_of_the_folder_name_it(folder_file, tmp_path, capsys, text, message):
    folder_file(text)
    said = usage_error(capsys, training_parser(), "--data_dir", "d")
    assert message in said and f"{tmp_path / 'selva.yaml'}, which is read because it lies in this folder" in said


def test_the_list_of_shared_settings_is_that_of_the_settings():
    from selva.inference.config import InferenceConfig
    from selva.training.base.config import BaseTrainConfig
    from selva.training.config import RunConfig
    from selva.utils.settings import settings_of
    from selva.weights.config import SHARED

    marked = {one.name for config in (RunConfig, InferenceConfig, BaseTrainConfig) for one in settings_of(config)
              if one.info.shared}
    assert marked == set(SHARED)


def test_patterns_are_expanded_as_a_shell_would(tmp_path, capsys):
    for name in ("b.mp4", "a.mp4", "take[1].mp4"):
        (tmp_path / name).touch()
    result = cli.ArgumentParser("A script.")
    result.add_argument("inputs", type=Path, nargs="*")
    result.add_argument("--video", type=Path, action="append", default=[])
    args = result.parse_args([str(tmp_path / "?.mp4"), str(tmp_path / "take[1].mp4"), "--video", str(tmp_path / "b*")])
    assert [path.name for path in args.inputs] == ["a.mp4", "b.mp4", "take[1].mp4"]
    assert [path.name for path in args.video] == ["b.mp4"]
    assert "no file matches" in usage_error(capsys, result, str(tmp_path / "*.mov"))


def test_help_shows_defaults_of_0_and_no_empty_ones(capsys):
    from selva.extraction.config import ExtractionConfig

    result = cli.ArgumentParser("A script.")
    result.add_settings(ExtractionConfig)
    with pytest.raises(SystemExit):
        result.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "where the clip begins (default: 0.0)" in text and "(default: )" not in text


def test_completion_is_asked_for_where_the_shell_wants_it(monkeypatch):
    asked = []
    module = type(os)("argcomplete")
    module.autocomplete = asked.append  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(__import__("sys").modules, "argcomplete", module)
    one = parser()
    one.parse_args(["--data_dir", "d"])
    assert asked == []
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    one.parse_args(["--data_dir", "d"])
    assert asked == [one]
