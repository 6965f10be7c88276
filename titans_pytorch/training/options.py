"""Settings from the command line: every field of the dataclasses is an option; mistakes are one sentence."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.settings import dashed

Built = TypeVar("Built")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        try:
            parsed, unknown = self.parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            raise SettingsError(f"{error.argument_name or 'command'}: {error.message}") from None
        if unknown:
            raise SettingsError(f"unknown option {unknown[0]}{self.suggestion(unknown[0])}")
        return parsed

    def suggestion(self, option: str) -> str:
        close = difflib.get_close_matches(option.split("=")[0], self._option_string_actions, n=1)
        return f"; did you mean {close[0]}?" if close else "; --help lists all of them"


def add_options(parser: argparse.ArgumentParser, kind: type[Any], title: str) -> None:
    """One option for each field; what is not given stays out of the parsed namespace."""
    group, hints, explained = parser.add_argument_group(title), get_type_hints(kind), explanations(kind)
    for each in options_of(kind):
        about = f"{each.metadata.get('help', explained.get(each.name, ''))} [{shown(each.default)}]".strip()
        if hints[each.name] is bool:
            about += f", --no-{dashed(each.name)}: off"
            group.add_argument(f"--no-{dashed(each.name)}", dest=each.name, action="store_const", const=False, **SILENT)
        group.add_argument(
            f"--{dashed(each.name)}",
            dest=each.name,
            help=about.replace("%", "%%"),
            default=argparse.SUPPRESS,
            **accepts(hints[each.name]),
        )


SILENT: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}


def options_of(kind: type[Any]) -> list[Field[Any]]:
    """The fields that a command line can give; mappings it cannot."""
    hints = get_type_hints(kind)
    return [each for each in fields(kind) if get_origin(hints[each.name]) is not Mapping]


def explanations(kind: type[Any]) -> dict[str, str]:
    """What docstrings say of fields: `name, name: text`, gone on with by lines that are further in."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        for names, text in re.findall(r"^    ([\w, ]+): ((?:.|\n        )+)", each.__doc__ or "", flags=re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def shown(default: Any) -> str:
    return ",".join(map(str, default)) or "none" if isinstance(default, tuple) else str(default)


def accepts(hint: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a type."""
    if hint is bool:
        return {"type": switch, "nargs": "?", "const": True, "metavar": "on|off"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) in (Union, UnionType):
        (inner,) = (each for each in get_args(hint) if each is not NoneType)
        if get_origin(inner) is tuple:
            (kind, *_) = get_args(inner)
            return {"type": optional_list(kind), "metavar": f"{name_of(kind)},..."}
        return {"type": optional(inner), "metavar": name_of(inner)}
    if get_origin(hint) is tuple:
        return {"type": separated(get_args(hint)[0]), "metavar": f"{name_of(get_args(hint)[0])},..."}
    return {"type": named(hint), "metavar": name_of(hint)}


def name_of(kind: type) -> str:
    return {int: "N", float: "X", str: "TEXT"}.get(kind, kind.__name__.upper())


def named(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    what = {int: "a whole number", float: "a number"}.get(kind, "a text")  # type: ignore[call-overload]

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None

    return parse


def optional(kind: type) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "none" else named(kind)(text)


def optional_list(kind: type) -> Callable[[str], Any]:
    """2,4,6 -> (2, 4, 6); all -> None"""
    return lambda text: None if text.lower() == "all" else separated(kind)(text)


def switch(text: str) -> bool:
    if text.lower() not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, got {text!r}")
    return text.lower() == "on"


def separated(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """2,4,6 -> (2, 4, 6); none -> ()"""
    return lambda text: () if text.lower() == "none" else tuple(named(kind)(each) for each in text.split(","))


def from_json(kind: type[Any], saved: dict[str, Any], where: str) -> Any:
    """Settings as they were saved."""
    saved = kind.from_run(saved) if isinstance(saved, dict) and hasattr(kind, "from_run") else saved
    if not isinstance(saved, dict):
        raise SettingsError(f"{where} must hold settings of {kind.__name__}, got {saved!r}")
    if unknown := sorted(set(saved) - {each.name for each in fields(kind)}):
        raise SettingsError(f"{where} must hold settings of {kind.__name__}, got {unknown}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return built(lambda: kind(**values))


def built(make: Callable[[], Built]) -> Built:
    """Settings, some of which refuse what they are given in their constructor."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error


def given(parsed: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """The options of a dataclass that were on the command line."""
    return {each.name: getattr(parsed, each.name) for each in fields(kind) if hasattr(parsed, each.name)}


def no_shared_names(kinds: Sequence[type[Any]]) -> None:
    """Options are not prefixed, so that no two dataclasses may have a field of the same name."""
    names = [each.name for kind in kinds for each in fields(kind)]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise TypeError(f"settings must have different names, got twice {doubled}")
