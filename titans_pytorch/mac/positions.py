"""Where tokens sit once long-term tokens are inserted, and the embedding of those positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


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


class AxialPositions(nn.Module):
    """Embeds a position as the sum of two MLPs, of its row and of its column, in rows of `width` positions."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlps = nn.ModuleList([_mlp(dim) for _ in range(2)])

    def forward(self, first: int, count: int, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Of the positions first, first + 1, ...  -> (count dim)

        factors: rows (r dim) and columns (width dim) that were computed before, with `factors`
        """
        device = self.like.device
        positions = torch.arange(first, first + count, device=device)
        rows, columns = positions // self.width, positions % self.width
        if factors is not None:
            self.check_factors(factors, first + count)
            return factors[0][rows] + factors[1][columns]
        first_row, last_row = first // self.width, (first + count - 1) // self.width
        row_of = self.embed(0, torch.arange(first_row, last_row + 1, device=device))[rows - first_row]
        if count < self.width:
            return row_of + self.embed(1, columns)
        return row_of + self.embed(1, torch.arange(self.width, device=device))[columns]

    def factors(self, length: int) -> tuple[Tensor, Tensor]:
        """Rows and columns for the first `length` positions.  -> (r dim), (width dim)"""
        device = self.like.device
        num_rows = -(-length // self.width)
        return self.embed(0, torch.arange(num_rows, device=device)), self.embed(
            1, torch.arange(self.width, device=device)
        )

    def check_factors(self, factors: tuple[Tensor, Tensor], length: int) -> None:
        rows, columns = -(-length // self.width), self.width
        got = [tuple(each.shape) for each in factors]
        if len(got) != 2 or got[0][0] < rows or got[1][0] != columns or any(shape[1:] != got[0][1:] for shape in got):
            raise ValueError(
                f"factorized_pos_emb must be rows ({rows} or more, dim) and columns ({columns}, dim), as "
                f"axial_pos_emb.factors({length}) gives them, got {got}"
            )

    @property
    def like(self) -> Tensor:
        return next(self.mlps.parameters())

    def embed(self, axis: int, numbers: Tensor) -> Tensor:
        """(k) -> (k dim)"""
        embedded: Tensor = self.mlps[axis](numbers[:, None].to(self.like.dtype))
        return embedded


def _mlp(dim: int) -> nn.Sequential:
    hidden = 2 * dim
    return nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim))
