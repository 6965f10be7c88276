"""The state of a batch whose sequences are at different positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.memory.rows import Chosen, detached, moved
from titans_pytorch.public_names import register_state


class Group(NamedTuple):
    """Sequences at one position."""

    rows: tuple[int, ...]  # their numbers in the batch
    state: Any  # of the model, for these rows in this order; None: nothing has been read


@register_state
class RaggedState(NamedTuple):
    """States of sequences at different positions, in groups of those at one position.

    Models return one where padding or borders of documents leave their rows at different positions, and go on from it
    as from a state of their own. Each group is such a state, for `rows` of the batch.
    """

    rows: tuple[tuple[int, ...], ...]  # numbers of the sequences in each group
    states: tuple[Any, ...]  # each group's state of the model; None: nothing has been read
    documents: tuple[int | None, ...] | None = None  # each sequence's last document id; None: none was given

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return sum(map(len, self.rows))

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """How many tokens each sequence has read, of its document."""
        found = {row: position(state) for rows, state in self.groups for row in rows}
        return tuple(found[row] for row in range(self.batch))

    @property
    def groups(self) -> list[Group]:
        """Rows with their states."""
        return [Group(*each) for each in zip(self.rows, self.states, strict=True)]

    def detach(self) -> RaggedState:
        """A state that is cut from the graph of what came before, for truncated backpropagation through time."""
        return detached(self)

    def to(self, *args: Any, **kwargs: Any) -> RaggedState:
        """Move to another device; the arguments of `torch.Tensor.to`."""
        return moved(self, *args, **kwargs)

    def select(self, rows: Chosen) -> RaggedState:
        """The sequences with these numbers, in this order and as often as named: a beam search's next beams."""
        chosen, groups = numbers(rows, self.batch), []
        for group in self.groups:
            places = {row: place for place, row in enumerate(group.rows)}
            hits = [(new, places[row]) for new, row in enumerate(chosen) if row in places]
            if hits:
                new_rows, old_places = zip(*hits, strict=True)
                groups.append(Group(new_rows, picked(group.state, old_places)))
        documents = None if self.documents is None else tuple(self.documents[row] for row in chosen)
        return ragged(groups, documents)

    def repeat(self, times: int) -> RaggedState:
        """Every sequence `times` times in a row: (b) -> (b times)"""
        return self.select([row for row in range(self.batch) for _ in range(times)])

    def restart(self, rows: Tensor | Sequence[bool]) -> RaggedState:
        """Let some sequences begin anew, positions included, as if nothing had been read.  rows: (b) bool"""
        marked = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        if len(marked) != self.batch or not all(isinstance(each, bool) for each in marked):
            raise ValueError(f"rows must be {self.batch} booleans, one for each sequence, got {marked}")
        groups = [Group((row,), None) for row, is_marked in enumerate(marked) if is_marked]
        for group in self.groups:
            places = [place for place, row in enumerate(group.rows) if not marked[row]]
            if places:
                groups.append(Group(tuple(group.rows[place] for place in places), picked(group.state, places)))
        documents = self.documents
        if documents is not None:
            documents = tuple(None if is_marked else each for each, is_marked in zip(documents, marked, strict=True))
        return ragged(groups, documents)

    @staticmethod
    def join(states: Sequence[Any]) -> RaggedState:
        """One batch of the sequences of several states of one model, ragged or not, at whatever positions."""
        if not states:
            raise ValueError("states must be at least one state, got none")
        if wrong := [type(state).__name__ for state in states if not hasattr(state, "select")]:
            raise TypeError(f"states must be states of one model, got {wrong[0]}")
        kinds = {type(group.state) for state in states for group in groups_of(state) if group.state is not None}
        if len(kinds) > 1:
            names = " beside ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(f"states must be of one kind, got {names}")
        groups: list[Group] = []
        documents: list[int | None] = []
        for state in states:
            first = len(documents)
            groups += [Group(tuple(first + row for row in rows), part) for rows, part in groups_of(state)]
            documents += documents_of(state) or [None] * state.batch
        has_documents = any(each is not None for each in documents)
        return ragged(groups, tuple(documents) if has_documents else None)


def position(state: Any) -> int:
    """How many tokens a state of a model has read."""
    if state is None:
        return 0
    seen: int = state.num_seen if hasattr(state, "num_seen") else state.num_tokens
    return seen


def picked(state: Any, places: Sequence[int]) -> Any:
    """Some sequences of a group's state."""
    if state is None:
        return None
    if not hasattr(state, "select"):
        raise TypeError(f"padding and documents need states with select and join, got a {type(state).__name__}")
    return state.select(list(places))


def groups_of(state: Any, batch: int | None = None) -> list[Group]:
    """The groups of any state of `batch` sequences, which a state of a model knows itself."""
    if isinstance(state, RaggedState):
        return state.groups
    return [Group(tuple(range(state.batch if batch is None else batch)), state)]


def documents_of(state: Any) -> list[int | None] | None:
    """The last document id of every sequence, as far as a state knows it."""
    return list(state.documents) if isinstance(state, RaggedState) and state.documents is not None else None


def ragged(groups: Iterable[Group], documents: tuple[int | None, ...] | None = None) -> RaggedState:
    """One group for each position, rows in order."""
    by_position: dict[tuple[int, bool], list[Group]] = {}
    for group in groups:
        by_position.setdefault((position(group.state), group.state is None), []).append(group)
    found = [in_order(merged(by_position[key])) for key in sorted(by_position)]
    return RaggedState(tuple(group.rows for group in found), tuple(group.state for group in found), documents)


def merged(groups: list[Group]) -> Group:
    """Groups at one position as one."""
    if len(groups) == 1:
        return groups[0]
    rows = tuple(row for group in groups for row in group.rows)
    first = groups[0].state
    return Group(rows, None if first is None else type(first).join([group.state for group in groups]))


def in_order(group: Group) -> Group:
    """A group whose rows ascend."""
    order = sorted(range(len(group.rows)), key=group.rows.__getitem__)
    if order == list(range(len(order))):
        return group
    return Group(tuple(group.rows[place] for place in order), picked(group.state, order))


def settled(state: RaggedState) -> Any:
    """The model's own state where all sequences are at one position and no document has a number."""
    if len(state.rows) == 1 and state.documents is None:
        return state.states[0]
    return state


def numbers(rows: Chosen, batch: int) -> list[int]:
    """The numbers that an index names."""
    device = rows.device if isinstance(rows, Tensor) else None
    found: list[int] = torch.arange(batch, device=device)[rows].tolist()
    return found
