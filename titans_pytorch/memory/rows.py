"""One way to visit every tensor of a state together with the axis along which its sequences lie.

A state is a tree of named tuples, tuples, dicts of tensors, tensors and plain values. Along its row axis a tensor has
an entry for each sequence, (b), or for each head of each sequence, (b·h), heads fastest. That is the first axis, unless
the class of a named tuple declares another with `rows_along`. A class with a field that follows from the others puts it
in order in a method `settled`, which is called when all fields are new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Tree = TypeVar("Tree")
Kind = TypeVar("Kind", bound=type)

Axis = int | tuple[int, ...]
"""A row axis, counted from the end if it is negative; for a tuple, the axis of each element"""

Chosen = Tensor | slice | Sequence[int]
"""Some sequences of a batch, as an index"""

DECLARED: dict[type, tuple[Axis, ...]] = {}


def rows_along(**axes: Axis) -> Callable[[Kind], Kind]:
    """Declare the fields of a named tuple whose sequences do not lie along the first axis."""

    def declare(kind: Kind) -> Kind:
        DECLARED[kind] = tuple(axes.get(name, 0) for name in kind.__annotations__)
        return kind

    return declare


def map_rows(fn: Callable[..., Tensor], *trees: Tree) -> Tree:
    """A tree like the given ones, of fn(row axis, a tensor of the first tree, its counterparts in the others)."""
    return cast(Tree, visited(fn, 0, *trees))


def visited(fn: Callable[..., Tensor], axis: Axis, tree: Any, *others: Any) -> Any:
    """What `map_rows` makes of trees whose row axis is known."""
    if others:
        check_alike(tree, others)
    if isinstance(tree, Tensor):
        return fn(axis, tree, *others)
    if isinstance(tree, dict):
        return {name: fn(axis, tensor, *(other[name] for other in others)) for name, tensor in tree.items()}
    if not isinstance(tree, tuple):
        return tree
    kind: Any = type(tree)
    if kind is tuple:
        axes = axis if isinstance(axis, tuple) else repeat(axis)
        return tuple(map(visited, repeat(fn), axes, tree, *others))
    new = kind(*map(visited, repeat(fn), DECLARED.get(kind, repeat(0)), tree, *others))
    return new.settled() if hasattr(kind, "settled") else new


def check_alike(first: Any, others: tuple[Any, ...]) -> None:
    """Trees of one form, with equal numbers; what tensors hold does not matter."""
    for tree in others:
        is_alike = type(tree) is type(first)
        if is_alike and isinstance(tree, dict):
            is_alike = tree.keys() == first.keys()
        elif is_alike and isinstance(tree, tuple):
            is_alike = len(tree) == len(first)
        elif is_alike and isinstance(tree, int):
            is_alike = tree == first
        if not is_alike:
            raise not_alike(brief(first), brief(tree))


def brief(tree: Any) -> str:
    """A part of a state as an error names it."""
    if isinstance(tree, dict):
        return f"the names {sorted(tree)}"
    return repr(tree) if tree is None or isinstance(tree, int) else type(tree).__name__


def not_alike(*found: str) -> ValueError:
    """The error that says what was found in places that must be alike."""
    return ValueError(f"states must be of one module and cut alike, got {' beside '.join(found)} in one place")


def detached(state: Tree) -> Tree:
    """A state that is cut from the graph of what came before."""
    return map_rows(lambda _, t: t.detach(), state)


def moved(state: Tree, *args: Any, **kwargs: Any) -> Tree:
    """A state on another device or of another dtype; the arguments of `torch.Tensor.to`."""

    def to(_: int, t: Tensor) -> Tensor:
        if t.is_floating_point():
            return t.to(*args, **kwargs)
        return t.to(torch.empty(0, device=t.device).to(*args, **kwargs).device)

    return map_rows(to, state)


def selected(state: Tree, rows: Chosen, batch: int) -> Tree:
    """The sequences with these numbers, of the `batch` of a state."""

    def pick(axis: int, t: Tensor) -> Tensor:
        axis %= t.ndim
        split = t.unflatten(axis, (batch, -1))
        return split[(slice(None),) * axis + (rows,)].flatten(axis, axis + 1)

    return map_rows(pick, state)


def write_rows(buffers: Tree, rows: Sequence[int], new: Tree, batch: int) -> None:
    """Write other sequences over those with these numbers, of the `batch` of a tree that nobody shares, in place."""
    indices: dict[torch.device, Tensor] = {}

    def write(axis: int, kept: Tensor, given: Tensor) -> Tensor:
        axis %= kept.ndim
        if kept.device not in indices:
            indices[kept.device] = torch.tensor(rows, device=kept.device)
        where = indices[kept.device]
        kept.unflatten(axis, (batch, -1)).index_copy_(axis, where, given.unflatten(axis, (len(rows), -1)))
        return kept

    map_rows(write, buffers, new)


def check_joinable(kind: type[Tree], states: Sequence[Tree], num_seen: Callable[[Tree], int]) -> None:
    """States of one kind that have seen equally many tokens."""
    if not states:
        raise ValueError(f"states must be at least one {kind.__name__}, got none")
    for state in states:
        if not isinstance(state, kind):
            raise TypeError(f"states must be of the kind {kind.__name__}, got {type(state).__name__}")
    if len(seen := sorted(set(map(num_seen, states)))) > 1:
        raise ValueError(f"states must have seen equally many tokens, got {' and '.join(map(str, seen))}")


def joined(states: Sequence[Tree]) -> Tree:
    """One batch of the sequences of several states of one module."""

    def cat(axis: int, *parts: Tensor) -> Tensor:
        if len({part.select(axis, 0).shape for part in parts}) > 1:
            raise not_alike(*(f"a tensor {(*part.shape,)}" for part in parts))
        return torch.cat(parts, dim=axis)

    return map_rows(cat, *states)


def num_chosen(rows: Chosen, batch: int) -> int:
    """How many of `batch` sequences an index names."""
    return len(torch.arange(batch, device=rows.device if isinstance(rows, Tensor) else None)[rows])


def outside_inference(x: Tensor) -> Tensor:
    """A tensor that may take part in a graph; one that was made in inference mode may not, and is copied."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()
