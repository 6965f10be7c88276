"""Checks of plain arguments, with one voice: what was wrong, what came, what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check_positive(**sizes: float | None) -> None:
    """Every given number is above zero; None is left alone."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, (int, float))):
            raise TypeError(f"{name} must be a number, got {size!r}")
        if size is not None and not size > 0:
            raise ValueError(f"{name} must be positive, got {size}")


def check_whole(**sizes: int | None) -> None:
    """Every given number is a whole one above zero; None is left alone."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise TypeError(f"{name} must be a whole number, got {size!r}")
    check_positive(**sizes)


def check_counts(**counts: int) -> None:
    """Every number is whole and at least zero."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be a whole number, got {count!r}")
        if count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}")


def check_number(**values: float | None) -> None:
    """Every given value is a number of any sign; None is left alone."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{name} must be a number, got {value!r}")


def check_at_least(name: str, given: Any, smallest: int, what: str) -> None:
    """A whole number is not below another, which is named by what it is."""
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name} must be a whole number, got {given!r}")
    if given < smallest:
        raise ValueError(f"{name} must be at least {what} ({smallest}), got {given}")


def check_even(**sizes: int) -> None:
    """Every given number of features falls into pairs."""
    for name, size in sizes.items():
        if size % 2:
            raise ValueError(f"{name} must be even, since features are turned in pairs, got {size}")


def check_multiple(name: str, size: int | None, chunk: int) -> None:
    """A number of tokens consists of whole chunks of storing; None is left alone."""
    if size is not None and size % chunk != 0:
        raise ValueError(f"{name} must be a multiple of the store chunk size {chunk}, got {size}")


def check_chunk_size(chunk_size: Any) -> tuple[int, int]:
    """-> (retrieve, store)"""
    pair = (chunk_size, chunk_size) if isinstance(chunk_size, int) else chunk_size
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"chunk_size must be a whole number or a pair (retrieve, store), got {chunk_size!r}")
    if len(pair) != 2:
        raise ValueError(f"chunk_size must be a whole number or a pair (retrieve, store), got {chunk_size!r}")
    check_whole(**{"chunk_size for reading": pair[0], "chunk_size for storing": pair[1]})
    return pair[0], pair[1]


def check_widths(name: str, given: Any) -> tuple[int, ...]:
    """At least two whole numbers above zero."""
    if isinstance(given, (int, str)) or not hasattr(given, "__iter__"):
        raise TypeError(f"{name} must be a sequence of at least two widths, got {given!r}")
    widths = tuple(given)
    if len(widths) < 2:
        raise ValueError(f"{name} must have at least two widths, got {widths}")
    check_whole(**{f"{name}[{i}]": width for i, width in enumerate(widths)})
    return widths


def check_sizes(name: str, given: Any) -> tuple[int, ...]:
    """At least one whole number above zero."""
    if isinstance(given, (int, str)) or not hasattr(given, "__iter__"):
        raise TypeError(f"{name} must be a sequence of whole numbers, got {given!r}")
    if not (sizes := tuple(given)):
        raise ValueError(f"{name} must have at least one number, got {sizes}")
    check_whole(**{f"{name}[{i}]": size for i, size in enumerate(sizes)})
    return sizes


def check_layers(name: str, given: Any, depth: int) -> tuple[int, ...]:
    """Numbers of layers, from 1; None: all of them."""
    if given is None:
        return tuple(range(1, depth + 1))
    if isinstance(given, (int, str)) or not hasattr(given, "__iter__"):
        raise TypeError(f"{name} must be a sequence of layer numbers, got {given!r}")
    layers = tuple(given)
    for number in layers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must hold whole numbers, got {number!r}")
        if not 1 <= number <= depth:
            raise ValueError(f"{name} must hold numbers from 1 to the depth {depth}, got {number}")
    return layers


def check_choice(name: str, given: Any, allowed: tuple[Any, ...]) -> None:
    """A value is one of a few."""
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {given!r}")


def check_switches(**switches: Any) -> None:
    """Every given value is True or False."""
    for name, given in switches.items():
        if not isinstance(given, bool):
            raise TypeError(f"{name} must be True or False, got {given!r}")


def check_exclusive(**options: bool) -> None:
    """At most one of them is chosen."""
    if len(chosen := [name for name, is_chosen in options.items() if is_chosen]) > 1:
        raise ValueError(f"{' and '.join(chosen)} exclude each other, got both: choose one")


def check_callable(**functions: Callable[..., Any] | None) -> None:
    """Every given value can be called; None is left alone."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, got {function!r} ({type(function).__name__})")


def check_options(name: str, given: Any, allowed: dict[str, tuple[type, ...]]) -> None:
    """given: a mapping whose keys and types are among `allowed`"""
    if not hasattr(given, "items"):
        raise TypeError(f"{name} must be a mapping, got {type(given).__name__}")
    for key, value in given.items():
        if key not in allowed:
            raise ValueError(f"{name} must be among {sorted(allowed)}, got {key!r}")
        if not isinstance(value, allowed[key]):
            raise TypeError(f"{name}[{key!r}] must be of {[t.__name__ for t in allowed[key]]}, got {value!r}")


def check_reserved(name: str, given: Any, reserved: tuple[str, ...], owner: str = "transformer") -> dict[str, Any]:
    """A mapping of further arguments without those that are set elsewhere."""
    if given is not None and not hasattr(given, "items"):
        raise TypeError(f"{name} must be a mapping, got {type(given).__name__}")
    if taken := sorted(set(given or {}) & set(reserved)):
        raise ValueError(f"{name} must leave {taken} to the arguments of the {owner}, got {dict(given)}")
    return dict(given or {})
