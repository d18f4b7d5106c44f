"""Command-line flags out of configuration fields.

A verb's flags are the fields of dataclasses, never a list kept beside them: their help, type, choices and bounds come from
`pointsman.config.flag`. Only flags that were given reach the result, so that the defaults live in one place. Nothing is
abbreviated, and what is not known is refused with the nearest that is.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Container, Sequence
from typing import Any

from pointsman.config import Flag, flags, nearest


class UsageError(ValueError):
    """The command line cannot be understood; the message is for the person who typed it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(message)

    def exit(self, status: int = 0, message: str | None = None) -> typing.NoReturn:
        sys.stdout.flush()  # here and not at the end of the process, so that a reader that has gone is noticed in time
        super().exit(status, message)


def new_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that raises UsageError instead of ending the process, and takes no abbreviations."""
    return _Parser(
        prog=prog,
        description=description,
        usage=f"{prog} [FLAGS]",
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
    )


def add_flags(parser: argparse.ArgumentParser, config: type, positional: str | None = None, without: Container[str] = ()) -> None:
    """Add every field of a configuration class, grouped by its sections; the field named `positional` is an argument without a name.

    `without` are fields that the verb has a flag of its own for.
    """
    groups: dict[str, Any] = {}
    for entry in flags(config).values():
        if entry.name in without:
            continue
        if entry.name == positional:
            several = _is_list(entry)
            parser.add_argument(entry.name, metavar=entry.name.upper(), nargs="*" if several else "?", help=entry.help)
            parser.usage = f"{parser.prog} {entry.name.upper()}{'...' if several else ''} [FLAGS]"
            continue
        if entry.section not in groups:
            groups[entry.section] = parser.add_argument_group(entry.section) if entry.section else parser
        _add_flag(groups[entry.section], entry, alone=positional is not None)


def _add_flag(group: Any, entry: Flag, *, alone: bool) -> None:
    """`alone`: a text of a list needs the flag before it, as texts without a flag mean something else."""
    names = entry.names
    if entry.type is bool:
        assert entry.default is False, f"{entry.name}: a flag without a value can only turn something on"
        group.add_argument(*names, dest=entry.name, action="store_true", help=_help(entry))
        return
    metavar = "{" + ",".join(entry.choices) + "}" if entry.choices else _element(entry).__name__.upper()
    shape: dict[str, Any] = {}
    if _is_list(entry):
        shape = {"action": "append"} if alone and _element(entry) is str else {"action": "extend", "nargs": "+"}
    group.add_argument(*names, dest=entry.name, type=_reader(entry), metavar=metavar, help=_help(entry), **shape)


def _help(entry: Flag) -> str:
    text = entry.help.replace("%", "%%")
    if entry.default is None or entry.default == "" or entry.default == () or "default:" in text:
        return text
    default = " ".join(str(value) for value in entry.default) if _is_list(entry) else f"{entry.default}"
    return f"{text} (default: {default})"


def _is_list(entry: Flag) -> bool:
    return typing.get_origin(entry.type) is tuple


def _element(entry: Flag) -> type:
    return typing.cast(type, typing.get_args(entry.type)[0]) if _is_list(entry) else entry.type


def _reader(entry: Flag) -> Callable[[str], Any]:
    """From the text of one value to the value, checked. The error names the flag as it is typed."""
    kind = _element(entry)
    checked = dataclasses.replace(entry, name=entry.names[0], type=kind)

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = text
        try:
            return checked.check(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """The values given, by field name. Raises UsageError that names what is wrong and the nearest right one."""
    try:
        namespace, unknown = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        text = str(error.message)
        raise UsageError(text if text.startswith("--") else f"{error.argument_name}: {text}") from None
    if unknown:
        raise UsageError(_unknown(unknown, parser))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items()}
    return {name: value for name, value in values.items() if value is not None}


def build(config: type, values: dict[str, Any]) -> Any:
    """A configuration from the values of its fields, those of its sections included. Raises ValueError as the class does."""
    hints = typing.get_type_hints(config)
    content: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[item.name]):
            own = {name: value for name, value in values.items() if name in flags(hints[item.name])}
            content[item.name] = build(hints[item.name], own)
        elif item.name in values:
            content[item.name] = values[item.name]
    return config(**content)


def _unknown(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    flag = next((word for word in words if word.startswith("-")), None)
    if flag is None:
        return f"unexpected argument {words[0]!r} (a text of several words needs quotes)"
    name = flag.partition("=")[0]
    known = [text for action in parser._actions for text in action.option_strings]
    return f"unknown flag {name!r}{nearest(name, known)}"
