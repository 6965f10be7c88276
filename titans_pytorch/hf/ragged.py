"""Rows of different lengths, each read as if it were alone: a padded token leaves no trace, wherever it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
"""(b n ...) each: what is said of every token, by as many layers as were asked for"""

Reader = Callable[[Tensor, Any], tuple[Outputs, Any]]
"""(embeddings (b n dim), state) -> outputs, and the state after them; all rows have n tokens"""


@dataclass(frozen=True)
class Group:
    """Rows that have read equally many tokens."""

    rows: Tensor  # (g)  which rows of the batch
    state: Any  # of the library, with g sequences; None: nothing was read


def one_group(x: Tensor) -> tuple[Group, ...]:
    """All rows, before their first token."""
    return (Group(torch.arange(len(x), device=x.device), None),)


def read_whole(read: Reader, x: Tensor, mask: Tensor | None) -> Outputs:
    """Whole sequences whose states nobody wants, in one call.  x: (b n dim), mask: (b n) or None -> (b n ...) each

    Real tokens move to the front: what stands behind them is not seen by them.
    """
    if mask is None:
        return read(x, None)[0]
    order = real_first(mask)
    outputs, _ = read(x.gather(1, order[..., None].expand_as(x)), None)
    back = order.argsort(dim=1)[..., None]
    return tuple(y.gather(1, back.expand_as(y)).where(mask[..., None], 0) for y in outputs)


def read_on(
    read: Reader, x: Tensor, mask: Tensor | None, groups: tuple[Group, ...]
) -> tuple[Outputs, tuple[Group, ...]]:
    """The next tokens of rows that may be at different lengths.  x: (b n dim), mask: (b n) or None -> (b n ...) each

    All rows of a group read the first tokens, those that have more the next ones, and so on: every real token is read
    once, in as many calls as there are lengths.
    """
    if mask is None and len(groups) == 1:  # which then are all rows, in order
        outputs, state = read(x, groups[0].state)
        return outputs, (Group(groups[0].rows, state),)
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    lengths, order = mask.sum(dim=1), real_first(mask)
    packed = x.gather(1, order[..., None].expand_as(x))
    written: Outputs | None = None
    after: list[Group] = []
    for group in groups:
        rows, state, done = group.rows, group.state, 0
        for stop in sorted(set(lengths[rows].tolist())):
            if stop > done:
                outputs, state = read(packed[rows, done:stop], state)
                written = written or tuple(y.new_zeros(*x.shape[:2], *y.shape[2:]) for y in outputs)
                for whole, y in zip(written, outputs, strict=True):
                    whole[rows[:, None], order[rows, done:stop]] = y
                done = stop
            ends = lengths[rows] == stop
            after.append(Group(rows[ends], chosen(state, ends)))
            rows, state = rows[~ends], chosen(state, ~ends)
    if written is None:  # nobody has a token: as many zeros as there would be outputs
        written = tuple(y.new_zeros(*x.shape[:2], *y.shape[2:]) for y in read(x[:1, :1], None)[0])
    return written, tuple(after)


def real_first(mask: Tensor) -> Tensor:
    """The order in which real tokens stand before padded ones.  (b n) -> (b n)"""
    return (~mask).byte().argsort(dim=1, stable=True)


def chosen(state: Any, rows: Tensor) -> Any:
    """The sequences of a state that a mask names; None if nothing was read, or nobody is named."""
    if state is None or not rows.any():
        return None
    return state if rows.all() else state.select(rows.nonzero()[:, 0])
