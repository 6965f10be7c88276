"""The two halves of a state: tensors, which a graph carries on, and the numbers that the host counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

from torch import Tensor

from titans_pytorch.memory.rows import map_rows

State = TypeVar("State")


def tensors(state: Any) -> list[Tensor]:
    """All tensors of a state, in order."""
    found: list[Tensor] = []

    def note(_: int, tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_rows(note, state)
    return found


def whole_numbers(state: Any) -> Iterator[int]:
    """What the host counts in a state, in order."""
    if isinstance(state, tuple):
        for part in state:
            yield from whole_numbers(part)
    elif isinstance(state, int) and not isinstance(state, bool):
        yield state


def with_numbers(state: State, numbers: Iterable[int]) -> State:
    """A state of the same tensors, with other numbers."""
    left = iter(numbers)

    def renewed(part: Any) -> Any:
        if isinstance(part, int) and not isinstance(part, bool):
            return next(left)
        if not isinstance(part, tuple):
            return part
        parts = map(renewed, part)
        return tuple(parts) if type(part) is tuple else type(part)(*parts)

    return cast(State, renewed(state))
