"""What is due at the next token of every row: whose chunk or segment ends, whose base is renewed, where each writes.

Positions count all that layers are given: where long-term tokens are inserted between those of a text, these as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.attention.rotary import RotaryEmbedding, Turns


class Cadence(NamedTuple):
    """How a model cuts time, in tokens."""

    window: int  # of attention
    is_segmented: bool  # windows are segments, each of which begins anew; else they slide
    has_context: bool  # a segment is a sequence by itself, [what was read for it | persistent tokens | its tokens]
    num_persistent: int  # tokens that attention sees
    num_stored_before: int  # tokens that the memory has stored before the first
    chunk: int | None  # of the memory; None: there is none
    refresh: int | None  # after which its base is renewed

    def num_visible(self, position: int) -> int:
        """How many tokens of its window have been read by a row that has read so many."""
        return position % self.window if self.is_segmented else min(position, self.window - 1)

    def slots(self, position: int) -> list[int]:
        """Where in the window these tokens are, in order."""
        return [token % self.window for token in range(position - self.num_visible(position), position)]


class Due(NamedTuple):
    """What the next token of every row is to bring; whole numbers, which the host knows."""

    slots: list[int]  # of the window, where a row's token is written
    newest: list[int]  # the last slot that a row has written since its window began, this token's included
    waiting: list[int]  # where the token waits for its chunk to be complete
    chunks: list[int]  # rows whose chunk is complete with this token
    renewals: list[bool]  # of these: whether the base is renewed
    segments: list[int]  # rows whose segment ends with this token

    @staticmethod
    def of(cadence: Cadence, positions: Sequence[int]) -> Due:
        """positions: how many tokens each row has read"""
        slots = [position % cadence.window for position in positions]
        seen = [position + cadence.num_stored_before for position in positions]
        chunk = cadence.chunk
        chunks = [] if chunk is None else [row for row, count in enumerate(seen) if (count + 1) % chunk == 0]
        is_last = [cadence.is_segmented and slot == cadence.window - 1 for slot in slots]
        return Due(
            slots=slots,
            newest=slots if cadence.is_segmented else list(positions),
            waiting=[0 if chunk is None else count % chunk for count in seen],
            chunks=chunks,
            renewals=[cadence.refresh is not None and (seen[row] + 1) % cadence.refresh == 0 for row in chunks],
            segments=[row for row, ends in enumerate(is_last) if ends],
        )


class TokenStep(NamedTuple):
    """What is due, as tensors: all that a step has to know of where its rows stand."""

    rows: Tensor  # (b)  0, 1, ...
    positions: Tensor  # (b)
    slots: Tensor  # (b)
    waiting: Tensor  # (b)
    hidden: Tensor  # (b 1 1 s)  what a row does not see of [what was read for it | persistent tokens | window]
    turns: Turns | None  # (b 1 1 turning) each, of the tokens; None: no attention
    read_turns: Turns | None  # of what is read for them, in segments
    chunks: Tensor | None  # (k)  rows whose chunk ends; None: nobody's does
    renewals: Tensor | None  # (k)  of these: whether the base is renewed; None: nobody's is
    segments: Tensor | None  # (s)  rows whose segment ends
    embedded: Tensor | None = None  # (b 1 dim)  positions, of a model that adds them to its tokens

    @staticmethod
    def of(cadence: Cadence, positions: Sequence[int], rotary: RotaryEmbedding | None, like: Tensor) -> TokenStep:
        """like: a parameter, for its device and dtype"""
        due, device = Due.of(cadence, positions), like.device
        numbers = torch.tensor([list(positions), due.slots, due.newest, due.waiting], device=device)
        position, slots, newest, waiting = numbers.unbind(0)
        place, read_turns = position, None
        if cadence.has_context:  # S~ is a sequence by itself: [persistent | what was read | segment]
            place = slots + cadence.num_persistent
            read_turns = None if rotary is None else turns_of_rows(rotary, place, like)
            place = place + cadence.window
        return TokenStep(
            rows=torch.arange(len(positions), device=device),
            positions=position,
            slots=slots,
            waiting=waiting,
            hidden=hidden(cadence, newest),
            turns=None if rotary is None else turns_of_rows(rotary, place, like),
            read_turns=read_turns,
            chunks=torch.tensor(due.chunks, device=device) if due.chunks else None,
            renewals=torch.tensor(due.renewals, device=device) if any(due.renewals) else None,
            segments=torch.tensor(due.segments, device=device) if due.segments else None,
        )


def hidden(cadence: Cadence, newest: Tensor) -> Tensor:
    """What each row does not see: slots behind its newest.  newest: (b) -> (b 1 1 s)"""
    is_later = torch.arange(cadence.window, device=newest.device) > newest[:, None]
    persistent = is_later.new_zeros(len(newest), cadence.num_persistent)
    parts = (is_later, persistent, is_later) if cadence.has_context else (persistent, is_later)
    return torch.cat(parts, dim=1)[:, None, None]


def turns_of_rows(rotary: RotaryEmbedding, positions: Tensor, like: Tensor) -> Turns:
    """Cosine and sine of one token of each row.  positions: (b) -> (b 1 1 turning) each"""
    cos, sin = rotary.turns_at(positions, like)
    return cos[:, None, None], sin[:, None, None]
