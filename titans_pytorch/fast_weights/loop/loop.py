"""A loop over renewals: surprises at a base, the next weights, the next base; and all of it backwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_pytorch.fast_weights.loop.by_equations import ByEquations
from titans_pytorch.fast_weights.loop.by_shares import ByShares
from titans_pytorch.fast_weights.loop.by_table import ByTable
from titans_pytorch.fast_weights.loop.evolution import Evolution, Others, PackProducts, side_by_side
from titans_pytorch.fast_weights.loop.limits import (
    approach,
    approach_backward,
    growth_backward,
    limit_gradient,
    limit_growth,
    may_have_acted,
)
from titans_pytorch.fast_weights.loop.mlp import Base, MLPSurprise, Normed
from titans_pytorch.fast_weights.loop.parts import Inputs, Kept, Results, Shape, begin
from titans_pytorch.fast_weights.loop.reading import ReadBars, Reading, read, read_backward
from titans_pytorch.memory_models import NORM_GAIN


class Loop:
    """The parts of one loop, laid over what it keeps."""

    def __init__(self, shape: Shape, inputs: Inputs, kept: Kept) -> None:
        self.shape, self.inputs, self.kept = shape, inputs, kept
        self.rows = inputs.tokens.keys.shape[1]
        self.evolutions = [self.evolution(pack) for pack in range(len(kept.states))]
        places = [shape.packing.places[name] for name in shape.matrices]
        sides = [kept.factors[place.pack][:: -1 if place.is_turned else 1] for place in places]
        self.inputs_of = [self.rows_of(side[0], place.number) for side, place in zip(sides, places, strict=True)]
        self.errors_of = [self.rows_of(side[1], place.number) for side, place in zip(sides, places, strict=True)]
        self.gain_pack = shape.packing.places[NORM_GAIN].pack if NORM_GAIN in shape.packing.places else None
        of_gain = None if self.gain_pack is None else kept.factors[self.gain_pack].right
        self.reads: Tensor | None = None
        self.surprise = MLPSurprise(inputs.tokens, kept.products, self.inputs_of, self.errors_of, of_gain)
        self.matrices = [self.bases_of(name) for name in shape.matrices]
        self.fast_gains = None if self.gain_pack is None else self.bases_of(NORM_GAIN)
        self.all_gains: Sequence[Tensor] | None = None

    def evolution(self, pack: int) -> Evolution:
        """One pack's way through the blocks."""
        kept, mix, share = self.kept, self.inputs.mixes[pack], self.inputs.shares[pack]
        share = None if share is None else share.flatten(1, 2)
        if self.shape.equations is None and share is not None:
            return ByShares(kept.states[pack], kept.factors[pack], mix, share)
        if mix.ndim == 4:
            return ByTable(kept.states[pack], mix, self.shape.num_slots)
        of_pack = kept.states[pack], kept.lasts[pack], kept.momenta[pack], kept.factors[pack]
        return ByEquations(*of_pack, self.shape.equations or (), mix, kept.sums[pack], share)

    def rows_of(self, factor: Tensor, index: int) -> Tensor:
        """One parameter's part of a pack's factor.  (N g·r L p) -> (N r L p)"""
        return factor.narrow(1, index * self.rows, self.rows)

    def bases_of(self, name: str) -> list[Tensor]:
        """What a parameter is at the start of every renewal.  -> (r i j) each"""
        place = self.shape.packing.places[name]
        evolution = self.evolutions[place.pack]
        in_place = self.shape.packing.turned(name, evolution.bases(place.number)).unbind(0)
        return [in_place[n % evolution.num_places] for n in range(self.shape.num_renewals)]

    def base(self, n: int) -> Base:
        """Where the surprises of a renewal are taken."""
        first = self.inputs.base
        if n == 0 and first is not None:

            def weight(name: str) -> Tensor:
                place = self.shape.packing.places[name]
                return self.shape.packing.turned(name, first[place.pack][place.number])

            gain = self.inputs.gain if self.gain_pack is None else weight(NORM_GAIN) + 1
            return Base([weight(name) for name in self.shape.matrices], gain)
        if self.all_gains is not None:
            gain = self.all_gains[n]
        else:
            gain = self.inputs.gain if self.fast_gains is None else self.fast_gains[n] + 1
        return Base([weights[n] for weights in self.matrices], gain)

    def gains(self) -> Tensor | None:
        """The norm's gain in every renewal.  -> (N|1 r 1 d)"""
        if self.gain_pack is None:
            return None if self.inputs.gain is None else self.inputs.gain.unsqueeze(0)
        found = self.evolutions[self.gain_pack].bases(0)
        if self.inputs.base is not None:
            found = torch.cat((self.inputs.base[self.gain_pack], found[1:]))
        return found + 1

    # ---- forwards

    def forward(self, keeps_all: bool) -> tuple[list[Normed | Tensor], list[Tensor], list[Tensor]]:
        """-> what the norm left of every renewal; how much each base was made smaller, and the norms that it had

        keeps_all: for a backward pass; else what was predicted is all that is left
        """
        left, scales, norms = [], [], []
        if self.inputs.queries is not None:
            self.reads = torch.empty_like(self.inputs.queries)
        norms_of_matrices = self.inputs.tokens.keys.new_empty(len(self.shape.packing.places), self.rows)
        for n in range(self.shape.num_renewals):
            found = self.surprise.forward(n, self.base(n))
            left.append(found if keeps_all or isinstance(found, Tensor) else found.normed)
            for evolution in self.evolutions:
                evolution.forward(n)
            if self.inputs.share is not None and self.shape.renews(n):
                approach(self.bases_of_packs(n), self.after(n), self.inputs.share)
            if self.inputs.limit is not None and self.shape.renews(n):
                scale, norm = limit_growth(self.after(n), self.inputs.limit, norms_of_matrices)
                scales.append(scale)
                norms.append(norm)
            self.leave_places(n)
        if self.shape.num_places is None:
            self.kept = self.kept._replace(read=self.read(0, self.shape.num_renewals, keeps_all))
        return left, scales, norms

    def leave_places(self, n: int) -> None:
        """After the renewal in the last place what all of them began with is read; then the first is taken again."""
        num_places, is_last = self.shape.num_places, n + 1 == self.shape.num_renewals
        if num_places is None or not (is_last or (n + 1) % num_places == 0):
            return
        first = n // num_places * num_places
        self.read(first, n + 1 - first)
        for evolution in self.evolutions:
            if not is_last and evolution.num_places == num_places:
                evolution.start_again()

    def read(self, first: int, num: int, keeps_all: bool = False) -> Reading | None:
        """What the blocks of some renewals begin with.  -> what is kept of it, if all is"""
        if self.reads is None or self.inputs.queries is None:
            return None
        together = slice(first, first + num)
        weights = self.weights_of(first, num)
        return read(self.inputs.queries[together], *weights, self.reads[together], keeps_all)

    def weights_of(self, first: int, num: int) -> tuple[list[Tensor], Tensor | None]:
        """What the blocks of some renewals read with: matrices (num r k i j), the norm's gain (num|1 r k|1 1 d)."""

        def weights(name: str) -> Tensor:
            place = self.shape.packing.places[name]
            found = self.evolutions[place.pack].weights_of(place.number, first, num)
            return self.shape.packing.turned(name, found)

        gain = self.inputs.gain
        gain = weights(NORM_GAIN) + 1 if self.gain_pack is not None else None if gain is None else gain[:, None]
        return [weights(name) for name in self.shape.matrices], gain

    def after(self, n: int) -> list[Tensor]:
        """The weights after a renewal, of all packs.  -> (g r p q) each"""
        return [evolution.ends[0][(n + 1) * self.shape.per_renewal - 1] for evolution in self.evolutions]

    def bases_of_packs(self, n: int) -> Sequence[Tensor]:
        """The base of a renewal.  -> (g r p q) each"""
        first = self.inputs.base
        if n == 0 and first is not None:
            return first
        return [evolution.starts[0][n * self.shape.per_renewal] for evolution in self.evolutions]

    def results(self) -> Results:
        places = self.shape.packing.places
        num_slots = 1 if self.shape.equations is not None else self.shape.num_slots

        def starts(name: str) -> list[Tensor]:
            place = places[name]
            return [self.evolutions[place.pack].of_slot(slot, place.number) for slot in range(num_slots)]

        inputs: dict[str, Tensor] = {}
        errors: dict[str, Tensor] = {}
        if self.shape.equations is None:
            inputs = {name: x.contiguous() for name, x in zip(self.shape.matrices[1:], self.inputs_of[1:], strict=True)}
            errors = {name: x.contiguous() for name, x in zip(self.shape.matrices, self.errors_of, strict=True)}
            if self.gain_pack is not None:
                errors[NORM_GAIN] = self.kept.factors[self.gain_pack].right.clone()
        base = self.last_base()  # before weights after the last renewal may take its place
        return Results(
            [self.last(pack) for pack in range(len(self.evolutions))],
            {name: starts(name) for name in places if self.shape.num_places is None},
            inputs,
            errors,
            self.error(),
            None,
            self.reads,
            base,
        )

    def last(self, pack: int) -> Tensor:
        """Weights and momenta after the last block.  -> (g r a p q)"""
        evolution = self.evolutions[pack]
        if not (self.shape.takes_states and isinstance(evolution, ByEquations)):
            return torch.stack([slot[-1] for slot in evolution.ends], dim=2)
        states = self.inputs.states[pack]  # where momenta have moved
        states[:, :, 0] = evolution.ends[0][-1]
        return states

    def last_base(self) -> list[Tensor] | None:
        """Where the last renewal was surprised, for the tokens after the loop, if nobody finds it among the starts."""
        if self.shape.num_places is None or self.shape.renews_last:
            return None
        return [base.clone() for base in self.bases_of_packs(self.shape.num_renewals - 1)]

    def error(self) -> Tensor:
        """How far off each prediction is.  -> (N r L d)"""
        normed, gains, offset = self.normed(), self.gains(), self.inputs.tokens.offset
        return normed + offset if gains is None else torch.addcmul(offset, normed, gains)

    def predicted(self) -> Tensor:
        """What the error is, but for its offset."""
        normed, gains = self.normed(), self.gains()
        return normed if gains is None else normed * gains

    def normed(self) -> Tensor:
        """What a norm made of the last product, before its gain; without a norm, the product.  -> (N r L d)"""
        left = self.kept.left
        return left if isinstance(left, Tensor) else left.normed

    # ---- backwards

    def backward(self, bars: Results) -> Inputs:
        """bars: gradients of what came out, None where there is none"""
        left, gains = self.kept.left, self.gains()
        normed = None if isinstance(left, Tensor) else left
        if gains is not None and self.gain_pack is not None:
            self.all_gains = gains.unbind(0)
        self.surprise.begin_backward(normed, gains, bars.error)
        of_reads = self.read_backward(bars.reads)
        for pack, evolution in enumerate(self.evolutions):
            last = bars.last[pack]
            of_slots: list[Tensor | None] = [None] * len(evolution.ends) if last is None else [*last.unbind(2)]
            evolution.begin_backward(of_slots, self.others(bars, pack, of_reads))
        may_have_limited = may_have_acted(self.kept.scales)
        gain_bars: list[Tensor | None] = []
        limit_bars, share_bars, base_bars = [], [], None
        if of_reads is not None and of_reads.gain is not None:
            gain_bars.append(of_reads.gain.sum(dim=(0, 1)))
        for n in reversed(range(self.shape.num_renewals)):
            of_bases: list[Tensor] = []
            if self.shape.renews(n):
                limit_bars.append(self.limits_backward(n, may_have_limited))
                of_bases, of_share = self.approach_backward(n)
                share_bars.append(of_share)
            targets = [evolution.of_readers(n) for evolution in self.evolutions]
            factor_bars = [evolution.factor_bars(n) for evolution in self.evolutions]
            if n == 0 and self.inputs.base is not None:  # surprised elsewhere than where its blocks begin
                targets = base_bars = [torch.zeros_like(evolution.starts[0][0]) for evolution in self.evolutions]
            for target, of_base in zip(targets, of_bases, strict=False):
                target.add_(of_base)
            gain_bar = self.surprise_backward(n, factor_bars, bars, targets)
            gain_bars.append(gain_bar)
            for evolution in self.evolutions:
                evolution.start_bar(n)
        gate_bars = [evolution.gate_bars() for evolution in self.evolutions]
        return Inputs(
            self.surprise.token_bars(self.predicted()),
            total(gain_bars) if self.gain_pack is None else None,
            base_bars,
            [torch.stack([slot[0] for slot in evolution.bars], dim=2) for evolution in self.evolutions],
            [each[0] for each in gate_bars],
            [
                None if share is None else bars[1].view_as(share)
                for bars, share in zip(gate_bars, self.inputs.shares, strict=True)
            ],
            total(limit_bars),
            total(share_bars),
            None if of_reads is None else of_reads.queries,
        )

    def read_backward(self, bar: Tensor | None) -> ReadBars | None:
        """From the gradient of what was read; None: nobody has one."""
        if bar is None or self.inputs.queries is None or self.kept.read is None:
            return None
        return read_backward(bar, self.inputs.queries, *self.weights_of(0, self.shape.num_renewals), self.kept.read)

    def others(self, bars: Results, pack: int, of_reads: ReadBars | None) -> list[Others | None]:
        """Gradients of what blocks begin with, slot by slot, from whoever looks at it and from what was read."""
        names = self.shape.packing.packs[pack]
        found: list[Others | None] = []
        for slot, like in enumerate(self.evolutions[pack].starts):
            parts = [slots[slot] if slot < len(slots) else None for slots in (bars.starts[name] for name in names)]
            products: PackProducts = []
            if slot == 0 and of_reads is not None:
                if pack == self.gain_pack:
                    parts = [total([of_reads.gain, parts[0]])]
                else:
                    products = self.products_of(names, of_reads)
            num = self.shape.num_renewals, self.shape.per_renewal
            is_there = bool(products) or any(part is not None for part in parts)
            found.append(Others(parts, products, like[0], num) if is_there else None)
        return found

    def products_of(self, names: Sequence[str], of_reads: ReadBars) -> PackProducts:
        """Gradients of a pack's matrices from what was read; a CPU takes longer to copy them than to multiply twice."""
        found: PackProducts = []
        for name in names:
            left, right = of_reads.products[self.shape.matrices.index(name)]
            found.append((right, left) if self.shape.packing.places[name].is_turned else (left, right))
        return found if self.inputs.tokens.keys.device.type == "cpu" else side_by_side(found)

    def surprise_backward(
        self, n: int, factor_bars: list[tuple[Tensor, Tensor]], bars: Results, targets: list[Tensor]
    ) -> Tensor | None:
        """Gradients of a renewal's base, added to the targets, of packs (g r p q).  -> that of a gain from outside"""
        places = [self.shape.packing.places[name] for name in self.shape.matrices]
        input_bars, error_bars = [], []
        for name, place in zip(self.shape.matrices, places, strict=True):
            both = factor_bars[place.pack][:: -1 if place.is_turned else 1]
            input_bar, error_bar = (bar.narrow(0, place.number * self.rows, self.rows) for bar in both)
            input_bars.append(plus(input_bar, bars.inputs.get(name), n))
            error_bars.append(plus(error_bar, bars.errors.get(name), n))
        of_gain_bar = None
        if self.gain_pack is not None:
            of_gain_bar = plus(factor_bars[self.gain_pack][1], bars.errors.get(NORM_GAIN), n)

        def add(layer: int, a: Tensor, b: Tensor) -> None:
            place = places[layer]
            a, b = (b, a) if place.is_turned else (a, b)
            targets[place.pack][place.number].baddbmm_(a.mT, b)

        gain_bar = self.surprise.backward(n, self.base(n), input_bars, error_bars, of_gain_bar, add)
        if self.gain_pack is None or gain_bar is None:
            return gain_bar
        targets[self.gain_pack][0].add_(gain_bar)
        return None

    def approach_backward(self, n: int) -> tuple[list[Tensor], Tensor | None]:
        """Back through how far the base goes.  -> gradients of the renewal's base, of the share"""
        share, scales = self.inputs.share, self.kept.scales
        if share is None:
            return [], None
        mixed = self.after(n)
        if scales is not None:  # what the limit was given
            mixed = [weight / scales[n][:, None, None] for weight in mixed]
        bars = [evolution.bars[0][(n + 1) * self.shape.per_renewal] for evolution in self.evolutions]
        return approach_backward(bars, self.bases_of_packs(n), mixed, share)

    def limits_backward(self, n: int, may_have_limited: bool) -> Tensor | None:
        """Back through what happens after a renewal.  -> the gradient of the limit (r)"""
        for evolution in self.evolutions:
            limit_gradient(evolution.bars_after(n))
        limit, scales, norms = self.inputs.limit, self.kept.scales, self.kept.norms
        if limit is None or scales is None or norms is None or not may_have_limited:
            return None
        block = (n + 1) * self.shape.per_renewal
        bars = [evolution.bars[0][block] for evolution in self.evolutions]
        return growth_backward(bars, self.after(n), limit, scales[n], norms[n])


def total(bars: list[Tensor | None]) -> Tensor | None:
    """The sum of what is there."""
    there = [bar for bar in bars if bar is not None]
    return torch.stack(there).sum(dim=0) if there else None


def plus(bar: Tensor, others: Tensor | None, n: int) -> Tensor:
    return bar if others is None else bar + others[n]


def run(shape: Shape, inputs: Inputs, has_backward: bool) -> tuple[Results, Kept]:
    """has_backward: whether all is kept that a backward pass needs"""
    loop = Loop(shape, inputs, begin(shape, inputs, has_backward or shape.equations is None))
    left, scales, norms = loop.forward(has_backward)
    loop.kept = loop.kept._replace(left=stacked(left))
    left.clear()
    if scales and has_backward:
        loop.kept = loop.kept._replace(scales=torch.stack(scales), norms=torch.stack(norms))
    return loop.results(), loop.kept


def stacked(left: list[Normed | Tensor]) -> Normed | Tensor:
    """What is there of each renewal, stacked."""
    if isinstance(left[0], Tensor):
        return torch.stack(left)  # type: ignore[arg-type]
    return Normed(*map(torch.stack, zip(*left, strict=True)))
