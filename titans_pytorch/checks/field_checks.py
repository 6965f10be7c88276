"""Dataclasses of settings that come from a user or a file: every value has to be what its field's type hint says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MISFIT = object()
"""What `fitted` says of a value that is not what a hint says"""


def check_fields(settings: Any, shown: Callable[[str], str] = str) -> None:
    """Refuse values of wrong types.  Numpy's whole numbers become Python's, lists tuples, so that both are one setting.

    shown: how a field is called where it is refused
    """
    hints = get_type_hints(type(settings))
    for each in fields(settings):
        given, hint = getattr(settings, each.name), hints[each.name]
        value = fitted(given, hint)
        if value is MISFIT:
            kind = ValueError if get_origin(hint) is Literal else TypeError
            raise kind(f"{shown(each.name)} must be {described(hint)}, got {given!r}")
        object.__setattr__(settings, each.name, value)


def fitted(given: Any, hint: Any) -> Any:
    """A value as its hint says; MISFIT: it is something else."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return given
    if hint in (bool, str, NoneType, None):
        return given if isinstance(given, NoneType if hint is None else hint) else MISFIT
    if hint is int:
        return int(given) if isinstance(given, Integral) and not isinstance(given, bool) else MISFIT
    if hint is float:
        is_number = isinstance(given, Real) and not isinstance(given, bool) and not math.isnan(given)
        return given if is_number else MISFIT
    if origin is Literal:
        return given if isinstance(given, str) and given in inner else MISFIT
    if origin in (Union, UnionType):
        found = (fitted(given, each) for each in inner)
        return next((value for value in found if value is not MISFIT), MISFIT)
    if origin in (tuple, Sequence):
        return fitted_sequence(given, inner[0])
    if origin in (dict, Mapping):
        return fitted_mapping(given, inner[1])
    return given


def fitted_sequence(given: Any, hint: Any) -> Any:
    if not isinstance(given, list | tuple):
        return MISFIT
    found = tuple(fitted(each, hint) for each in given)
    return MISFIT if any(each is MISFIT for each in found) else found


def fitted_mapping(given: Any, hint: Any) -> Any:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        return MISFIT
    found = {name: fitted(value, hint) for name, value in given.items()}
    return MISFIT if any(each is MISFIT for each in found.values()) else found


NAMES = {
    bool: ("True or False", "switches"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    NoneType: ("None", "None"),
    Any: ("anything", "values"),
}
"""What one of a type is called, and several"""


def described(hint: Any, is_plural: bool = False) -> str:
    """What a hint allows, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in NAMES:
        return NAMES[hint][is_plural]
    if origin is Literal:
        return " or ".join(inner) if len(inner) < 3 else f"one of {', '.join(inner)}"
    if origin in (Union, UnionType):
        return " or ".join(described(each, is_plural) for each in inner)
    if origin in (tuple, Sequence):
        return f"{'lists' if is_plural else 'a list'} of {described(inner[0], True)}"
    if origin in (dict, Mapping):
        return f"{'mappings' if is_plural else 'a mapping'} of names to {described(inner[1], True)}"
    return str(hint)
