"""The windows of attention of rows at positions of their own: a token's keys and values go to a slot of its row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.attention.key_values import KeyValues, joined
from titans_pytorch.decoding.due import Cadence, TokenStep
from titans_pytorch.fast_weights.precision import at_least_float32, full_precision


class WindowRows(NamedTuple):
    """What attention may see of every row, in place: [what was read for tokens | persistent tokens | window].

    The first part is only there where segments have a context. Which slots hold tokens follows from a row's position.
    """

    keys: Tensor  # (b h s d)
    values: Tensor  # (b h s d)

    def write(self, tokens: KeyValues, step: TokenStep, first: int) -> None:
        """The keys and values of one token of each row, into its slot after the `first` ones."""
        for kept, new in zip(self, tokens, strict=True):
            kept[step.rows, :, first + step.slots] = new[:, :, 0].to(kept.dtype)

    def write_prefix(self, prefix: KeyValues | None) -> None:
        """Keys and values of tokens that all rows see, into the first slots.  (b or 1, h p d) each"""
        if prefix is not None:
            for kept, new in zip(self, prefix, strict=True):
                kept[:, :, : prefix.length] = new

    def read(self, row: int, slots: list[int], first: int = 0) -> KeyValues:
        """Some slots of a row, after the `first` ones, as copies."""
        where = torch.tensor(slots, dtype=torch.long, device=self.keys.device) + first
        return KeyValues(self.keys[row : row + 1, :, where], self.values[row : row + 1, :, where])


def window_rows(cadence: Cadence, position: int, *parts: KeyValues | None) -> WindowRows:
    """Rows that have read so many tokens.  parts: of tokens, of persistent ones (None: there are none), of tokens"""
    slots = cadence.slots(position)

    def with_room(x: Tensor) -> Tensor:
        room = x.new_zeros(*x.shape[:2], cadence.window, x.shape[3])
        room[:, :, slots] = x
        return room

    *read, prefix, recent = parts
    rows = joined(*(part and part.map(with_room) for part in read), prefix, recent and recent.map(with_room))
    return WindowRows(*rows.map(torch.clone))


def attend_rows(rows: WindowRows, placed: Tensor, unplaced: Tensor, num_unplaced: int, step: TokenStep) -> Tensor:
    """One query of each row over what it may see.  placed: (b h 1 d), turned; unplaced: as the first keys see it"""
    dtype = at_least_float32(placed.dtype)
    with full_precision(placed):
        keys, values = (x.to(dtype) for x in rows)
        scores = placed.to(dtype) @ keys[:, :, num_unplaced:].mT
        if num_unplaced:
            scores = torch.cat((unplaced.to(dtype) @ keys[:, :, :num_unplaced].mT, scores), dim=-1)
        hidden = step.hidden[..., -scores.shape[-1] :]
        weights = (scores * placed.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return (weights @ values).to(placed.dtype)
