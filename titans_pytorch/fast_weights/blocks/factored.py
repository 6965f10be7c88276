"""Weights that evolve without being built.

With u_i = left_i^T right_i and the shares of `blocks.summed`, reading after chunk j needs no w_j:

    q @ w_j = initial_j (q @ W) + sum_o past_{o,j} (q @ M_o) + ((q left^T) * surprise[j]) @ right   (cf. eq. 16-18)
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.fast_weights.blocks.summed import SummedBlock
from titans_pytorch.fast_weights.interface import Entries, record
from titans_pytorch.fast_weights.surprises import Factors


@record
class FactoredBlock(SummedBlock):
    """A gate of a chunk holds for all of a parameter."""

    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        tokens, shape = x.flatten(1, 2), x.shape[1:3]

        def scaled(share: Tensor) -> Tensor:
            return (x * share[:, entries, None, None]).flatten(1, 2)

        (share, weight), *more = self.parts(name)
        out = torch.bmm(scaled(share), weight.mT if is_transposed else weight)
        for share, weight in more:
            out = torch.baddbmm(out, scaled(share), weight.mT if is_transposed else weight)
        factors = self.surprises.factors.get(name)
        if factors is not None:
            left, right = Factors(factors.right, factors.left) if is_transposed else factors
            similarity = torch.bmm(tokens, left.flatten(1, 2).mT).unflatten(2, left.shape[1:3]).unflatten(1, shape)
            weighted = similarity * self.shares[name].surprise[:, entries, None, :, None]
            out = torch.baddbmm(out, weighted.flatten(3).flatten(1, 2), right.flatten(1, 2))
        return out.unflatten(1, shape)
