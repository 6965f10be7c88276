"""Blocks of several chunks: weights and momenta at the end are sums with shares that depend on the gates alone."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.fast_weights.loop.evolution import Evolution, Others, PackFactors, Slots, num_together


class ByShares(Evolution):
    """Sums with shares that depend on the gates alone.

    states: (T+1 g r a p q), the slots side by side; mix: (T g r a a), of each slot at the start (last axis) in each at
    the end; share: (T g·r l a), of every token's surprise in each slot at the end
    """

    def __init__(self, states: Tensor, factors: PackFactors, mix: Tensor, share: Tensor) -> None:
        self.states, self.mix, self.share = states, mix, share
        self.num_slots, self.p = states.shape[3:5]
        self.per_renewal = len(mix) // len(factors.left)
        self.left, self.right = (self.by_block(factor) for factor in factors)
        self.shares = share.unsqueeze(-1).unbind(0)
        self.each, self.side_by_side, self.num_places = states.unbind(0), self.together(states), len(factors.left)
        self.starts, self.ends = self.apart(states[:-1]), self.apart(states[1:])
        self.own = mix.diagonal(dim1=-2, dim2=-1)[..., None, None].unbind(0)
        self.crossed = [
            (after, before, mix[..., after, before, None, None].unbind(0)) for after, before in self.crossings()
        ]
        self.scaled: list[Tensor | None] = [None] * len(mix)
        self.left_bars: list[Tensor] = []

    def by_block(self, factor: Tensor) -> list[Tensor]:
        """The tokens of each block.  (N g·r L p) -> (g·r l p) each"""
        length = factor.shape[2] // self.per_renewal
        return [part for renewal in factor.unbind(0) for part in renewal.split(length, dim=1)]

    def crossings(self) -> list[tuple[int, int]]:
        """(after, before): weights take from momenta, momenta from each other, and nothing from weights."""
        num = self.num_slots
        return [(a, b) for a in range(num) for b in range(1, num) if a != b]

    def apart(self, states: Tensor) -> Slots:
        return [list(slot.unbind(0)) for slot in states.unbind(3)]

    def together(self, states: Tensor) -> list[Tensor]:
        """-> (g·r a·p q) each"""
        return list(states.flatten(1, 2).flatten(2, 3).unbind(0))

    def of_slot(self, slot: int, index: int) -> Tensor:
        return self.states[:-1, index, :, slot].unflatten(0, (-1, self.per_renewal))

    def bases(self, index: int) -> Tensor:
        return self.states[: -1 : self.per_renewal, index, :, 0]

    def weights_of(self, index: int, first: int, num: int) -> Tensor:
        return self.of_slot(0, index)[first : first + num].movedim(1, 2)

    def forward(self, n: int) -> None:
        for block in range(n * self.per_renewal, (n + 1) * self.per_renewal):
            torch.mul(self.each[block], self.own[block], out=self.each[block + 1])
            for after, before, shares in self.crossed:
                self.ends[after][block].addcmul_(self.starts[before][block], shares[block])
            self.side_by_side[block + 1].baddbmm_(self.scaled_left(block).mT, self.right[block])

    def scaled_left(self, block: int) -> Tensor:
        """Left factors times the shares of every slot, side by side.  -> (g·r l a·p)"""
        found = self.scaled[block]
        if found is None:
            found = self.scaled[block] = (self.left[block].unsqueeze(2) * self.shares[block]).flatten(2)
        return found

    def begin_backward(self, last_bars: list[Tensor | None], others: list[Others | None]) -> None:
        self.all_bars = torch.empty_like(self.states)
        self.each_bar, self.bars = self.all_bars.unbind(0), self.apart(self.all_bars)
        for bars, last in zip(self.bars, last_bars, strict=True):
            _ = bars[-1].zero_() if last is None else bars[-1].copy_(last)
        self.bars_together = self.together(self.all_bars)
        self.others = others
        self.read: list[Tensor | None] = []

    def of_readers(self, n: int) -> Tensor:
        of_weights, *of_momenta = (None if other is None else other.of_renewal(n) for other in self.others)
        if of_weights is None:
            of_weights = self.states.new_zeros(self.per_renewal, *self.starts[0][0].shape)
        self.read = [of_weights, *of_momenta]
        return of_weights[0]

    def bars_after(self, n: int) -> Tensor:
        return self.each_bar[(n + 1) * self.per_renewal]

    def factor_bars(self, n: int) -> tuple[Tensor, Tensor]:
        found: list[tuple[Tensor, Tensor]] = []
        for block in reversed(range(n * self.per_renewal, (n + 1) * self.per_renewal)):
            bar = self.bars_together[block + 1]
            right_bar = torch.bmm(self.scaled_left(block), bar)
            left_bar = torch.bmm(self.right[block], bar.mT).unflatten(2, (-1, self.p))
            self.left_bars.append(left_bar)
            found.append(((left_bar * self.shares[block]).sum(dim=2), right_bar))
            if block > n * self.per_renewal:
                self.to_start(block)
        if len(found) == 1:
            return found[0]
        lefts, rights = zip(*found[::-1], strict=True)
        return torch.cat(lefts, dim=1), torch.cat(rights, dim=1)

    def start_bar(self, n: int) -> None:
        self.to_start(n * self.per_renewal)

    def to_start(self, block: int) -> None:
        """From the gradients of a block's end to those of its start."""
        torch.mul(self.each_bar[block + 1], self.own[block], out=self.each_bar[block])
        for after, before, shares in self.crossed:
            self.bars[before][block].addcmul_(self.bars[after][block + 1], shares[block])
        for slot, read in enumerate(self.read):
            if read is not None:
                self.bars[slot][block].add_(read[block % self.per_renewal])

    def gate_bars(self) -> list[Tensor]:
        mix_bar = torch.zeros_like(self.mix)
        for after, before in [*self.crossings(), *((slot, slot) for slot in range(self.num_slots))]:
            mix_bar[..., after, before] = dots(self.all_bars[1:, :, :, after], self.states[:-1, :, :, before])
        left_bar = torch.stack(self.left_bars[::-1])  # (T g·r l a p)
        return [mix_bar, (left_bar * torch.stack(self.left).unsqueeze(3)).sum(dim=-1)]


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot products over the last two axes, in pieces.  (n ... p q) -> (n ...)"""
    at_once = num_together(a[0], len(a))
    scratch = a.new_empty(at_once, *a.shape[1:])
    pieces = zip(a.split(at_once), b.split(at_once), strict=True)
    return torch.cat([torch.mul(x, y, out=scratch[: len(x)]).sum(dim=(-2, -1)) for x, y in pieces])
