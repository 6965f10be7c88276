"""Weights that evolve without being built.

With u_i = left_i^T right_i (see `taps`) and the coefficients of `recurrence`, reading after chunk j needs no w_j:

    q @ w_j = initial_j (q @ W) + sum_o past_{o,j} (q @ M_o) + ((q left^T) * surprise[j]) @ right   (cf. eq. 16-18)

Only what is carried to the next block, W and M, is ever a matrix.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from titans_pytorch.fast_weights.interface import Carry, Rows, Weights
from titans_pytorch.fast_weights.rules.recurrence import Coefficients
from titans_pytorch.fast_weights.scaled_sum import scaled_sum
from titans_pytorch.fast_weights.taps import Factors, Surprises


class FactoredBlock(NamedTuple):
    start: Carry
    surprises: Surprises
    coefficients: dict[str, Coefficients]  # of every parameter

    @property
    def num_chunks(self) -> int:
        return next(iter(self.coefficients.values())).surprise.shape[-1]

    def product(self, name: str, x: Tensor, rows: Rows, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        initial, past, surprise = self.coefficients[name][:3]
        weight, momenta = self.start.weights[name], self.start.momenta.get(name, ())
        factors = self.surprises.factors.get(name)
        if is_transposed:
            weight, momenta = weight.mT, tuple(momentum.mT for momentum in momenta)
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
        initial, past, surprise = self.coefficients[name][:3]
        steps = step_tensors(self, name)
        with full_precision(initial):
            out = torch.einsum("rn,r...->rn...", initial, self.start.weights[name])
            for order, momentum in enumerate(self.start.momenta.get(name, ())):
                out = out + torch.einsum("rn,r...->rn...", past[order], momentum)
            return out if steps is None else out + torch.einsum("rni,ri...->rn...", surprise, steps.to(out.dtype))

    def entry(self, row: int) -> Weights:
        return {name: self.materialise(name)[:, row] for name in self.start.weights}

    def finish(self) -> Carry:
        return finished(self)


class Summed(Protocol):
    """A block whose weights are sums of what it began with and of its steps, each with a share (or one per channel)."""

    @property
    def start(self) -> Carry: ...

    @property
    def surprises(self) -> Surprises: ...

    @property
    def coefficients(self) -> dict[str, Coefficients]: ...


def step_tensors(block: Summed, name: str) -> Tensor | None:
    """What the chunks add to a parameter, None if nothing ever does.  -> (r n ...)"""
    if name in block.surprises.factors:
        return block.surprises.factors[name].matrices()
    return block.surprises.tensors.get(name)


def finished(block: Summed) -> Carry:
    ends = {name: end_of(block, name) for name in block.start.weights}
    momenta = {name: tuple(end[1:]) for name, end in ends.items() if len(end) > 1}
    return Carry(block.start.base, {name: end[0] for name, end in ends.items()}, momenta)


def end_of(block: Summed, name: str) -> list[Tensor]:
    """The last weights, then the last momentum of each order.  (r ...) each"""
    initial, past, surprise, last_past, last_surprise = block.coefficients[name]
    weight, momenta = block.start.weights[name], block.start.momenta.get(name, ())
    starts: list[Tensor | None] = [scaled_sum((initial[..., -1], *past[: len(momenta), ..., -1]), (weight, *momenta))]
    starts += [scaled_sum(row, momenta) if momenta else None for row in last_past]
    ends = (surprise[..., -1, :], *last_surprise)
    if name in block.surprises.factors:
        return add_outer_products(starts, block.surprises.factors[name], ends)
    steps = block.surprises.tensors.get(name)
    if steps is None:
        return [torch.zeros_like(weight) if start is None else start for start in starts]
    return [add_steps(start, end, steps) for start, end in zip(starts, ends, strict=True)]


def add_steps(start: Tensor | None, coefficient: Tensor, steps: Tensor) -> Tensor:
    """start + sum_n coefficient_n step_n.  coefficient: (r n), or of every channel (r j n), steps: (r n ... j)"""
    with full_precision(steps):
        steps = steps.to(coefficient.dtype)
        if coefficient.ndim == 2:
            total = torch.einsum("rn,rn...->r...", coefficient, steps)
        else:
            flat = steps.reshape(*steps.shape[:2], -1, coefficient.shape[1])
            total = torch.einsum("rjn,rnij->rij", coefficient, flat).reshape(len(steps), *steps.shape[2:])
        return total if start is None else start + total


def add_outer_products(starts: list[Tensor | None], factors: Factors, coefficients: tuple[Tensor, ...]) -> list[Tensor]:
    """start + sum_i coefficient_i left_i^T right_i for each start.

    starts: (r i j) or None, coefficients: (r n), or of every channel (r j n)
    """
    left, right = factors
    ends, is_left_narrow = [], left.shape[-1] <= right.shape[-1]
    for start, coefficient in zip(starts, coefficients, strict=True):
        has_channels = coefficient.ndim == 3
        scale = coefficient.mT.unsqueeze(2) if has_channels else coefficient[..., None, None]
        scaled = (left * scale, right) if is_left_narrow and not has_channels else (left, right * scale)
        ends.append(accumulated(start, scaled[0].flatten(1, 2).mT, scaled[1].flatten(1, 2), coefficient.dtype))
    return ends


def is_autocasting(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Where autocast must not reach: gates, and weights that are summed."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def accumulated(start: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """start + a @ b; under autocast the product alone is in lower precision, never what is carried."""
    if start is None or is_autocasting(a):
        product = torch.bmm(a, b).to(dtype)
        return product if start is None else start + product
    return torch.baddbmm(start, a, b)
