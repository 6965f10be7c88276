"""Weights that evolve without being built, where every channel is forgotten by itself.

A channel is an entry of a weight's last axis (a column of `x @ w`, so an output). Its gates scale the columns of what
is forgotten and, of what has been stored since, the right factors:

    q @ w_j = initial_j ⊙ (q @ W) + sum_o past_{o,j} ⊙ (q @ M_o) + (q left^T) @ (surprise[j] ⊙ right)   (eq. 32)

The scaled factors differ from group to group, which is what this costs over `factored`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.fast_weights.blocks.factored import SummedBlock
from titans_pytorch.fast_weights.interface import Entries, record


@record
class ChannelBlock(SummedBlock):
    """A gate of a chunk holds for one channel of a parameter."""

    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j), transposed (r g k j) -> (r g k i)"""
        out = torch.zeros((), dtype=x.dtype, device=x.device)
        for share, weight in self.parts(name):
            scale = share[..., entries].mT.unsqueeze(2)  # (r g 1 j)
            if is_transposed:
                out = out + torch.bmm((x * scale).flatten(1, 2), weight.mT).unflatten(1, x.shape[1:3])
            else:
                out = out + torch.bmm(x.flatten(1, 2), weight).unflatten(1, x.shape[1:3]) * scale
        if name not in self.surprises.factors:
            return out
        left, right = self.surprises.factors[name]
        surprise = self.shares[name].surprise[..., entries, :]
        scaled = right.unsqueeze(1) * surprise.movedim(1, -1).unsqueeze(3)  # (r g n c j)
        left, scaled = left.flatten(1, 2).unsqueeze(1), scaled.flatten(2, 3)
        if is_transposed:
            return out + (x @ scaled.mT) @ left
        return out + (x @ left.mT) @ scaled
