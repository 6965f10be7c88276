"""Blocks whose weights and momenta lie one below another, as `chain` leaves them: one product reads them all."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.fast_weights.blocks.factored import FactoredBlock
from titans_pytorch.fast_weights.interface import Entries, Weights, record


@record
class StackedBlock(FactoredBlock):
    """Weights that evolve without being built, from starts that lie one below another."""

    states: Weights  # name -> (r ai j)  what `start` has, in the order of `parts`

    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        if is_transposed:
            return super().product(name, x, entries, is_transposed)
        shares = torch.stack([share for share, _ in self.parts(name)], dim=2)[:, entries]  # (r g a)
        scaled = (shares[:, :, None, :, None] * x.unsqueeze(3)).flatten(3).flatten(1, 2)
        left, right = (factor.flatten(1, 2) for factor in self.surprises.factors[name])
        similarity = torch.bmm(x.flatten(1, 2), left.mT).unflatten(2, (self.num_chunks, -1)).unflatten(1, x.shape[1:3])
        weighted = similarity * self.shares[name].surprise[:, entries, None, :, None]
        out = torch.baddbmm(torch.bmm(scaled, self.states[name]), weighted.flatten(3).flatten(1, 2), right)
        return out.unflatten(1, x.shape[1:3])
