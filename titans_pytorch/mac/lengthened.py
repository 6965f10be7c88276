"""Where tokens sit once long-term tokens are inserted between them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Lengthened(NamedTuple):
    """After every complete segment that has tokens behind it, long-term tokens are inserted.

    Positions are those of the lengthened sequence: 0-based, inserted tokens included.
    """

    segment_len: int
    num_longterm: int

    def length(self, num_tokens: int) -> int:
        """Positions that the first `num_tokens` tokens take, with all that is inserted before the last of them."""
        return num_tokens + max(num_tokens - 1, 0) // self.segment_len * self.num_longterm

    def insert(self, tokens: Tensor, longterm: Tensor, num_before: int) -> Tensor:
        """Insert long-term tokens.  tokens: (b n d) with num_before tokens before them, longterm: (m d) -> (b n' d)"""
        batch, count, _ = tokens.shape
        both = torch.cat((tokens, longterm.to(tokens.dtype).expand(batch, -1, -1)), dim=1)
        if self.num_longterm == 0:
            return both
        stride = self.segment_len + self.num_longterm
        first, last = self.length(num_before), self.length(num_before + count)
        positions = torch.arange(first, last, device=tokens.device)
        offset = positions % stride
        token = positions // stride * self.segment_len + offset - num_before
        return both.index_select(1, torch.where(offset < self.segment_len, token, count + offset - self.segment_len))

    def drop(self, lengthened: Tensor, num_before: int, count: int) -> Tensor:
        """Only the tokens themselves.  (b n' d) -> (b n d)"""
        if self.num_longterm == 0:
            return lengthened
        tokens = torch.arange(num_before, num_before + count, device=lengthened.device)
        positions = tokens + tokens // self.segment_len * self.num_longterm - self.length(num_before)
        return lengthened.index_select(1, positions)
