"""Weights that evolve without being built.

With u_i = left_i^T right_i (see `taps`) and the coefficients of `recurrence`, reading after chunk j needs no w_j:

    q @ w_j = initial_j (q @ W) + sum_o past_{o,j} (q @ M_o) + ((q left^T) * surprise[j]) @ right   (cf. eq. 16-18)

Only what is carried to the next block, W and M, is ever a matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.interface import Carry, Rows, Weights
from titans_pytorch.fast_weights.recurrence import Coefficients
from titans_pytorch.fast_weights.taps import Factors, Surprises


class FactoredBlock(NamedTuple):
    start: Carry
    surprises: Surprises
    coefficients: Coefficients

    @property
    def num_chunks(self) -> int:
        return self.coefficients.surprise.shape[-1]

    def product(self, name: str, x: Tensor, rows: Rows, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        initial, past, surprise = self.coefficients[:3]
        weight, momenta = self.start.weights[name], list(self.start.momenta.get(name, ()))
        factors = self.surprises.factors.get(name)
        if is_transposed:
            weight, momenta = weight.mT, [momentum.mT for momentum in momenta]
            factors = None if factors is None else Factors(factors.right, factors.left)
        tokens, shape = x.flatten(1, 2), x.shape[1:3]
        out = torch.bmm((x * initial[:, rows, None, None]).flatten(1, 2), weight)
        for order, momentum in enumerate(momenta):
            out = torch.baddbmm(out, (x * past[order][:, rows, None, None]).flatten(1, 2), momentum)
        if factors is not None:
            left, right = factors
            similarity = torch.bmm(tokens, left.flatten(1, 2).mT).unflatten(2, left.shape[1:3]).unflatten(1, shape)
            weighted = similarity * surprise[:, rows, None, :, None]
            out = torch.baddbmm(out, weighted.flatten(3).flatten(1, 2), right.flatten(1, 2))
        return out.unflatten(1, shape)

    def vector(self, name: str, rows: Rows) -> Tensor:
        """-> (r g 1 d)"""
        values = self.materialise(name)[:, rows]
        return values.reshape(*values.shape[:2], 1, -1)

    def materialise(self, name: str) -> Tensor:
        """The weights before each chunk and after the last.  -> (r n+1 ...)"""
        initial, past, surprise = self.coefficients[:3]
        out = torch.einsum("rn,r...->rn...", initial, self.start.weights[name])
        for order, momentum in enumerate(self.start.momenta.get(name, ())):
            out = out + torch.einsum("rn,r...->rn...", past[order], momentum)
        steps = self.tensors(name)
        return out if steps is None else out + torch.einsum("rni,ri...->rn...", surprise, steps)

    def tensors(self, name: str) -> Tensor | None:
        """-> (r n ...)"""
        if name in self.surprises.factors:
            return self.surprises.factors[name].matrices()
        return self.surprises.tensors.get(name)

    def entry(self, row: int) -> Weights:
        return {name: self.materialise(name)[:, row] for name in self.start.weights}

    def finish(self) -> Carry:
        names = self.start.weights
        ends = {name: self.end(name) for name in names}
        momenta = {name: torch.stack(ends[name][1:]) for name in names if len(ends[name]) > 1}
        return Carry(self.start.base, {name: ends[name][0] for name in names}, momenta)

    def end(self, name: str) -> list[Tensor]:
        """The last weights, then the last momentum of each order.  (r ...) each"""
        initial, past, surprise, last_past, last_surprise = self.coefficients
        weight, momenta = self.start.weights[name], list(self.start.momenta.get(name, ()))
        coefficients = torch.stack((surprise[:, -1], *last_surprise), dim=-1)  # (r n e), e = 1 + orders
        ends = self.summed(name, coefficients)
        ends[0] = torch.addcmul(ends[0], weight, along(initial[:, -1], weight))
        for e, of_momenta in enumerate((past[:, :, -1], *last_past)):
            for scale, momentum in zip(of_momenta, momenta, strict=True):
                ends[e] = torch.addcmul(ends[e], momentum, along(scale, momentum))
        return ends

    def summed(self, name: str, coefficients: Tensor) -> list[Tensor]:
        """sum_i coefficient_{i,e} u_i for every e.  coefficients: (r n e) -> e times (r ...)"""
        if name not in self.surprises.factors:
            steps = self.surprises.tensors.get(name)
            if steps is None:
                return [torch.zeros_like(self.start.weights[name])] * coefficients.shape[-1]
            return list(torch.einsum("rne,rn...->er...", coefficients, steps))
        return outer_sums(self.surprises.factors[name], coefficients)


def outer_sums(factors: Factors, coefficients: Tensor) -> list[Tensor]:
    """sum_i coefficient_{i,e} left_i^T right_i as one product, repeating the narrower side.  -> e times (r i j)"""
    left, right = factors
    size = coefficients.shape[-1]
    scales = coefficients[:, :, None, :, None]
    if left.shape[-1] <= right.shape[-1]:
        sums = (left[..., None, :] * scales).flatten(3).flatten(1, 2).mT @ right.flatten(1, 2)
        return list(sums.unflatten(1, (size, -1)).unbind(1))
    sums = left.flatten(1, 2).mT @ (right[..., None, :] * scales).flatten(3).flatten(1, 2)
    return list(sums.unflatten(2, (size, -1)).unbind(2))


def along(scale: Tensor, weights: Tensor) -> Tensor:
    """(r) -> (r 1 ...)"""
    return scale.reshape(-1, *[1] * (weights.ndim - 1))
