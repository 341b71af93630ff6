"""Declaration of settings: a dataclass field holds a setting's default, type, choices and help.

    @dataclass(frozen=True)
    class Config:
        steps: int = setting(2000, "optimiser updates")

``selva.cli`` makes the flag ``--steps`` of it, ``scripts/update_docs.py`` the row of a table in ``docs/``, and
``settings_text`` the line of a settings file. Needs no PyTorch.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from selva.utils.errors import UserError
from selva.utils.suggestions import did_you_mean, nearest

Config = TypeVar("Config")
T = TypeVar("T")

KEY = "setting"  # of the metadata of a dataclass field


@dataclass(frozen=True)
class SettingInfo:
    """Properties of a setting beside the name, type and default of its field.

    Attributes:
        help: its effect, without its default.
        group: heading under which ``--help`` and ``docs/`` list it.
        choices: all values that are allowed; empty if the set is open.
        metavar: placeholder of the value in ``--help``.
        flag: name on the command line, where it differs from the field's; the metavar of a positional argument.
        nargs: as argparse understands it, for settings with several values.
        repeat: the flag may be given several times, once for each value.
        positional: given without a flag.
        required: has no default.
        at_least_one: an integer of 1 or more, refused by the parser otherwise.
        default_text: the default as ``--help`` shows it, where the value itself says little.
        aliases: what other trainers call exactly this; flags, and names in settings files, of their own.
        similar: what other programs call something like this; named as a hint, and not accepted.
        synonyms: values of other trainers -> ours.
        environment: variable that gives the default on the command line.
        shared: a `selva.yaml` in the working folder gives the default on the command line, for all scripts alike.
    """

    help: str
    group: str = ""
    choices: Collection[str] = ()
    metavar: str | tuple[str, ...] | None = None
    flag: str | None = None
    nargs: int | str | None = None
    repeat: bool = False
    positional: bool = False
    required: bool = False
    at_least_one: bool = False
    default_text: str | None = None
    aliases: tuple[str, ...] = ()
    similar: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    environment: str = ""
    shared: bool = False

    @property
    def described(self) -> str:
        """The help with the other names of the setting, as ``--help`` and ``docs/`` show it."""
        also = [f"--{alias}" for alias in self.aliases]
        also += [f"the environment variable {self.environment}"] if self.environment else []
        return f"{self.help} (also: {', '.join(also)})" if also else self.help


@dataclass(frozen=True, eq=False)
class Synonyms:
    """Type of a flag whose values other programs call otherwise, see `SettingInfo.synonyms`."""

    of: Mapping[str, str]

    def __call__(self, text: str) -> str:
        return self.of.get(text, text)


def setting(default: T, help: str, **more: Any) -> T:
    """Return a dataclass field for a setting; see :class:`SettingInfo` for ``more``."""
    info = {KEY: SettingInfo(help, **more)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=info)  # pyright: ignore[reportReturnType]  -- as dataclasses.field()
    return field(default=default, metadata=info)  # pyright: ignore[reportReturnType]  -- as dataclasses.field()


def required(help: str, **more: Any) -> Any:
    """Return a dataclass field for a setting that must be given."""
    return field(metadata={KEY: SettingInfo(help, required=True, **more)})


@dataclass(frozen=True)
class Removed:
    """A setting that earlier versions had.

    Attributes:
        off: its value in files that did not use it, which are still read.
        reason: why it is gone, for messages.
    """

    off: Any
    reason: str


@dataclass(frozen=True)
class Setting:
    """One declared setting: name of its field, the type of one value, its default and the rest.

    Attributes:
        name: on the command line and in settings files, without hyphens.
        field: of the dataclass.
        kind: type of a single value: int, float, str, bool or Path.
        default: the default; None where there is none.
    """

    name: str
    field: str
    kind: type
    default: Any
    info: SettingInfo


def settings_of(config: type) -> Iterator[Setting]:
    """Yield the settings of a dataclass and of the dataclasses in it, in the order in which they are declared.

    Fields that were not made by :func:`setting` are no settings.
    """
    hints = typing.get_type_hints(config)
    for one in dataclasses.fields(config):
        hint = hints[one.name]
        if is_dataclass(hint) and isinstance(hint, type):
            yield from settings_of(hint)
        elif isinstance(info := one.metadata.get(KEY), SettingInfo):
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            yield Setting(info.flag or one.name, one.name, _single(hint), None if default is MISSING else default, info)


def removed_of(config: type) -> dict[str, Removed]:
    """Return the settings in the class attributes ``REMOVED`` of a dataclass and of the dataclasses in it."""
    found: dict[str, Removed] = dict(getattr(config, "REMOVED", {}))
    for hint in typing.get_type_hints(config).values():
        if is_dataclass(hint) and isinstance(hint, type):
            found |= removed_of(hint)
    return found


def removed_problems(values: Mapping[str, Any], removed: Mapping[str, Removed]) -> list[str]:
    """Return a sentence for everything in settings that this version no longer has and that is not off."""
    return [f"{name} is {values[name]!r}, and this version no longer has it: {one.reason}"
            for name, one in removed.items() if values.get(name, one.off) not in (one.off, None)]


def _single(hint: Any) -> type:
    """Return the type of one value of ``int``, ``int | None``, ``list[int]``, ``tuple[int, ...]`` ..."""
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _single(next(a for a in arguments if a is not type(None)))
    return _single(arguments[0])


def build(config: type[Config], values: Mapping[str, Any]) -> Config:
    """Return a dataclass filled from values by name, those of the dataclasses in it included.

    A class with a method ``from_settings`` is made by that.

    Args:
        values: by the names of :func:`settings_of`; others are ignored.

    Raises:
        ValueError: lists everything that is out of range, of all dataclasses together.
    """
    if hasattr(config, "from_settings"):
        return config.from_settings(values)  # pyright: ignore[reportAttributeAccessIssue]  -- seen above
    hints, arguments, problems = typing.get_type_hints(config), {}, []
    for one in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]  -- a dataclass by contract
        hint = hints[one.name]
        if is_dataclass(hint) and isinstance(hint, type):
            try:
                arguments[one.name] = build(hint, values)
            except ValueError as error:
                problems.append(str(error))
                arguments[one.name] = _unchecked(hint, values)
        elif isinstance(info := one.metadata.get(KEY), SettingInfo) and (info.flag or one.name) in values:
            arguments[one.name] = values[info.flag or one.name]
    try:
        built = config(**arguments)
    except ValueError as error:
        raise UserError("; ".join([*problems, str(error)])) from error
    if problems:
        raise UserError("; ".join(problems))
    return built


def from_names(config: type[Config], values: Mapping[str, Any]) -> Config:
    """Return a dataclass filled from values by the names of flags, as a program gives them; see :func:`build`.

    Paths may be texts, a setting with several values may be given a single one, and the names of other trainers count.

    Raises:
        ValueError: an unknown name, with the nearest known; a required one that is missing; a value out of range.
    """
    known = {name: one for one in settings_of(config) for name in (one.name, *one.info.aliases)}
    elsewhere = {name: one.name for one in settings_of(config) for name in one.info.similar}
    removed = removed_of(config)
    problems = [f"unknown setting {name}{did_you_mean(nearest(name, known, elsewhere))}"
                for name in values if name not in known and name not in removed]
    problems += removed_problems(values, removed)
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name in known:
            given[known[name].name] = _as_declared(known[name], value)
    for one in settings_of(config):
        if one.info.required and one.name not in given:
            problems.append(f"{one.name} is missing: {one.info.help}")
        value = given.get(one.name)
        if one.info.choices and isinstance(value, str) and value not in one.info.choices:
            problems.append(f"{one.name} is {value!r}, expected one of {', '.join(one.info.choices)}")
        if one.info.at_least_one and isinstance(value, int) and value < 1:
            problems.append(f"{one.name} is {value}, expected at least 1")
    if problems:
        raise UserError("; ".join(problems))
    return build(config, given)


def _as_declared(setting: Setting, value: Any) -> Any:
    """Return a value in the type of its setting: paths for texts, a list for a single value of several."""
    several = setting.info.positional or setting.info.repeat or setting.info.nargs in ("+", "*")
    if several and isinstance(value, str | Path | int | float):
        value = [value]
    if setting.kind is Path:
        value = [Path(one) for one in value] if several and value is not None else Path(value) if value else value
    elif setting.kind is str and several and isinstance(value, list):
        value = [str(one) if isinstance(one, Path) else one for one in value]
    return setting.info.synonyms.get(value, value) if isinstance(value, str) else value


def _unchecked(config: type, values: Mapping[str, Any]) -> Any:
    """Return a dataclass with values that it would refuse, so that the settings around it can be checked too."""
    made = object.__new__(config)
    for one in dataclasses.fields(config):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        object.__setattr__(made, one.name, default)
    for one in settings_of(config):
        if one.name in values and hasattr(made, one.field):
            object.__setattr__(made, one.field, values[one.name])
    return made


def values_of(config: Any) -> dict[str, Any]:
    """Return the values of a configuration by name, those of the dataclasses in it included; :func:`build` reverses."""
    if hasattr(config, "to_settings"):
        return config.to_settings()
    values: dict[str, Any] = {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            values |= values_of(value)
        elif isinstance(info := one.metadata.get(KEY), SettingInfo):
            values[info.flag or one.name] = value
    return values


def settings_text(values: Mapping[str, Any]) -> str:
    """Return settings as YAML that ``--config`` reads back."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return yaml.safe_dump({name: plain(v) for name, v in values.items()}, sort_keys=True, allow_unicode=True)
