"""Common parts of the command-line scripts: the parser, YAML settings, exit codes, signals.

Exit codes: 0 done, 1 failed or some items failed, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM. Results go to stdout, logs
and progress to stderr; whoever stops reading them, as ``head`` does, stops nothing and changes no exit code. A user's
mistake ends in one line, never in a traceback (``--debug`` shows it after all).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from selva.inputs.file_names import expand_pattern
from selva.utils import torchrun
from selva.utils.device import PRECISIONS, is_out_of_memory
from selva.utils.errors import Terminated, UsageError, UserError
from selva.utils.files import atomic_write_text
from selva.utils.logging import results_on_stdout, setup_logging
from selva.utils.settings import Removed, Setting, Synonyms, build, removed_of, settings_of, settings_text
from selva.utils.settings_file import FOLDER_FILE, SettingsFile
from selva.utils.suggestions import did_you_mean, nearest
from selva.utils.version import __version__
from selva.weights.config import GENERAL, SHARED, ModelConfig

log = logging.getLogger(__name__)

Config = TypeVar("Config")

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
_DEFECT = "this is a defect of this program, not a mistake of yours; please report it with the lines below"
LEAVE_FOLDER_FILE = frozenset(("--no_settings_file", "-h", "--help", "--version"))
NOT_SAVED = ("config", "no_settings_file", "debug")  # arguments that say how to run, not what to do


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Formatter that keeps the examples of a description, and ends every option with its default if it has one.

    Of several names of a flag the first one is listed; the others stand in its help.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default  # 0 is one, though it equals False
        if default is None or default is False or default == "" or isinstance(default, list):
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if len(action.option_strings) < 2 or isinstance(action, argparse.BooleanOptionalAction | argparse._HelpAction):
            return super()._format_action_invocation(action)
        shown = copy.copy(action)
        shown.option_strings = action.option_strings[:1]
        return super()._format_action_invocation(shown)


class ArgumentParser(argparse.ArgumentParser):
    """Underscore flags that may be typed with hyphens, and ``--config FILE.yaml`` below the command line.

    The settings file holds flag names without the leading hyphens; an unknown name is an error. Every value goes
    through the flag's own type and choices, so a file can set nothing that the command line could not.
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        self.elsewhere: dict[str, str] = {}  # names of other programs -> the similar setting
        self.environment: dict[str, str] = {}  # name of a setting -> the variable that gives its default
        self.shared: set[str] = set()  # settings that a selva.yaml in the working folder gives
        self.removed: dict[str, Removed] = {}  # settings that earlier versions had

    def add_settings(self, config: type) -> None:
        """Add a flag for every setting of a dataclass, see :mod:`selva.utils.settings`, under its group's heading."""
        for setting in settings_of(config):
            self._add(setting)
        self.removed |= removed_of(config)

    def _add(self, setting: Setting) -> None:
        _add(self._group(setting.info.group), setting)
        self.elsewhere |= dict.fromkeys(setting.info.similar, setting.name)
        if setting.info.environment:
            self.environment[setting.name] = setting.info.environment
        if setting.info.shared:
            self.shared.add(setting.name)

    def add_common(self, precision: str | None = None, *, seed: bool = True, device: bool = True) -> None:
        """Add the options that all scripts share; those that the settings of a script hold already are left out.

        Args:
            precision: default of ``--precision``; None leaves it out.
            seed, device: the script draws random numbers; it computes on a device.
        """
        group = self._group(GENERAL)
        known = {action.dest for action in self._actions}
        group.add_argument("--config", type=Path, metavar="FILE.yaml",
                           help="settings file; the command line wins over it")
        if seed and "seed" not in known:
            group.add_argument("--seed", type=int, default=42, help="seed of everything random")
        if device and "device" not in known:
            self._add(next(setting for setting in settings_of(ModelConfig) if setting.name == "device"))
        if precision is not None:
            group.add_argument("--precision", choices=PRECISIONS, default=precision,
                               help="number format of the networks")
        if self.shared:
            group.add_argument("--no_settings_file", action="store_true",
                               help=f"ignore {FOLDER_FILE} in this folder, which otherwise gives the defaults of "
                                    + ", ".join(f"--{name}" for name in SHARED if name in self.shared))
        group.add_argument("--debug", action="store_true", help="show debug messages and the traceback of an error")
        self._action_groups.sort(key=lambda listed: listed is group)  # last in --help
        group.add_argument("--version", action="version", version=f"selva-lora {__version__}")

    def add_model(self) -> None:
        """Add ``--variant`` and ``--selva_dir``."""
        for setting in settings_of(ModelConfig):
            if setting.name != "device":
                self._add(setting)

    def _group(self, title: str) -> argparse._ArgumentGroup:
        found = next((group for group in self._action_groups if group.title == title), None)
        return found or self.add_argument_group(title)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        if "_ARGCOMPLETE" in os.environ:  # set by a shell that asks for completions
            import argcomplete  # pyright: ignore[reportMissingImports]  -- an extra that few have

            argcomplete.autocomplete(self)
        given = [self._underscored(a) for a in (sys.argv[1:] if args is None else args)]
        self._check_flags(given)
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--config", type=Path)
        try:
            path = first.parse_known_args(given)[0].config
        except argparse.ArgumentError as error:
            self.error(str(error))
        from_file, positionals = [], {}
        if path:
            from_file, positionals = self._arguments_of(SettingsFile(path, f"--config {path}", self.error), given)
            from_file.append(f"--config={path}")  # ends a list, which would take the positional arguments of this call
        # What is said more closely wins: this call, its settings file, the environment, the file of the folder.
        arguments = from_file + given
        arguments = self._from_environment(arguments) + arguments
        arguments = self._from_folder(arguments) + arguments
        parsed = super().parse_args(arguments, namespace)
        for name, values in positionals.items():
            if not getattr(parsed, name):  # declared with nargs="*", so that a file may give them
                setattr(parsed, name, values)
        self._expand(parsed)
        return parsed

    def error(self, message: str) -> NoReturn:
        """End with the message alone; argparse would put twenty lines of usage in its way."""
        if found := re.search(r"invalid float value: '([+-]?\d+),(\d+)'", message):
            message += f"; write {found[1]}.{found[2]}, with a point"
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}\n{self.prog} --help lists all settings\n")

    def _check_flags(self, given: Sequence[str]) -> None:
        """End with an error if a flag does not exist; argparse would ask for a required one that is missing first."""
        before_rest = given[: given.index("--")] if "--" in given else given
        flags = [a.partition("=")[0] for a in before_rest if a.startswith("--") and " " not in a.partition("=")[0]]
        unknown = list(dict.fromkeys(flag for flag in flags if flag not in self._option_string_actions))
        if unknown:
            gone = {f"--{name}": one.reason for name, one in self.removed.items()}
            hints = (f"this version no longer has {flag}: {gone[flag]}" if flag in gone else
                     f"unknown flag {flag}{did_you_mean(self._nearest(flag[2:]), '--')}" for flag in unknown)
            self.error("; ".join(hints))

    def _nearest(self, name: str) -> list[str]:
        """Return names of flags that ``name`` may have been meant for."""
        known = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        return nearest(name, known, self.elsewhere)

    def _from_environment(self, given: Sequence[str]) -> list[str]:
        """Return arguments for the settings that the environment gives and that are not given otherwise."""
        arguments = []
        for name, variable in self.environment.items():
            value, action = os.environ.get(variable), self._option_string_actions[f"--{name}"]
            if not value or any(a.partition("=")[0] in action.option_strings for a in given):
                continue
            if action.choices is not None and value not in action.choices:
                self.error(f"the environment variable {variable} is {value!r}, expected one of "
                           f"{', '.join(map(str, action.choices))}")
            log.info("--%s %s, from the environment variable %s", name, value, variable)
            arguments.append(f"--{name}={value}")
        return arguments

    def _expand(self, parsed: argparse.Namespace) -> None:
        """Replace patterns such as ``*.mp4`` by the files that they stand for: not every shell does that."""
        for action in self._actions:
            paths = getattr(parsed, action.dest, None)
            if action.type is Path and isinstance(paths, list):
                try:
                    setattr(parsed, action.dest, [file for path in paths for file in expand_pattern(path)])
                except UserError as error:
                    self.error(f"{action.option_strings[0] if action.option_strings else action.metavar}: {error}")

    @staticmethod
    def _underscored(argument: str) -> str:
        if not argument.startswith("--"):
            return argument
        name, equals, value = argument.partition("=")
        return "--" + name[2:].replace("-", "_") + equals + value

    def _arguments_of(self, settings: SettingsFile, given: Sequence[str]) -> tuple[list[str], dict[str, list]]:
        """Return the settings of a file as arguments, to stand before the real ones; positional ones separately."""
        flags = {a.dest: a for a in self._actions if a.dest not in ("help", "version", *NOT_SAVED)}
        flags |= {o[2:]: a for a in flags.values() for o in a.option_strings if not o.startswith("--no_")}
        return settings.arguments(flags, self.elsewhere, given, self.removed)

    def _from_folder(self, given: Sequence[str]) -> list[str]:
        """Return arguments for the settings in the `selva.yaml` of the working folder that are not given otherwise."""
        if not self.shared or not Path(FOLDER_FILE).is_file() or not LEAVE_FOLDER_FILE.isdisjoint(given):
            return []
        path = Path(FOLDER_FILE).resolve()
        settings = SettingsFile(path, f"{path}, which is read because it lies in this folder (--no_settings_file "
                                "ignores it)", self.error)
        settings.check_names(SHARED, self.elsewhere)
        names = {name: self._option_string_actions[f"--{name}"] for name in self.shared}
        others = {name for name, action in names.items()
                  if any(a.partition("=")[0] in action.option_strings for a in given)}
        settings.keep(self.shared - others)
        settings.check_choices(names)
        arguments = self._arguments_of(settings, given)[0]
        if arguments:
            log.info("%s: %s; --no_settings_file ignores this file", path, " ".join(arguments))
        return arguments


class BooleanFlag(argparse.BooleanOptionalAction):
    """``--flag`` and ``--no_flag``; argparse itself spells the second one with a hyphen."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self.option_strings = [o.replace("--no-", "--no_") for o in self.option_strings]

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not (option_string or "").startswith("--no_"))


def positive_int(text: str) -> int:
    """Return an argument as an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _add(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """Add the flag, or the positional argument, of one setting."""
    info, default = setting.info, setting.default
    options: dict[str, Any] = {"help": info.described}
    flags = [f"--{name}" for name in (setting.name, *info.aliases)]  # the first one names the value
    if setting.kind is bool:
        options |= {"action": BooleanFlag, "default": True} if default else {"action": "store_true"}
        group.add_argument(*flags, **options)
        return
    options["type"] = positive_int if info.at_least_one else Synonyms(info.synonyms) if info.synonyms else setting.kind
    if info.choices:
        options["choices"] = info.choices
    if info.metavar is not None:
        options["metavar"] = info.metavar
    if info.nargs is not None:
        options["nargs"] = info.nargs
    if info.repeat:
        options["action"] = "append"
    if info.positional:
        group.add_argument(setting.field, **options)
        return
    options |= {"required": True} if info.required else {"default": _as_parsed(default)}
    if info.default_text is not None:
        options["help"] += f" (default: {info.default_text})"
    group.add_argument(*flags, **options)


def _as_parsed(default: Any) -> Any:
    """Return a default in the form of a parsed value: lists instead of tuples."""
    return list(default) if isinstance(default, tuple) else default


def config_from(config: type[Config], args: argparse.Namespace) -> Config:
    """Return the settings of a dataclass as the command line gives them.

    Raises:
        UsageError: lists everything that is out of range.
    """
    try:
        return build(config, vars(args))
    except UserError as error:
        raise UsageError(str(error)) from error


def saved_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments by name, without those of the run itself such as ``--debug``."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SAVED}


def write_settings(path: Path, args: argparse.Namespace) -> None:
    """Write the resolved settings as YAML that ``--config`` reads back."""
    atomic_write_text(path, settings_text(saved_settings(args)))


def _ends() -> list[int]:
    """Return the signals that end a script in order: SIGTERM, and a closed terminal unless ``nohup`` ignores it."""
    closed = getattr(signal, "SIGHUP", None)
    return [signal.SIGTERM, *([closed] if closed and signal.getsignal(closed) != signal.SIG_IGN else [])]


def _raise_terminated(_signal: int, _frame: Any) -> None:
    raise Terminated


class Main(Protocol):
    """Entry point of a script: arguments -> exit code; those of the command line if None are given."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def entry_point(main: Main) -> Main:
    """Wrap a script's ``main(argv) -> exit code`` so that every way to end has its exit code and one clear line.

    Works in-process too: a test calls ``main([...])`` and gets the code that a shell would see.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        debug = "--debug" in (sys.argv[1:] if argv is None else argv)
        setup_logging(debug)
        # Only the main thread may install handlers; a test runner or a server may call from another one.
        in_main_thread = threading.current_thread() is threading.main_thread()
        previous = {number: signal.signal(number, _raise_terminated) for number in _ends() if in_main_thread}
        try:
            with results_on_stdout():
                return main(argv)
        except SystemExit as stop:  # argparse: --help is 0, a wrong command line 2
            return stop.code if isinstance(stop.code, int) else EXIT_FAILED
        except KeyboardInterrupt:
            log.error("interrupted")
            return EXIT_INTERRUPTED
        except Terminated:
            log.error("terminated")
            return EXIT_TERMINATED
        except UsageError as error:
            return _report(error, EXIT_USAGE, debug)
        except (UserError, OSError) as error:
            return _report(error, EXIT_FAILED, debug)
        except (RuntimeError, MemoryError) as error:  # PyTorch's own error is a RuntimeError
            if not is_out_of_memory(error):
                _report_defect()
                raise
            log.error("the device is out of memory: %s", str(error).split(". ")[0] or type(error).__name__)
            log.error("what helps, in order of effect: when training, --grad_checkpointing; a smaller --batch_size, "
                      "with more --grad_accum when training; --precision bf16, or fp16 on GPUs without it; "
                      "--cuda_graph off, with clips of several lengths; a smaller --variant")
            return EXIT_FAILED
        except Exception:  # nothing is dropped: it is said whose mistake it is, and raised again
            _report_defect()
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    return wrapped


def _report(error: Exception, code: int, debug: bool) -> int:
    if debug:
        log.exception("%s", type(error).__name__)
    message = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        message = f"{error.filename}: {error.strerror}"
    log.error("%s", message or type(error).__name__)
    return code


def _report_defect() -> None:
    """Say that the error that is being handled is a defect; under torchrun, end here, with its traceback."""
    log.error(_DEFECT)
    if torchrun.world_size() > 1:
        traceback.print_exc()
        leave(EXIT_FAILED)


def leave(code: int) -> NoReturn:
    """End the process with an exit code.

    Under torchrun without the interpreter's teardown: gloo's threads sometimes abort it (exit code -6) when everything
    is done and written, and torchrun then reports a finished run as failed. After an error they keep the process until
    the other ones send what they never will.
    """
    if torchrun.world_size() > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads on
                stream.flush()
        os._exit(code)
    sys.exit(code)
