"""From the writes of many blocks to blocks that hold them all, by loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.blocks.factored import FactoredBlock
from titans_pytorch.fast_weights.blocks.series import FoldedBlock, ListedBlock, StartsBlock
from titans_pytorch.fast_weights.closed_form import ClosedMLP
from titans_pytorch.fast_weights.interface import Block, Carry, Weights, Writes
from titans_pytorch.fast_weights.loop.equations import can_note
from titans_pytorch.fast_weights.loop.mlp import Tokens
from titans_pytorch.fast_weights.loop.packing import Packing
from titans_pytorch.fast_weights.loop.parts import Inputs, Results, Shape
from titans_pytorch.fast_weights.loop.tables import Series, own_share, tables_of
from titans_pytorch.fast_weights.renewal import Renewal
from titans_pytorch.fast_weights.rules.rule import Rule, Shares
from titans_pytorch.fast_weights.surprises import Factors, Surprises
from titans_pytorch.memory_models import NORM_GAIN

Loop = Callable[[Shape, Inputs], Results]
"""All renewals of a loop: `renewals.renewals`, or `compiled.compiled_renewals`"""


def can_loop(rule: Rule) -> bool:
    """Whether this file can work with a rule; one with gates of channels by its equations alone."""
    has_channels = any(gate.varies == "channel" for gate in rule.gates)
    return not rule.uses_start and (not has_channels or can_note(rule))


class Piece(NamedTuple):
    """So many renewals of a series that go through one loop, and the first of them."""

    first: int
    num: int


class SeriesStore:
    """A series that is stored piece by piece; what does not depend on weights is worked out once, for all of it.

    loop: what runs its renewals
    """

    def __init__(
        self,
        model: ClosedMLP,
        rule: Rule,
        carry: Carry,
        writes: Writes,
        series: Series,
        renewal: Renewal,
        loop: Loop,
    ) -> None:
        self.loop = loop
        self.model, self.writes, self.series, self.renewal = model, writes, series, renewal
        self.num_momenta = rule.num_momenta
        self.shapes = {name: weight.shape[1:] for name, weight in carry.weights.items()}
        self.packing = Packing.of(self.shapes, may_turn=writes.gates.any.channels is None)
        self.tables = tables_of(rule, writes, self.packing, series)
        self.tokens = self.all_tokens()
        slow = writes.slow.get(NORM_GAIN)
        self.gain = None if slow is None else (slow + 1).unsqueeze(1)

    def all_tokens(self) -> Tokens:
        """Renewals first.  (r n c d) -> (N r L d)"""

        def renewals_first(x: Tensor) -> Tensor:
            return x.unflatten(1, (self.series.num_renewals, -1)).movedim(1, 0).flatten(2, 3)

        keys, values = renewals_first(self.writes.keys), renewals_first(self.writes.values)
        rates, slope = self.writes.rates, -self.model.slope(keys.shape[-1])
        # step sizes of every parameter are shares in one surprise, see `tables.own_share`
        steps = rates.any * slope if rates.is_shared else torch.full_like(rates.any, slope)
        step = renewals_first(steps[..., None])
        return Tokens(keys.contiguous(), keys - values if self.model.has_norm else -values, step)

    def pieces(self, carry: Carry, longest: int) -> Iterator[tuple[Block, Tensor]]:
        """Loops of at most so many renewals, all about equally long.  -> the block, the loss of every write (r n c)"""
        total = self.series.num_renewals
        num = -(-total // max(1, longest))
        edges = [total * piece // num for piece in range(num + 1)]
        for first, last in pairwise(edges):
            block, loss = self.store(carry, Piece(first, last - first))
            carry = block.finish()
            yield block, loss

    def store(self, carry: Carry, piece: Piece) -> tuple[Block, Tensor]:
        """One loop."""
        k, is_last = self.series.per_renewal, piece.first + piece.num == self.series.num_renewals
        renews_last = self.series.renews_last or not is_last
        tables = self.tables
        shape = Shape(
            self.packing,
            tuple(self.model.matrices),
            piece.num * k,
            k,
            tables.equations,
            renews_last,
        )
        results = self.loop(shape, self.inputs(carry, piece))
        by_chunk = results.error.unflatten(2, (-1, self.writes.keys.shape[2]))  # (N r kb c d)
        loss = self.model.loss_of(by_chunk).movedim(0, 1).flatten(1, 2)
        last = self.carry_after(carry, results, shape)
        starts = {name: [self.packing.turned(name, slot) for slot in slots] for name, slots in results.starts.items()}
        if results.each is not None:
            reads = None if results.reads is None else results.reads.movedim(0, 1).flatten(1, 2)
            return ListedBlock([self.shaped(weights) for weights in results.each], last, reads), loss
        if tables.of_blocks is None:
            return StartsBlock({name: slots[0] for name, slots in starts.items()}, last), loss
        per_renewal = k * self.tokens.keys.shape[1]
        rows = slice(piece.first * per_renewal, (piece.first + piece.num) * per_renewal)
        shares = tables.of_blocks.map(lambda shares: of_rows(shares, rows))
        block = FactoredBlock(self.carry_of_starts(starts), self.surprises(results, piece), shares)
        return FoldedBlock(block, last, piece.num * k), loss

    def inputs(self, carry: Carry, piece: Piece) -> Inputs:
        """What one loop is given."""
        tables = self.tables

        def cut(table: Tensor) -> Tensor:
            """Renewals or blocks first."""
            each = len(table) // self.series.num_renewals
            return table.narrow(0, piece.first * each, piece.num * each)

        is_at_base = all(carry.base[name] is weight for name, weight in carry.weights.items())
        base = None
        if not is_at_base:
            base = [pack.squeeze(2) for pack in self.packing.together({name: (w,) for name, w in carry.base.items()})]
        return Inputs(
            Tokens(*map(cut, self.tokens)),
            self.gain,
            base,
            self.packing.together({name: self.slots(carry, name) for name in self.shapes}),
            list(map(cut, tables.mixes)),
            [None if share is None else cut(share) for share in tables.shares],
            self.renewal.limit,
            None if self.renewal.gate is None else self.renewal.share(self.tokens.keys),
            self.queries_of(piece) if tables.of_blocks is None else None,
        )

    def queries_of(self, piece: Piece) -> Tensor | None:
        """Renewals first.  (r n c d) -> (N r k c d)"""
        queries = self.series.queries
        if queries is None:
            return None
        return queries.unflatten(1, (self.series.num_renewals, -1)).movedim(1, 0).narrow(0, piece.first, piece.num)

    def shaped(self, weights: Weights) -> Weights:
        """Vectors without their second axis."""
        return {name: weight.reshape(-1, *self.shapes[name]) for name, weight in weights.items()}

    def slots(self, carry: Carry, name: str) -> Iterable[Tensor]:
        """Weights and momenta of a parameter; zeros where nothing has moved yet."""
        weights = carry.weights[name]
        return weights, *carry.momenta.get(name, (torch.zeros_like(weights),) * self.num_momenta)

    def carry_after(self, carry: Carry, results: Results, shape: Shape) -> Carry:
        """What the next block begins with."""
        weights, momenta = {}, {}
        for name in self.shapes:
            weights[name], *moved = (slot.view(-1, *self.shapes[name]) for slot in results.last[name])
            if moved:
                momenta[name] = tuple(moved)
        base = weights
        if not shape.renews_last:  # the base is still that of the last renewal
            base = carry.base if shape.num_renewals == 1 else self.last_base(results)
        return carry._replace(base=base, weights=weights, momenta=momenta)

    def last_base(self, results: Results) -> Weights:
        """What the last renewal began with; a copy, which keeps nothing else alive."""
        if results.each is not None:
            return self.shaped(results.each[-self.series.per_renewal])
        starts = {name: self.packing.turned(name, slots[0][-1, 0]) for name, slots in results.starts.items()}
        return {name: start.clone().reshape(-1, *self.shapes[name]) for name, start in starts.items()}

    # ---- blocks of several chunks, as one with T·r rows

    def carry_of_starts(self, starts: dict[str, list[Tensor]]) -> Carry:
        """(N k r ...) -> (T·r ...)"""
        flat = {
            name: [slot.flatten(0, 2).reshape(-1, *self.shapes[name]) for slot in slots]
            for name, slots in starts.items()
        }
        momenta = {name: tuple(slots[1:]) for name, slots in flat.items() if len(slots) > 1}
        return Carry({}, {name: slots[0] for name, slots in flat.items()}, momenta, {})

    def surprises(self, results: Results, piece: Piece) -> Surprises:
        """The surprises of every block's chunks."""
        k, length = self.series.per_renewal, self.writes.keys.shape[2]

        def in_blocks(x: Tensor) -> Tensor:
            """(N r kbc d) -> (T·r b c d)"""
            return x.unflatten(2, (k, -1, length)).movedim(2, 1).flatten(0, 2)

        def shared(x: Tensor, name: str) -> Tensor:
            share = own_share(self.writes, name)
            if share is None:
                return x
            of_blocks = share.unflatten(1, (self.series.num_blocks, -1)).movedim(1, 0)  # (T r b c)
            return x * of_blocks.narrow(0, piece.first * k, piece.num * k).flatten(0, 1).unsqueeze(-1)

        factors, tensors = {}, {}
        for name, error in results.errors.items():
            right = shared(in_blocks(error), name)
            if name == NORM_GAIN:
                tensors[name] = right.sum(dim=2)
            else:
                keys = self.tokens.keys.narrow(0, piece.first, piece.num)
                left = keys if name == self.model.matrices[0] else results.inputs[name]
                factors[name] = Factors(in_blocks(left), right)
        return Surprises(factors, tensors)


def of_rows(shares: Shares, rows: slice) -> Shares:
    """Some of the rows."""
    axes = (0, 1, 0, 0, 2, 1)

    def cut(x: Tensor | None, axis: int) -> Tensor | None:
        return None if x is None else x.narrow(axis, rows.start, rows.stop - rows.start)

    return Shares(*map(cut, shares, axes))  # type: ignore[arg-type]
