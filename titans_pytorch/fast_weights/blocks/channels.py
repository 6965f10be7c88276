"""Weights that evolve without being built, where every channel is forgotten by itself.

A channel is an entry of a weight's last axis (a column of `x @ w`, so an output). Its gates scale the columns of what
is forgotten and, of what has been stored since, the right factors:

    q @ w_j = initial_j ⊙ (q @ W) + sum_o past_{o,j} ⊙ (q @ M_o) + (q left^T) @ (surprise[j] ⊙ right)   (eq. 32)

The scaled factors differ from group to group, which is what this costs over `factored`; momenta have no channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.blocks.factored import finished, full_precision, step_tensors
from titans_pytorch.fast_weights.interface import Carry, Rows, Weights
from titans_pytorch.fast_weights.rules.recurrence import Coefficients
from titans_pytorch.fast_weights.taps import Surprises


class ChannelBlock(NamedTuple):
    start: Carry
    surprises: Surprises
    coefficients: dict[str, Coefficients]  # as of `unroll_channels`, of every parameter

    @property
    def num_chunks(self) -> int:
        return next(iter(self.coefficients.values())).surprise.shape[-1]

    def product(self, name: str, x: Tensor, rows: Rows, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j), transposed (r g k j) -> (r g k i)"""
        initial, past, surprise = self.coefficients[name][:3]
        weights = (self.start.weights[name], *self.start.momenta.get(name, ()))
        scales = [scale[..., rows].mT.unsqueeze(2) for scale in (initial, *past)]  # (r g 1 j)
        out = torch.zeros((), dtype=x.dtype, device=x.device)
        for weight, scale in zip(weights, scales, strict=False):
            if is_transposed:
                out = out + torch.bmm((x * scale).flatten(1, 2), weight.mT).unflatten(1, x.shape[1:3])
            else:
                out = out + torch.bmm(x.flatten(1, 2), weight).unflatten(1, x.shape[1:3]) * scale
        if name not in self.surprises.factors:
            return out
        left, right = self.surprises.factors[name]
        scaled = right.unsqueeze(1) * surprise[..., rows, :].movedim(1, -1).unsqueeze(3)  # (r g n c j)
        left, scaled = left.flatten(1, 2).unsqueeze(1), scaled.flatten(2, 3)
        if is_transposed:
            return out + (x @ scaled.mT) @ left
        return out + (x @ left.mT) @ scaled

    def vector(self, name: str, rows: Rows) -> Tensor:
        """-> (r g 1 d)"""
        values = self.materialise(name)[:, rows]
        return values.reshape(*values.shape[:2], 1, -1)

    def materialise(self, name: str) -> Tensor:
        """The weights before each chunk and after the last.  -> (r n+1 ...)"""
        initial, past, surprise = self.coefficients[name][:3]
        weights = (self.start.weights[name], *self.start.momenta.get(name, ()))
        shape, steps = weights[0].shape[1:], step_tensors(self, name)
        with full_precision(initial):
            flat = [weight.reshape(len(weight), -1, initial.shape[1]) for weight in weights]  # (r i j)
            out = torch.einsum("rjm,rij->rmij", initial, flat[0])
            for scale, momentum in zip(past, flat[1:], strict=False):
                out = out + torch.einsum("rjm,rij->rmij", scale, momentum)
            if steps is not None:
                steps = steps.to(out.dtype).reshape(*steps.shape[:2], *flat[0].shape[1:])
                out = out + torch.einsum("rjmn,rnij->rmij", surprise, steps)
            return out.reshape(*out.shape[:2], *shape)

    def entry(self, row: int) -> Weights:
        return {name: self.materialise(name)[:, row] for name in self.start.weights}

    def finish(self) -> Carry:
        return finished(self)
