"""Rows at positions of their own, decoded as one batch: joined, selected and taken out at any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.decoding.compiled import compiled_logits
from titans_pytorch.decoding.due import TokenStep
from titans_pytorch.decoding.row_model import RowModel
from titans_pytorch.memory.rows import joined, map_rows, outside_inference, selected
from titans_pytorch.ragged.state import Group


class RowBatch:
    """Sequences of one model, each at a position of its own, which all read their next token at once.

    Unlike a state it is no value: `run` moves it on. `state` takes the state of a row out, as a copy.
    """

    def __init__(self, model: RowModel, positions: Sequence[int], buffers: Any) -> None:
        self.model, self.positions, self.buffers = model, list(positions), buffers

    @staticmethod
    @torch.no_grad()
    def of(model: RowModel, states: Sequence[Any]) -> RowBatch:
        """The sequences of several states, one state after the other."""
        positions = [state.num_tokens for state in states for _ in range(state.batch)]
        return RowBatch(model, positions, joined([model.enter(state) for state in states]))

    @staticmethod
    def of_groups(model: RowModel, groups: Sequence[Group]) -> RowBatch:
        """The rows of groups, each at its number."""
        order = [row for group in groups for row in group.rows]
        batch = RowBatch.of(model, [group.state for group in groups])
        return batch.select(sorted(range(len(order)), key=order.__getitem__))

    @staticmethod
    def join(batches: Sequence[RowBatch]) -> RowBatch:
        """The rows of several batches of one model."""
        positions = [position for batch in batches for position in batch.positions]
        return RowBatch(batches[0].model, positions, joined([batch.buffers for batch in batches]))

    def select(self, rows: Sequence[int]) -> RowBatch:
        """Some rows, in this order, as copies."""
        buffers = selected(self.buffers, list(rows), self.batch)
        return RowBatch(self.model, [self.positions[row] for row in rows], buffers)

    @property
    def batch(self) -> int:
        """The number of rows."""
        return len(self.positions)

    def state(self, row: int) -> Any:
        """The state of a row, of one sequence."""
        return self.model.leave(self.buffers, row, self.positions[row])

    @torch.no_grad()
    def run(self, ids: Tensor) -> Tensor:
        """Read the next token of every row.  ids: (b) -> logits of the token after it (b num_tokens)"""
        return self.moved(partial(compiled_logits, self.model) if self.model.compiles else self.model.logits, ids)

    @torch.no_grad()
    def read(self, x: Tensor) -> Tensor:
        """Read the next token of every row, embedded.  x: (b 1 dim) -> what all layers make of it (b 1 dim)"""
        return self.moved(self.model.hidden, x)

    def moved(self, compute: Callable[[Tensor, Any, TokenStep], Tensor], given: Tensor) -> Tensor:
        """What a step gives, after which every row has read a token more."""
        self.buffers = map_rows(lambda _, t: outside_inference(t), self.buffers)
        self.model.read_between(self.buffers, self.positions)
        found = compute(given, self.buffers, self.model.step(self.positions))
        self.positions = [position + 1 for position in self.positions]
        return found
