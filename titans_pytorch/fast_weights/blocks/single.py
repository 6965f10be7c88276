"""A block of one chunk: the recurrence as it is written, each step built once.

Where a chunk has many tokens, building its matrix costs less than reading and carrying the momentum through products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.general import StillBlock
from titans_pytorch.fast_weights.interface import Carry, Rows, Weights
from titans_pytorch.fast_weights.rules.recurrence import Gates
from titans_pytorch.fast_weights.scaled_sum import along, scaled_sum
from titans_pytorch.fast_weights.taps import Surprises


class SingleBlock(NamedTuple):
    """Reads inside a block of one chunk all see what it began with."""

    start: Carry
    surprises: Surprises
    gates: dict[str, Gates]  # of every parameter (r 1)

    @property
    def num_chunks(self) -> int:
        return 1

    def product(self, name: str, x: Tensor, rows: Rows, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        return StillBlock(self.start).product(name, x, rows, is_transposed)

    def vector(self, name: str, rows: Rows) -> Tensor:
        """-> (r 1 1 d)"""
        return StillBlock(self.start).vector(name, rows)

    def materialise(self, name: str) -> Tensor:
        """-> (r 2 ...)"""
        return torch.stack((self.start.weights[name], self.end(name)[0]), dim=1)

    def entry(self, row: int) -> Weights:
        return self.start.weights if row == 0 else self.finish().weights

    def finish(self) -> Carry:
        ends = {name: self.end(name) for name in self.start.weights}
        momenta = {name: orders for name, (_, orders) in ends.items() if orders}
        return Carry(self.start.base, {name: weight for name, (weight, _) in ends.items()}, momenta)

    def end(self, name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The weights and the momentum of every order after the chunk.  (r ...) each"""
        weight, past, gates = self.start.weights[name], self.start.momenta.get(name, ()), self.gates[name]
        surprise = self.surprise(name)
        log_momentum = () if gates.log_momentum is None else gates.log_momentum
        orders = [surprise]
        for order, log_gate in enumerate(log_momentum):
            handed = orders[-1] if gates.is_stored is None else orders[-1] * along(gates.is_stored[:, 0], weight)
            orders.append(scaled_sum((log_gate[:, 0].exp(),), (past[order],), handed) if past else handed)  # eq. 14
        step = orders[-1]
        if gates.combine is not None:
            shares = gates.combine[..., 0].unbind(0)
            step = scaled_sum(shares, orders[len(orders) - len(shares) :])
        if gates.is_stored is not None:
            step = step * along(gates.is_stored[:, 0], weight)
        keep = gates.log_keep[..., 0].exp()
        keep = keep + along(gates.poison[:, 0], keep)
        return scaled_sum((keep,), (weight,), step), tuple(orders[1:])  # eq. 13

    def surprise(self, name: str) -> Tensor:
        """-> (r ...)"""
        weight = self.start.weights[name]
        if name in self.surprises.factors:
            return self.surprises.factors[name].matrices().squeeze(1).to(weight.dtype)
        tensor = self.surprises.tensors.get(name)
        return torch.zeros_like(weight) if tensor is None else tensor.squeeze(1).to(weight.dtype)
