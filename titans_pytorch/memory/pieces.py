"""Sequences in parts: tokens to be stored that wait or are new, and reads that come span by span."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StoredTokens(NamedTuple):
    """Whole chunks of tokens, as they come."""

    keys: Tensor  # (b t dim)    view that keys and gates are made of
    values: Tensor  # (b t dim)    view that values are made of; the same tensor unless views differ
    is_stored: Tensor | None  # (b t)  None: all

    def without_trace(self) -> StoredTokens:
        """The tokens, none of which is to be stored."""
        return self._replace(is_stored=torch.zeros(self.keys.shape[:2], dtype=torch.bool, device=self.keys.device))

    def map(self, change: Callable[..., Tensor], *args: Any) -> StoredTokens:
        """What a change of (b t ...) makes of all of them; one view stays one."""
        keys = change(self.keys, *args)
        values = keys if self.values is self.keys else change(self.values, *args)
        return StoredTokens(keys, values, None if self.is_stored is None else change(self.is_stored, *args))

    def between(self, start: int, stop: int) -> StoredTokens:
        """The tokens start..stop."""
        return self.map(lambda x: x[:, start:stop])


class Stored(NamedTuple):
    """Everything to be stored, as two parts in time that are only joined where they are used."""

    waiting: StoredTokens
    new: StoredTokens

    def select(self, start: int, stop: int) -> StoredTokens:
        """Tokens start..stop, counted from the first that waits."""
        num_waiting = self.waiting.keys.shape[1]

        def part(waiting: Tensor, new: Tensor) -> Tensor:
            before, after = waiting[:, start:stop], new[:, max(start - num_waiting, 0) : max(stop - num_waiting, 0)]
            return after if before.shape[1] == 0 else torch.cat((before, after), dim=1)

        keys = part(self.waiting.keys, self.new.keys)
        same = self.new.values is self.new.keys
        values = keys if same else part(self.waiting.values, self.new.values)
        if self.waiting.is_stored is None and self.new.is_stored is None:
            return StoredTokens(keys, values, None)
        masks = (
            torch.ones(t.keys.shape[:2], dtype=torch.bool, device=keys.device) if t.is_stored is None else t.is_stored
            for t in (self.waiting, self.new)
        )
        return StoredTokens(keys, values, part(*masks))

    @property
    def num_tokens(self) -> int:
        return self.waiting.keys.shape[1] + self.new.keys.shape[1]


class Pieces:
    """Pieces of a sequence (b t dim) that come one after another; without gradients they need no second copy."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.num_filled = num_tokens, 0
        self.parts: list[Tensor] = []

    def add(self, piece: Tensor) -> None:
        if torch.is_grad_enabled() or piece.shape[1] == self.num_tokens:
            self.parts.append(piece)
            return
        if not self.parts:
            self.parts.append(piece.new_empty(piece.shape[0], self.num_tokens, piece.shape[2]))
        self.parts[0][:, self.num_filled : self.num_filled + piece.shape[1]] = piece
        self.num_filled += piece.shape[1]

    def joined(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=1)
