"""An embedding of positions that is made of two small ones, of rows and of columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor]  # rows (r dim) and columns (width dim), of which positions are embedded


class AxialPositions(nn.Module):
    """Embeds a position as the sum of two MLPs, of its row and of its column, in rows of `width` positions."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlps = nn.ModuleList([_mlp(dim) for _ in range(2)])

    def forward(self, first: int, count: int, factors: Factors | None = None) -> Tensor:
        """The embedding of the positions first, first + 1, ...  -> (count dim)

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

    def at(self, positions: Tensor) -> Tensor:
        """The embedding of any positions.  (b) -> (b dim)"""
        return self.embed(0, positions // self.width) + self.embed(1, positions % self.width)

    def factors(self, length: int) -> Factors:
        """Rows and columns for the first `length` positions.  -> (r dim), (width dim)"""
        device, num_rows = self.like.device, -(-length // self.width)
        rows, columns = (torch.arange(count, device=device) for count in (num_rows, self.width))
        return self.embed(0, rows), self.embed(1, columns)

    def check_factors(self, factors: Factors, length: int) -> None:
        """Refuse factors that do not reach to this length."""
        rows, columns = -(-length // self.width), self.width
        got = [tuple(each.shape) for each in factors]
        if len(got) != 2 or got[0][0] < rows or got[1][0] != columns or any(shape[1:] != got[0][1:] for shape in got):
            raise ValueError(
                f"factorized_pos_emb must be rows ({rows} or more, dim) and columns ({columns}, dim), as "
                f"axial_pos_emb.factors({length}) gives them, got {got}"
            )

    @property
    def like(self) -> Tensor:
        """A parameter, for its device and dtype."""
        return next(self.mlps.parameters())

    def embed(self, axis: int, numbers: Tensor) -> Tensor:
        """The embedding of rows (axis 0) or columns (axis 1) by their numbers.  (k) -> (k dim)"""
        embedded: Tensor = self.mlps[axis](numbers[:, None].to(self.like.dtype))
        return embedded


def _mlp(dim: int) -> nn.Sequential:
    hidden = 2 * dim
    return nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim))
