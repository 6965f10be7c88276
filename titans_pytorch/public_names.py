"""Names that files on disk speak: of classes, of kinds of states, of functions; never where they are defined.

Classes of the library are known by their own names, modules of torch.nn as "nn.SiLU". Yours are known after

    register_named("huber", my_loss)

and what is not known is refused: nothing is imported because a file says so.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

from torch import nn

__all__ = ["class_of", "is_registered", "named", "public_name", "register_named", "register_state", "state_kind"]

Thing = TypeVar("Thing")

NAMED: dict[str, Any] = {}
OURS, OF_TORCH = "titans_pytorch.", ("nn.", "torch.nn.")


def register_named(name: str, thing: Thing) -> Thing:
    """Make a class, a function or another object known to files.  A thing with several names is written by its first"""
    if not isinstance(name, str) or not name:
        raise TypeError(f"a public name must be a text, got {name!r}")
    known = NAMED.get(name, thing)
    if known is not thing and origin(known) != origin(thing):
        raise ValueError(f"a public name must be new, got {name!r}, which is {origin(known)}")
    NAMED[name] = thing
    return thing


def register_state(kind: type[Thing]) -> type[Thing]:
    """Make a kind of state known to `save_state` and `load_state` by its own name; a decorator of named tuples."""
    if not is_state_kind(kind):
        raise TypeError(f"a kind of state must be a NamedTuple, got {kind!r}")
    return register_named(kind.__name__, kind)


def is_registered(thing: object) -> bool:
    """Whether a file may speak of it."""
    return any(known is thing for known in NAMED.values())


def public_name(thing: object) -> str:
    """The name by which files speak of a class or of a registered object."""
    for name, known in NAMED.items():
        if known is thing:
            return name
    if is_of_torch(thing):
        return f"nn.{thing.__name__}"
    raise ValueError(f"what a file names must be known by register_named, got {origin(thing)}")


def class_of(name: str, argument: str = "class") -> type:
    """The class with a public name; older files give the whole path, of which the last part counts."""
    path, _, last = str(name).rpartition(".")
    found: Any = NAMED.get(str(name))
    if found is None and f"{path}.".startswith(OURS):
        found = NAMED.get(last)
    elif found is None and f"{path}.".startswith(OF_TORCH):
        found = getattr(nn, last, None)
        found = found if is_of_torch(found) else None
    if not isinstance(found, type) or is_state_kind(found):
        known = [each for each, thing in NAMED.items() if isinstance(thing, type) and not is_state_kind(thing)]
        raise ValueError(f"{argument} must be a module of torch.nn or one of {listed(known)}, got {name!r}")
    return found


def state_kind(name: str) -> type:
    """The kind of state with a public name."""
    found = NAMED.get(str(name))
    if is_state_kind(found):
        return found
    known = [each for each, thing in NAMED.items() if is_state_kind(thing)]
    raise ValueError(f"a kind of state must be one of {listed(known)}, got {name!r}")


def named(name: str, argument: str = "name") -> Any:
    """The function or other object, no class, with a public name."""
    found = NAMED.get(str(name))
    if found is None or isinstance(found, type):
        known = [each for each, thing in NAMED.items() if not isinstance(thing, type)]
        raise ValueError(f"{argument} must be one of {listed(known)}, got {name!r}")
    return found


def is_of_torch(thing: object) -> TypeGuard[type[nn.Module]]:
    """Whether it is a module of torch.nn."""
    return isinstance(thing, type) and issubclass(thing, nn.Module) and getattr(nn, thing.__name__, None) is thing


def is_state_kind(thing: object) -> TypeGuard[type]:
    """Whether it is a class of named tuples."""
    return isinstance(thing, type) and issubclass(thing, tuple) and hasattr(thing, "_fields")


def origin(thing: object) -> str:
    """Where a thing was defined, for errors and to know a class again that was defined twice (by a reload)."""
    kind: Any = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def listed(names: list[str]) -> str:
    """Names as an error lists them."""
    return ", ".join(sorted(names))
