"""Weights that evolve without being built: sums of what a block began with and of its surprises.

    w_j = initial_j w_0 + sum_o past_{o,j} m_{o,0} + sum_i surprise_{j,i} u_i        (cf. eq. 16-18)

with shares that depend on the gates alone (`rules.rule`). As u_i = left_i^T right_i, a read after chunk j needs no w_j:

    q @ w_j = initial_j (q @ W) + sum_o past_{o,j} (q @ M_o) + ((q left^T) * surprise[j]) @ right

Only what is carried to the next block, W and M, is ever a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from titans_pytorch.fast_weights.interface import Block, Carry, Entries, PerParameter, record
from titans_pytorch.fast_weights.precision import full_precision, is_autocasting
from titans_pytorch.fast_weights.rules.rule import Memory, Shares
from titans_pytorch.fast_weights.scale import scaled_sum
from titans_pytorch.fast_weights.surprises import Factors, Surprises


@record
class SummedBlock(Block):
    """What factored blocks share: everything but the product with queries."""

    start: Carry
    surprises: Surprises
    shares: PerParameter[Shares]

    @property
    def num_chunks(self) -> int:
        return self.shares.any.initial.shape[-1] - 1

    @property
    def names(self) -> Iterable[str]:
        return self.start.weights

    def parts(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """What the block began with, each with its share after every chunk.  ((... n+1), (r ...)) each"""
        shares = self.shares[name]
        found = [(shares.initial, self.start.weights[name])]
        found += zip(shares.past, self.start.momenta.get(name, ()), strict=False)  # none where nothing has moved yet
        if shares.start is not None:
            found.append((shares.start, self.start.start[name]))
        return found

    def materialise(self, name: str) -> Tensor:
        """The weights before each chunk and after the last.  -> (r n+1 ...)"""
        steps, surprise = self.surprises.steps(name), self.shares[name].surprise
        with full_precision(surprise):
            first, *more = (scaled_over_chunks(share, tensor) for share, tensor in self.parts(name))
            total = sum(more, first)
            return total if steps is None else total + summed_over_chunks(surprise, steps.to(total.dtype))

    def finish(self) -> Carry:
        return self.start.with_memories({name: self.end(name) for name in self.names})

    def end(self, name: str) -> Memory:
        """One parameter after the last chunk."""
        shares, momenta = self.shares[name], self.start.momenta.get(name, ())
        scales, tensors = zip(*((share[..., -1], tensor) for share, tensor in self.parts(name)), strict=True)
        starts: list[Tensor | None] = [scaled_sum(scales, tensors)]
        starts += [scaled_sum(row, momenta) if momenta else None for row in shares.last_past]
        weights, *moved = self.with_surprises(name, starts)
        return Memory(weights, tuple(moved))

    def with_surprises(self, name: str, starts: Sequence[Tensor | None]) -> list[Tensor]:
        """What weights and momenta start from, and what the block's chunks bring them.  None: nothing"""
        shares = self.shares[name]
        ends = (shares.surprise[..., -1, :], *shares.last_surprise)
        factors, steps = self.surprises.factors.get(name), self.surprises.tensors.get(name)
        if factors is not None:
            return [add_outer_products(start, factors, end) for start, end in zip(starts, ends, strict=True)]
        if steps is not None:
            return [add_steps(start, end, steps) for start, end in zip(starts, ends, strict=True)]
        nothing = self.start.weights[name].new_zeros(len(ends[0]), *self.start.weights[name].shape[1:])
        return [nothing if start is None else start for start in starts]


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


def scaled_over_chunks(share: Tensor, tensor: Tensor) -> Tensor:
    """share: (r n), or of channels (r j n), tensor: (r ... j) -> (r n ... j)"""
    if share.ndim == 2:
        return share.reshape(*share.shape, *[1] * (tensor.ndim - 1)) * tensor.unsqueeze(1)
    shape = (share.shape[0], share.shape[2], *[1] * (tensor.ndim - 2), *tensor.shape[1:][-1:])
    return share.mT.reshape(shape) * tensor.unsqueeze(1)


def summed_over_chunks(share: Tensor, steps: Tensor) -> Tensor:
    """share: (r m n), or of channels (r j m n), steps: (r n ... j) -> (r m ... j)"""
    if share.ndim == 3:
        return torch.einsum("rmn,rn...->rm...", share, steps)
    flat = steps.reshape(*steps.shape[:2], -1, share.shape[1])
    found = torch.einsum("rjmn,rnij->rmij", share, flat)
    return found.reshape(*found.shape[:2], *steps.shape[2:])


def add_steps(start: Tensor | None, share: Tensor, steps: Tensor) -> Tensor:
    """start + sum_n share_n step_n.  share: (r n), or of channels (r j n), steps: (r n ... j) -> (r ... j)"""
    with full_precision(steps):
        total = summed_over_chunks(share.unsqueeze(-2), steps.to(share.dtype)).squeeze(1)
        return total if start is None else start + total


def add_outer_products(start: Tensor | None, factors: Factors, share: Tensor) -> Tensor:
    """start + sum_n share_n left_n^T right_n.  start: (r i j), share: (r n), or of channels (r j n) -> (r i j)"""
    left, right = factors
    if share.ndim == 3:
        right = right * share.mT.unsqueeze(2)
    elif left.shape[-1] <= right.shape[-1]:
        left = left * share[..., None, None]
    else:
        right = right * share[..., None, None]
    return accumulated(start, left.flatten(1, 2).mT, right.flatten(1, 2), share.dtype)


def accumulated(start: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """start + a @ b; under autocast the product alone is in lower precision, never what is carried."""
    if start is None or is_autocasting(a):
        product = torch.bmm(a, b).to(dtype)
        return product if start is None else start + product
    return torch.baddbmm(start, a, b)
