"""From the writes of many blocks to blocks that hold them all, by loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.blocks.factored import FactoredBlock
from titans_pytorch.fast_weights.blocks.series import FoldedBlock, ListedBlock, ReadBlock, StartsBlock
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
    return not (rule.uses_start or rule.forgets_first or rule.window > 1) and (not has_channels or can_note(rule))


class Piece(NamedTuple):
    """So many renewals of a series that go through one loop, and the first of them."""

    first: int
    num: int


class Packed(NamedTuple):
    """A memory between two loops, pack by pack."""

    states: list[Tensor]  # (g r a p q)  weights and momenta
    base: list[Tensor] | None  # (g r p q)  where surprises are taken; None: at the weights


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
        self.queries = series.queries
        if self.queries is not None:  # renewals first, (N r k c d)
            self.queries = self.queries.unflatten(1, (series.num_renewals, -1)).movedim(1, 0)
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
        return Tokens(keys, keys - values if self.model.has_norm else -values, step)

    def pieces(self, carry: Carry, longest: int) -> Iterator[tuple[Block, Tensor]]:
        """Loops of at most so many renewals, all about equally long.  -> the block, the loss of every write (r n c)"""
        total = self.series.num_renewals
        num = -(-total // max(1, longest))
        edges = [total * piece // num for piece in range(num + 1)]
        pieces = [Piece(first, last - first) for first, last in pairwise(edges)]
        packed = self.packed(carry)
        for piece, given in zip(pieces, self.given(pieces), strict=True):
            is_last = piece == pieces[-1]
            shape = self.shape(piece.num, self.series.renews_last or not is_last)
            results = self.loop(shape, given._replace(states=packed.states, base=packed.base))
            packed = Packed(results.last, None)
            after = self.carry_after(carry, results, shape, is_last)
            yield self.block(results, shape, piece, after), self.loss(results)

    def shape(self, num_renewals: int, renews_last: bool) -> Shape:
        """What one loop does."""
        k, matrices, equations = self.series.per_renewal, tuple(self.model.matrices), self.tables.equations
        num_slots, num_places = 1 + self.num_momenta, None if equations is None else self.series.num_places
        return Shape(self.packing, matrices, num_renewals * k, k, num_slots, equations, renews_last, num_places)

    def loss(self, results: Results) -> Tensor:
        """The loss of every write.  -> (r n c)"""
        by_chunk = results.error.unflatten(2, (-1, self.writes.keys.shape[2]))  # (N r kb c d)
        return self.model.loss_of(by_chunk).movedim(0, 1).flatten(1, 2)

    def block(self, results: Results, shape: Shape, piece: Piece, last: Carry) -> Block:
        """What one loop stored."""
        k, tables = shape.per_renewal, self.tables
        reads = None if results.reads is None else results.reads.movedim(0, 1).flatten(1, 2)
        starts = {name: [self.packing.turned(name, slot) for slot in slots] for name, slots in results.starts.items()}
        if results.each is not None:
            return ListedBlock([self.shaped(weights) for weights in results.each], last, reads)
        if not starts:
            return ReadBlock(piece.num * k, last, reads)
        if tables.of_blocks is None:
            return StartsBlock({name: slots[0] for name, slots in starts.items()}, last, reads)
        per_renewal = k * self.tokens.keys.shape[1]
        rows = slice(piece.first * per_renewal, (piece.first + piece.num) * per_renewal)
        shares = tables.of_blocks.map(lambda shares: of_rows(shares, rows))
        block = FactoredBlock(self.carry_of_starts(starts), self.surprises(results, piece), shares)
        return FoldedBlock(block, last, piece.num * k)

    def packed(self, carry: Carry) -> Packed:
        """Weights and momenta, zeros where nothing has moved yet, as a loop takes them."""
        slots = {}
        for name, weights in carry.weights.items():
            momenta = carry.momenta.get(name)
            slots[name] = weights, *([torch.zeros_like(weights)] * self.num_momenta if momenta is None else momenta)
        base = None
        if any(carry.base[name] is not weights for name, weights in carry.weights.items()):
            base = [pack.squeeze(2) for pack in self.packing.together({name: (w,) for name, w in carry.base.items()})]
        return Packed(self.packing.together(slots), base)

    def given(self, pieces: Sequence[Piece]) -> Iterator[Inputs]:
        """What each loop is given, but for the memory itself."""
        tables, nothing = self.tables, (None,) * len(pieces)

        def cut(table: Tensor | None) -> Sequence[Any]:
            """Renewals or blocks first."""
            if table is None:
                return nothing
            each = len(table) // self.series.num_renewals
            return table.split([piece.num * each for piece in pieces])

        tokens, queries = [cut(part) for part in self.tokens], cut(None if tables.of_blocks else self.queries)
        mixes, shares = ([cut(table) for table in of_packs] for of_packs in (tables.mixes, tables.shares))
        limit = self.renewal.limit
        share = None if self.renewal.gate is None else self.renewal.share(self.tokens.keys)
        for i in range(len(pieces)):
            keys, offset, step, *of_packs = (each[i] for each in (*tokens, *mixes, *shares))
            mix, own = of_packs[: len(mixes)], of_packs[len(mixes) :]
            yield Inputs(Tokens(keys, offset, step), self.gain, None, [], mix, own, limit, share, queries[i])

    def shaped(self, weights: Weights) -> Weights:
        """Vectors without their second axis."""
        return {name: weight.reshape(-1, *self.shapes[name]) for name, weight in weights.items()}

    def carry_after(self, carry: Carry, results: Results, shape: Shape, is_last: bool) -> Carry:
        """What the next block begins with: views of packs; after the last loop weights in order, by themselves."""
        weights, momenta = {}, {}
        for name, place in self.packing.places.items():
            slots = self.packing.turned(name, results.last[place.pack][place.number]).unbind(1)
            weights[name], *moved = (slot.reshape(-1, *self.shapes[name]) for slot in slots)
            if moved:
                momenta[name] = tuple(moved)
        if is_last:
            weights = {name: w.clone(memory_format=torch.contiguous_format) for name, w in weights.items()}
        base = weights
        if not shape.renews_last:  # the base is still that of the last renewal
            base = carry.base if shape.num_renewals == 1 else self.last_base(results)
        return carry._replace(base=base, weights=weights, momenta=momenta)

    def last_base(self, results: Results) -> Weights:
        """What the last renewal began with; a copy, which keeps nothing else alive."""
        if results.each is not None:
            return self.shaped(results.each[-self.series.per_renewal])
        if results.base is not None:
            places = self.packing.places.items()
            return self.shaped({name: self.packing.turned(name, results.base[p.pack][p.number]) for name, p in places})
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
