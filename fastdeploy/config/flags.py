"""From dataclass fields to flags: one field is one flag, on the command line and as a keyword of `LLM`.

Owns the annotation `Flag`, the conversion of what a user wrote to the field's type, and the argparse parser built from
the fields. A class of flags is a frozen dataclass with fields `name: Annotated[type, Flag(group, help)] = default`.
What a type means on a command line:

| type | written |
| --- | --- |
| bool | `--x`, `--no-x` |
| int, float, str, Literal | `--x VALUE` |
| tuple[int, ...], tuple[str, ...] | `--x A,B`, `--x A B`, or `--x` several times |
| dict | `--x '{"key": 1}'` |
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import shutil
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastdeploy.config.support import Support, support_of
from fastdeploy.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Flag:
    """What the type of a field does not say: its place in `--help`, its help line and its short form."""

    group: str
    help: str
    short: str | None = None
    metavar: str | None = None


@dataclass(frozen=True, slots=True)
class FlagField:
    """One field of a class of flags, with everything known about it."""

    name: str
    hint: Any  # the type without Annotated
    default: Any
    about: Flag

    @property
    def option(self) -> str:
        """The flag as it is written on a command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def support(self) -> Support:
        """Whether the flag does something, see `config.support`."""
        return support_of(self.name)


class UnknownOption(ConfigError, TypeError):
    """A keyword or flag that does not exist."""


def flags_of(cls: type) -> tuple[FlagField, ...]:
    """The flags of a class, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        hint, about = get_args(hints[field.name])
        found.append(FlagField(field.name, hint, field.default, about))
    return tuple(found)


# ---- what a user wrote -> the field's type -----------------------------------------------------------------------


def _to_bool(value: object) -> bool:
    if value in (True, False, 0, 1):
        return bool(value)
    raise ValueError("expected True or False")


def _to_int(value: object) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("expected an integer")


def _to_float(value: object) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError("expected a number")


def _to_str(value: object) -> str:
    if isinstance(value, (str, PurePath)):
        return os.fspath(value)
    raise ValueError("expected a string")


def _to_dict(value: object) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as exc:
            raise ValueError(f"expected a JSON object ({exc})") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _to_str_or_dict(value: object) -> str | dict[str, Any]:
    """A plain string stays one; a dict, or a string that starts like one, is an object."""
    if isinstance(value, dict) or (isinstance(value, str) and value.lstrip().startswith("{")):
        return _to_dict(value)
    return _to_str(value)


def _to_tuple(item: Callable[[object], T]) -> Callable[[object], tuple[T, ...]]:
    def convert(value: object) -> tuple[T, ...]:
        if isinstance(value, str):
            return tuple(item(part.strip()) for part in value.split(",") if part.strip())
        if isinstance(value, (list, tuple)):
            return tuple(one for part in value for one in convert(part))
        return (item(value),)

    return convert


def _to_choice(choices: tuple[str, ...]) -> Callable[[object], str]:
    def convert(value: object) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return str(value)

    return convert


_SCALARS: Mapping[Any, Callable[[object], Any]] = types.MappingProxyType(
    {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
)


def _without_none(hint: Any) -> tuple[Any, ...]:
    """The members of a union apart from None; a plain type is its own only member."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(arg for arg in get_args(hint) if arg is not type(None))
    return (hint,)


def _converter(hint: Any) -> Callable[[object], Any]:
    members = _without_none(hint)
    if len(members) == 2:
        return _to_str_or_dict
    origin, args = get_origin(members[0]), get_args(members[0])
    if origin is Literal:
        return _to_choice(args)
    if origin is tuple:
        return _to_tuple(_SCALARS[args[0]])
    if origin is dict:
        return _to_dict
    return _SCALARS[members[0]]


def convert(flag: FlagField, value: object) -> Any:
    """`value` as the field's type; raises ConfigError naming the flag. None stays None where the field allows it."""
    if value is None and (flag.default is None or get_origin(flag.hint) is tuple):
        return flag.default
    try:
        return _converter(flag.hint)(value)
    except ValueError as exc:
        raise ConfigError(f"{flag.option}: {exc}, got {value!r}") from None


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` when a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


# ---- the command line --------------------------------------------------------------------------------------------


class FlagParser(argparse.ArgumentParser):
    """An argparse parser that takes `_` for `-` in flag names and raises ConfigError instead of leaving the process."""

    def parse_known_args(  # type: ignore[override]  # the overloads of argparse add nothing here
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Like argparse; spellings with underscores count as the flag with dashes."""
        written = list(args) if args is not None else None
        return super().parse_known_args(None if written is None else [_dashed(one) for one in written], namespace)

    def parse_flags(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`; raises ConfigError (UnknownOption for a flag that does not exist)."""
        namespace, extra = self.parse_known_args(argv)
        if extra:
            first = extra[0].partition("=")[0]
            if not first.startswith("-"):
                raise UnknownOption(f"{first!r} belongs to no flag; every value follows the flag it is for")
            hint = suggestion(first, self._option_string_actions)
            raise UnknownOption(f"{first}: no such flag{hint or '; --help lists all flags'}")
        return namespace

    def error(self, message: str) -> Any:
        """Raises ConfigError."""
        raise ConfigError(message.removeprefix("argument "))


def _dashed(written: str) -> str:
    if not written.startswith("--"):
        return written
    name, equals, value = written.partition("=")
    return name.replace("_", "-") + equals + value


class _HelpFormatter(argparse.HelpFormatter):
    """Wider columns, `--[no-]x` for switches that are on, and an epilog that keeps its lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=_help_width())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return str(action.metavar)
        return super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            name = action.option_strings[0]
            return name if action.default is False else f"--[no-]{name[2:]}"
        return super()._format_action_invocation(action)


def _help_width() -> int:
    return min(shutil.get_terminal_size((110, 24)).columns, 120)


def _help_text(flag: FlagField) -> str:
    if flag.support.state != "honoured":
        return argparse.SUPPRESS  # listed by name in the epilog
    text = flag.about.help
    if flag.default is not None and flag.default is not False and flag.default not in ("", ()):
        shown = "on" if flag.default is True else flag.default
        text += f" (default: {shown})"
    return text.replace("%", "%%")


def _add(flag: FlagField, group: argparse._ArgumentGroup) -> None:
    names = [flag.option] + ([flag.about.short] if flag.about.short else [])
    known: dict[str, Any] = {"dest": flag.name, "default": flag.default, "help": _help_text(flag)}
    members = _without_none(flag.hint)
    if members == (bool,):
        group.add_argument(*names, action=argparse.BooleanOptionalAction, **known)
        return

    def parse(value: str) -> Any:
        try:
            return _converter(flag.hint)(value)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{exc}, got {value!r}") from None

    if get_origin(members[0]) is Literal:
        known["metavar"] = "{" + ",".join(get_args(members[0])) + "}"
    elif len(members) == 2 or get_origin(members[0]) is dict:
        known["metavar"] = "JSON"
    else:
        known["metavar"] = flag.about.metavar or {int: "N", float: "X"}.get(members[0], "TEXT")
    if get_origin(members[0]) is tuple:  # parsed to a list of tuples, joined in `read_flags`
        known |= {"nargs": "+", "action": "append", "default": None, "metavar": flag.about.metavar or "A,B"}
    group.add_argument(*names, type=parse, **known)


def build_parser(
    prog: str, *classes: type, usage: str = "%(prog)s --model DIR [flags]", epilog: str = ""
) -> FlagParser:
    """A parser of the flags of `classes`, grouped; read the result with `read_flags`.

    Flags that are not built yet or have no effect are parsed, but `--help` only lists their names, below the groups.
    `epilog` ends the help as it is: an example.
    """
    flags = [flag for cls in classes for flag in flags_of(cls)]
    parser = FlagParser(prog=prog, usage=usage, allow_abbrev=False, formatter_class=_HelpFormatter)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in flags:
        if flag.about.group not in groups:
            groups[flag.about.group] = parser.add_argument_group(flag.about.group)
        _add(flag, groups[flag.about.group])
    parts = []
    for state, title in (
        ("refused", "Known, not supported yet (refused unless left at the default):"),
        ("no_effect", "Accepted for compatibility, without effect (one warning each):"),
    ):
        names = [flag.option for flag in flags if flag.support.state == state]
        if names:
            listed = textwrap.fill(", ".join(names), _help_width() - 4, break_on_hyphens=False)
            parts.append(f"{title}\n{textwrap.indent(listed, '  ')}")
    parser.epilog = "\n\n".join([*parts, epilog] if epilog else parts).replace("%", "%%")
    return parser


def read_flags(cls: type[T], namespace: argparse.Namespace) -> T:
    """The instance of `cls` that a parsed command line describes."""
    values = {}
    for flag in flags_of(cls):
        value = getattr(namespace, flag.name)
        values[flag.name] = convert(flag, value) if get_origin(flag.hint) is tuple else value
    return cls(**values)
