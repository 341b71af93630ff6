"""What the command-line scripts share: the parser, YAML settings, devices, exit codes, signals.

Exit codes: 0 done, 1 failed or some items failed, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM. Results go to stdout, logs
and progress to stderr. A user's mistake ends in one line, never in a traceback (``--debug`` shows it after all).
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from selva import __version__
from selva.media import MaskSettings
from selva.models.variants import VARIANTS
from selva.utils import torchrun
from selva.utils.files import atomic_write_text
from selva.utils.logging import setup_logging

log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NOT_SAVED = ("config", "debug")  # arguments that say how to run, not what to do


class UsageError(ValueError):
    """The command line or the settings file is wrong: exit code 2."""


class Terminated(BaseException):
    """SIGTERM arrived; a BaseException, like KeyboardInterrupt, so that no handler for errors swallows it."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the examples of a description as they are, and ends every option with its default if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or isinstance(action.default, list):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Underscore flags that may be typed with hyphens, and ``--config FILE.yaml`` below the command line.

    The settings file holds flag names without the leading hyphens; an unknown name is an error. Every value goes
    through the flag's own type and choices, so a file can set nothing that the command line could not.
    """

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def add_common(self, precision: str | None = None, *, seed: bool = True, device: bool = True) -> None:
        """Add the options that all scripts share.

        Args:
            precision: default of ``--precision``; None leaves it out.
            seed, device: whether the script draws random numbers, and whether it computes on a device.
        """
        group = self.add_argument_group("general")
        group.add_argument("--config", type=Path, metavar="FILE.yaml",
                           help="settings file; the command line wins over it")
        if seed:
            group.add_argument("--seed", type=int, default=42, help="seed of everything random")
        if device:
            group.add_argument("--device", default="auto", metavar="auto|cpu|cuda|mps",
                               help="where to compute; auto takes a GPU if there is one")
        if precision is not None:
            group.add_argument("--precision", choices=PRECISIONS, default=precision,
                               help="number format of the networks")
        group.add_argument("--debug", action="store_true", help="show debug messages and the traceback of an error")
        group.add_argument("--version", action="version", version=f"selva-lora {__version__}")

    def add_model(self) -> None:
        """Add ``--variant`` and ``--selva_dir``."""
        group = self.add_argument_group("model")
        group.add_argument("--variant", choices=VARIANTS, default="large_44k", metavar="NAME",
                           help=f"base model, one of {', '.join(VARIANTS)}; tiny_16k is built in")
        group.add_argument("--selva_dir", type=Path, metavar="DIR",
                           help="folder of the published weights (scripts/download_weights.py fills it)")

    def add_masks(self) -> None:
        """Add ``--mask`` and how it is used; :func:`mask_settings` reads them."""
        group = self.add_argument_group("masks")
        group.add_argument("--mask", type=Path, metavar="PATH",
                           help="what of the picture counts: an image, a video or .npy for all clips, white keeps; or "
                           "a folder of them named like the clips. The rest becomes grey. A table's column mask wins")
        group.add_argument("--mask_strength", type=float, default=MaskSettings.strength,
                           help="1 makes the rest of the picture grey, 0 leaves it, between blends")
        group.add_argument("--mask_clip", action=BooleanFlag, default=MaskSettings.clip,
                           help="lay the mask on what CLIP sees")
        group.add_argument("--mask_sync", action=BooleanFlag, default=MaskSettings.sync,
                           help="lay the mask on what the video encoder sees")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        given = [self._underscored(a) for a in (sys.argv[1:] if args is None else args)]
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--config", type=Path)
        try:
            path = first.parse_known_args(given)[0].config
        except argparse.ArgumentError as error:
            self.error(str(error))
        from_file, positionals = self._arguments_from(path, given) if path else ([], {})
        parsed = super().parse_args(from_file + given, namespace)
        for name, values in positionals.items():
            if not getattr(parsed, name):  # declared with nargs="*", so that a file may give them
                setattr(parsed, name, values)
        return parsed

    @staticmethod
    def _underscored(argument: str) -> str:
        if not argument.startswith("--"):
            return argument
        name, equals, value = argument.partition("=")
        return "--" + name[2:].replace("-", "_") + equals + value

    def _arguments_from(self, path: Path, given: Sequence[str]) -> tuple[list[str], dict[str, list]]:
        """Return the settings of a YAML file as command-line arguments, to stand before the real ones.

        Positional arguments have no place before others; they come back separately, with their values converted.
        """
        import yaml

        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"--config {path}: cannot be read as YAML: {' '.join(str(error).split())}")
        if not isinstance(settings, dict):
            self.error(f"--config {path}: holds a {type(settings).__name__}, expected lines like `steps: 2000`")
        flags = {a.dest: a for a in self._actions if a.dest not in ("help", "version", *NOT_SAVED)}
        unknown = [str(key) for key in settings if str(key).replace("-", "_") not in flags]
        if unknown:
            self.error(f"--config {path}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(flags))}")
        arguments: list[str] = []
        positionals: dict[str, list] = {}
        for key, value in settings.items():
            action = flags[str(key).replace("-", "_")]
            if not action.option_strings:
                positionals[action.dest] = [action.type(v) for v in (value if isinstance(value, list) else [value])]
                continue
            collects = isinstance(action, argparse._AppendAction)  # the command line replaces, it does not add
            if value is None or (collects and any(o in given for o in action.option_strings)):
                continue
            arguments += self._as_arguments(action, value, path)
        return arguments, positionals

    def _as_arguments(self, action: argparse.Action, value: Any, path: Path) -> list[str]:
        flag = action.option_strings[0]
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                self.error(f"--config {path}: {action.dest} is {value!r}, expected true or false")
            if isinstance(action, argparse.BooleanOptionalAction):
                return [flag if value else "--no_" + flag[2:]]
            return [flag] if value else []
        values = value if isinstance(value, list) else [value]
        if isinstance(action, argparse._AppendAction):
            return [f"{flag}={v}" for v in values]
        if action.nargs in ("+", "*") or len(values) == action.nargs:
            return [flag, *map(str, values)]
        if len(values) != 1 or isinstance(values[0], dict) or action.nargs is not None:
            expected = "a single value" if action.nargs is None else f"{action.nargs} values"
            self.error(f"--config {path}: {action.dest} is {value!r}, expected {expected}")
        return [f"{flag}={values[0]}"]


class BooleanFlag(argparse.BooleanOptionalAction):
    """``--flag`` and ``--no_flag``; argparse itself spells the second one with a hyphen."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self.option_strings = [o.replace("--no-", "--no_") for o in self.option_strings]

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def positive_int(text: str) -> int:
    """Argument type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def mask_settings(args: argparse.Namespace, path: Path | None) -> MaskSettings | None:
    """Return the mask of one clip as ``add_masks`` says it is used, None if it has none.

    Raises:
        UsageError: the settings make no sense.
    """
    if path is None:
        return None
    try:
        return MaskSettings(path, args.mask_strength, args.mask_clip, args.mask_sync)
    except ValueError as error:
        raise UsageError(str(error)) from error


def settings_text(args: argparse.Namespace) -> str:
    """Return the resolved settings as YAML that ``--config`` reads back."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    settings = {k: plain(v) for k, v in vars(args).items() if k not in NOT_SAVED}
    return yaml.safe_dump(settings, sort_keys=True, allow_unicode=True)


def write_settings(path: Path, args: argparse.Namespace) -> None:
    """Write the resolved settings as YAML that ``--config`` reads back."""
    atomic_write_text(path, settings_text(args))


def resolve_device(name: str) -> torch.device:
    """Return the device that ``--device`` names; "auto" prefers CUDA, then MPS, then the CPU.

    Under torchrun "cuda" is the device of this process.

    Raises:
        UsageError: the name is unknown, or this machine has no such device.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torchrun.local_rank())
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: unknown, expected auto, cpu, cuda, cuda:N or mps") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise UsageError(f"--device {name}: there is no such device here; try --device auto")
    return device


def _raise_terminated(_signal: int, _frame: Any) -> None:
    raise Terminated


def entry_point(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Wrap a script's ``main(argv) -> exit code`` so that every way to end has its exit code and one clear line.

    Works in-process too: a test calls ``main([...])`` and gets the code that a shell would see.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        debug = "--debug" in (sys.argv[1:] if argv is None else argv)
        setup_logging(debug)
        # Only the main thread may install handlers; a test runner or a server may call from another one.
        in_main_thread = threading.current_thread() is threading.main_thread()
        previous = signal.signal(signal.SIGTERM, _raise_terminated) if in_main_thread else None
        try:
            return main(argv)
        except SystemExit as stop:  # argparse: --help is 0, a wrong command line 2
            return stop.code if isinstance(stop.code, int) else EXIT_FAILED
        except KeyboardInterrupt:
            log.error("interrupted")
            return EXIT_INTERRUPTED
        except Terminated:
            log.error("terminated")
            return EXIT_TERMINATED
        except BrokenPipeError:  # `infer.py … | head`: nobody reads on, and that is no mistake
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILED
        except UsageError as error:
            return _report(error, EXIT_USAGE, debug)
        except (ValueError, OSError) as error:
            return _report(error, EXIT_FAILED, debug)
        except torch.OutOfMemoryError as error:
            log.error("the device is out of memory: %s", str(error).split(". ")[0])
            log.error("what helps, in order of effect: when training, --grad_checkpointing; a smaller --batch_size, "
                      "with more --grad_accum when training; --precision bf16; a smaller --variant")
            return EXIT_FAILED
        finally:
            if in_main_thread:
                signal.signal(signal.SIGTERM, previous)

    return wrapped


def _report(error: Exception, code: int, debug: bool) -> int:
    if debug:
        log.exception("%s", type(error).__name__)
    message = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        message = f"{error.filename}: {error.strerror}"
    log.error("%s", message or type(error).__name__)
    return code
