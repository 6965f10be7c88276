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
        first, num_whole, rest = self.cut(num_before, count)
        longterm = longterm.to(tokens.dtype).expand(batch, -1, -1)
        if first == count or self.num_longterm == 0:  # with gradients, long-term tokens get one that is zero
            return torch.cat((tokens, longterm[:, :0]), dim=1) if torch.is_grad_enabled() else tokens
        begun, whole, last = tokens.split((first, num_whole * self.segment_len, rest), dim=1)
        inserted = longterm.unsqueeze(1).expand(-1, num_whole, -1, -1)
        lengthened = torch.cat((inserted, whole.unflatten(1, (num_whole, self.segment_len))), dim=2).flatten(1, 2)
        return torch.cat((begun, lengthened, longterm if rest else longterm[:, :0], last), dim=1)

    def cut(self, num_before: int, count: int) -> tuple[int, int, int]:
        """Tokens in three parts: how many are of a segment that has begun, whole segments, tokens after them."""
        first = min(count, -num_before % self.segment_len if num_before else self.segment_len)
        return first, (count - first) // self.segment_len, (count - first) % self.segment_len

    def drop(self, lengthened: Tensor, num_before: int, count: int) -> Tensor:
        """Only the tokens themselves.  (b n' d) -> (b n d)"""
        first, num_whole, rest = self.cut(num_before, count)
        if first == count or self.num_longterm == 0:
            return lengthened
        stride = self.segment_len + self.num_longterm
        sizes = (first, num_whole * stride, self.num_longterm if rest else 0, rest)
        begun, whole, _, last = lengthened.split(sizes, dim=1)
        _, segments = whole.unflatten(1, (num_whole, stride)).split((self.num_longterm, self.segment_len), dim=2)
        return torch.cat((begun, segments.flatten(1, 2), last), dim=1)
