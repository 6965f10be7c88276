"""Reading sequences of different lengths: exactly as each of them alone, for any causal module with states.

Real tokens come first in every row. What a row says does not depend on what stands behind its tokens, so where no state
is asked for, all rows are read at once. For states all rows read the first tokens, those that have ended leave with
theirs, the others go on: every token is read once, in as many calls as there are lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.checks.tensor_checks import check_batch
from titans_pytorch.ragged.marks import Marks, can_look_at
from titans_pytorch.ragged.packing import RealFirst, over
from titans_pytorch.ragged.state import Group, RaggedState, documents_of, groups_of, picked, ragged, settled

Read = Callable[[Any, Any], tuple[Tensor, Any]]
"""(piece (b n ...), state or None) -> (outputs (b n ...), next state), for rows at one position"""


def read_marked(read: Read, x: Tensor, marks: Marks, state: Any) -> tuple[Tensor, Any]:
    """Outputs, 0 at padding, and the state of every row behind its last real token.  x: (b n ...)

    The host has to know the lengths, so that an accelerator is waited for once.
    """
    check_rows(state, len(x))
    if marks.documents is not None:
        return read_documents(read, x, marks, state, has_end=True)
    mask, batch = marks.mask, x.shape[0]
    if mask is None or bool(mask.all()):
        outputs, groups = with_ends(read, x, [x.shape[1]] * batch, groups_of(state, batch))
        return outputs, settled(ragged(groups, remembered(state)))
    packing = RealFirst.of(mask)
    lengths: list[int] = mask.sum(dim=1).tolist()
    outputs, groups = with_ends(read, packing.pack(x), lengths, groups_of(state, batch))
    return packing.unpack(outputs), settled(ragged(groups, remembered(state)))


def read_without_state(read: Read, x: Tensor, marks: Marks | None, state: Any) -> Tensor:
    """Outputs alone, 0 at padding: without documents in one call, and without a look at values on an accelerator."""
    check_rows(state, len(x))
    if marks is not None and marks.documents is not None:
        return read_documents(read, x, marks, state, has_end=False)[0]
    mask = None if marks is None else marks.mask
    if mask is None or (can_look_at(mask) and bool(mask.all())):
        return without_ends(read, x, groups_of(state, x.shape[0]))
    packing = RealFirst.of(mask)
    return packing.unpack(without_ends(read, packing.pack(x), groups_of(state, x.shape[0])))


def check_rows(state: Any, batch: int) -> None:
    """A ragged state is of as many sequences as the input; a model checks its own states itself."""
    if isinstance(state, RaggedState):
        check_batch("state", state.batch, batch)


def remembered(state: Any) -> tuple[int | None, ...] | None:
    """The document of every row, as a state knows it."""
    documents = documents_of(state)
    return None if documents is None else tuple(documents)


# ---- rows whose tokens come first


def with_ends(read: Read, x: Tensor, lengths: Sequence[int], groups: list[Group]) -> tuple[Tensor, list[Group]]:
    """Read so many tokens of each row.  x: (b n ...) -> (b n ...), 0 behind the tokens, and each row with its state"""
    outputs: Tensor | None = None
    after: list[Group] = []
    for rows, state in groups:
        done = 0
        for stop in sorted({lengths[row] for row in rows}):
            if stop > done:
                y, state = read(at_rows(x, rows)[:, done:stop], state)
                if len(rows) == len(x) and stop - done == x.shape[1]:
                    return in_place(y, rows), [Group(rows, state)]
                if outputs is None:
                    outputs = y.new_zeros(*x.shape[:2], *y.shape[2:])
                outputs[index(rows, x), done:stop] = y.to(outputs.dtype)
                done = stop
            ended = [place for place, row in enumerate(rows) if lengths[row] == stop]
            going = [place for place, row in enumerate(rows) if lengths[row] > stop]
            after.append(Group(tuple(rows[place] for place in ended), picked(state, ended) if going else state))
            if going:
                rows, state = tuple(rows[place] for place in going), picked(state, going)
    if outputs is None:
        raise ValueError("attention_mask must have at least one real token, got only padding")
    return outputs, after


def without_ends(read: Read, x: Tensor, groups: list[Group]) -> Tensor:
    """Read all of each row.  x: (b n ...) -> (b n ...)"""
    if len(groups) == 1:
        return in_place(read(at_rows(x, groups[0].rows), groups[0].state)[0], groups[0].rows)
    parts = [read(at_rows(x, rows), state)[0] for rows, state in groups]
    return in_place(torch.cat(parts), [row for rows, _ in groups for row in rows])


def at_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of x; all of them in order are x itself."""
    return x if list(rows) == list(range(len(x))) else x[index(rows, x)]


def in_place(y: Tensor, rows: Sequence[int]) -> Tensor:
    """What was read for some order of all rows, in their own order."""
    if list(rows) == list(range(len(y))):
        return y
    return y[index(sorted(range(len(rows)), key=rows.__getitem__), y)]


def index(rows: Sequence[int], x: Tensor) -> Tensor:
    """Numbers of rows, as an index of x."""
    return torch.tensor(list(rows), device=x.device)


# ---- documents


class Document(NamedTuple):
    """A stretch of the real tokens of a row that belong together."""

    row: int
    start: int
    stop: int
    number: int  # its id
    state: Any  # what it goes on from, for this row alone; None: it begins here

    @property
    def length(self) -> int:
        return self.stop - self.start


def read_documents(read: Read, x: Tensor, marks: Marks, state: Any, *, has_end: bool) -> tuple[Tensor, Any]:
    """Every document as if it were alone. A row's first goes on with its state if the id is that of its last token.

    has_end: return the state of each row's last document; else None
    """
    documents = marks.documents
    mask = torch.ones_like(documents, dtype=torch.bool) if marks.mask is None else marks.mask  # type: ignore[arg-type]
    packing = RealFirst.of(mask)
    packed = packing.pack(x)
    found = stretches(packing.pack(documents), mask.sum(dim=1), state, len(x))  # type: ignore[arg-type]
    if not found and has_end:
        raise ValueError("attention_mask must have at least one real token, got only padding")
    if not found:  # all the same a call, as of processes that share parameters all have to make it
        return packing.unpack(without_ends(read, packed, groups_of(state, len(x)))), None
    last = {document.row: number for number, document in enumerate(found)} if has_end else {}
    ends = [found[number] for number in last.values()]
    others = [document for number, document in enumerate(found) if number not in set(last.values())]
    parts: list[tuple[list[Document], Tensor]] = []
    for alike in buckets(others):
        parts.append((alike, without_ends(read, cut(packed, alike), joint(alike))))
    after: list[Group] = []
    if ends:
        y, after = with_ends(read, cut(packed, ends), [each.length for each in ends], joint(ends))
        parts.append((ends, y))
    outputs = packing.unpack(put_back(parts, packed))
    return outputs, after_documents(after, ends, state, len(x)) if has_end else None


def stretches(documents: Tensor, lengths: Tensor, state: Any, batch: int) -> list[Document]:
    """The documents of every row, in order.  documents: (b n), real tokens first"""
    is_start = torch.ones_like(documents, dtype=torch.bool)
    is_start[:, 1:] = documents[:, 1:] != documents[:, :-1]
    is_start &= torch.arange(documents.shape[1], device=documents.device) < lengths[:, None]
    rows, starts = is_start.nonzero(as_tuple=True)
    ids: list[int] = documents[rows, starts].tolist()
    begins, ends = list(zip(rows.tolist(), starts.tolist(), strict=True)), lengths.tolist()
    stops = [
        start_after if row_after == row else ends[row]
        for (row, _), (row_after, start_after) in pairwise([*begins, (-1, 0)])
    ]
    known = documents_of(state) or [None] * batch
    groups = [] if state is None else groups_of(state, batch)
    standing = {row: (group.state, place) for group in groups for place, row in enumerate(group.rows)}
    found = []
    for (row, start), stop, number in zip(begins, stops, ids, strict=True):
        before, place = standing.get(row, (None, 0))
        goes_on = start == 0 and known[row] in (None, number)
        found.append(Document(row, start, stop, number, picked(before, [place]) if goes_on else None))
    return found


def buckets(documents: list[Document]) -> list[list[Document]]:
    """Documents that are read at once: less than half of what is read is behind the end of one.

    In one of several processes all of them, so that every process calls the model equally often: blocks whose
    parameters are shared out are gathered in each call.
    """
    is_one_of_many = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_one_of_many and torch.distributed.get_world_size() > 1:
        return [documents] if documents else []
    by_size: dict[int, list[Document]] = {}
    for document in documents:
        by_size.setdefault(document.length.bit_length(), []).append(document)
    return list(by_size.values())


def joint(documents: list[Document]) -> list[Group]:
    """The documents as rows of one batch, in groups of those at one position."""
    return ragged(Group((row,), document.state) for row, document in enumerate(documents)).groups


def places(documents: list[Document], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (k 1) and columns (k n) of the tokens of documents, and which of these are theirs (k n)."""
    rows, starts, lengths = (
        torch.tensor([(each.row, each.start, each.length) for each in documents], device=device).unsqueeze(-1).unbind(1)
    )
    steps = torch.arange(max(each.length for each in documents), device=device)
    is_own = steps < lengths
    return rows, starts + torch.where(is_own, steps, 0), is_own


def cut(packed: Tensor, documents: list[Document]) -> Tensor:
    """Documents as rows, behind their last tokens the first ones again.  (b n ...) -> (k n' ...)"""
    rows, columns, _ = places(documents, packed.device)
    return packed[rows, columns]


def put_back(parts: list[tuple[list[Document], Tensor]], packed: Tensor) -> Tensor:
    """What was read of documents, where their tokens stand in the rows.  -> (b n ...)"""
    batch, count = packed.shape[:2]
    like = parts[0][1]
    outputs = like.new_zeros(batch, count + 1, *like.shape[2:])  # one more, for what is behind the ends
    for documents, y in parts:
        rows, columns, is_own = places(documents, packed.device)
        outputs[rows.expand_as(columns), torch.where(is_own, columns, count)] = y.to(like.dtype)
    return outputs[:, :count]


def after_documents(after: list[Group], ends: list[Document], state: Any, batch: int) -> Any:
    """The state of all rows: of their last documents, or, where a row had no token, what it was."""
    row_of = [document.row for document in ends]
    groups = [Group(tuple(row_of[place] for place in rows), part) for rows, part in after]
    known = documents_of(state) or [None] * batch
    for document in ends:
        known[document.row] = document.number
    for rows, part in groups_of(state, batch):
        kept = [place for place, row in enumerate(rows) if row not in set(row_of)]
        if kept:
            groups.append(Group(tuple(rows[place] for place in kept), picked(part, kept)))
    return ragged(groups, tuple(known))


__all__ = ["Read", "over", "read_marked", "read_without_state"]
