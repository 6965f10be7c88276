"""One way to visit every tensor of a state together with the axis along which its sequences lie.

A state is a tree of named tuples, tuples, dicts, tensors and plain values. Along its row axis a tensor has an entry for
each sequence, (b), or for each head of each sequence, (b·h), heads fastest. That is the first axis, unless the class
of a named tuple declares another with `rows_along`. A class with a field that follows from the others puts it in order
in a method `settled`, which is called when all fields are new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Tree = TypeVar("Tree")
Kind = TypeVar("Kind", bound=type)

Axis = int | tuple[int, ...]
"""A row axis, counted from the end if it is negative; of a tuple, one for each element"""

Chosen = Tensor | slice | Sequence[int]
"""Some sequences of a batch, as an index"""

DECLARED: dict[type, dict[str, Axis]] = {}


def rows_along(**axes: Axis) -> Callable[[Kind], Kind]:
    """Declare the fields of a named tuple whose sequences do not lie along the first axis."""

    def declare(kind: Kind) -> Kind:
        DECLARED[kind] = axes
        return kind

    return declare


def map_rows(fn: Callable[..., Tensor], *trees: Tree) -> Tree:
    """A tree like the given ones, of fn(row axis, a tensor of the first tree, its counterparts in the others)."""
    return cast(Tree, visited(fn, trees, 0))


def visited(fn: Callable[..., Tensor], trees: tuple[Any, ...], axis: Axis) -> Any:
    """What `map_rows` makes of trees whose row axis is known."""
    tree = trees[0]
    if len(trees) > 1:
        check_alike(trees)
    if isinstance(tree, Tensor):
        return fn(axis % tree.ndim if isinstance(axis, int) else axis, *trees)
    if isinstance(tree, dict):
        return {name: visited(fn, tuple(each[name] for each in trees), axis) for name in tree}
    if not isinstance(tree, tuple):
        return tree
    new = [visited(fn, each, inner) for each, inner in zip(zip(*trees, strict=True), axes_of(tree, axis), strict=True)]
    if not hasattr(tree, "_fields"):
        return tuple(new)
    named = type(tree)(*new)
    return named.settled() if hasattr(named, "settled") else named


def axes_of(tree: tuple[Any, ...], axis: Axis) -> Iterable[Axis]:
    """The row axis of each element of a tuple."""
    if hasattr(tree, "_fields"):
        declared = DECLARED.get(type(tree), {})
        return [declared.get(name, 0) for name in tree._fields]
    return axis if isinstance(axis, tuple) else (axis,) * len(tree)


def check_alike(trees: tuple[Any, ...]) -> None:
    """Trees of one form, with equal numbers; what tensors hold does not matter."""
    first = trees[0]
    for tree in trees[1:]:
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
        split = t.unflatten(axis, (batch, -1)).movedim(axis, 0)
        return split[rows].movedim(0, axis).flatten(axis, axis + 1)

    return map_rows(pick, state)


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
        if len({(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}) > 1:
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
