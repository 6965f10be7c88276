"""Blocks of one chunk: the rule's own sums, one after the other, and backwards through them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.loop.equations import (
    Equation,
    Source,
    adds_to_momentum,
    carrier_of,
    gates_new_momentum,
    gates_surprise,
    sorted_terms,
    sums_new_slots,
    takers_of,
)
from titans_pytorch.fast_weights.loop.evolution import Evolution, Others, PackFactors, num_together

Parts = list[tuple[Tensor, Tensor | None]]
"""Values (g r p q), and the gate (g r 1 1) that multiplies each, None: 1"""


class Momenta(NamedTuple):
    """Those of o orders where renewals begin, where blocks inside of one begin, and after the last block.

    On the way back those inside are worked out again. Where nobody looks back at them all lie in one place.
    """

    starts: Tensor  # (N o g r p q)
    inside: Tensor | None  # (k-1 o g r p q)  of one renewal after the other; None: on the way back
    last: Tensor | None  # (o g r p q)


class ByEquations(Evolution):
    """The rule's sums, one after the other, in blocks of one chunk.

    On the way back the starts and ends of momenta inside of a renewal are there from `go_again` for it on.

    weights: (g M r k p q) of M places, and last: (g r p q) after all of them;
    gates: (T G g r 1 1), those that the equations multiply by, of channels (T G g r 1 q); share: (N g·r L 1), how much
    of every token's surprise is taken, None: all; sums: (T s g r p q), sums that become no slot, and the surprises
    where a gate multiplies them
    """

    def __init__(
        self,
        weights: Tensor,
        last: Tensor,
        momenta: Momenta,
        factors: PackFactors,
        equations: tuple[Equation, ...],
        gates: Tensor,
        sums: Tensor,
        share: Tensor | None,
    ) -> None:
        self.equations, self.gates, self.sums = equations, gates, sums
        self.weights, self.last = weights, last
        self.per_renewal = k = weights.shape[3]
        self.num_places, num_blocks = weights.shape[1], len(gates)
        places = [*(block for place in weights.unbind(1) for block in place.unbind(2)), last]
        in_place = [block % (self.num_places * k) for block in range(num_blocks)]
        self.starts, self.ends = [[places[i] for i in in_place]], [[places[i + 1] for i in in_place]]
        self.momenta = momenta
        for slot, firsts in enumerate(momenta.starts.unbind(1)):
            later = () if momenta.inside is None else momenta.inside[:, slot].unbind(0)
            each = [moved for first in firsts.unbind(0) for moved in (first, *later)]
            self.starts.append(each)
            self.ends.append(each[1:] if momenta.last is None else [*each[1:], momenta.last[slot]])
        self.left, self.right = (
            [part.unflatten(1, (k, -1)).flatten(0, 1) for part in factor.unbind(0)] for factor in factors
        )  # (g·r·k l p) each
        self.shares = None
        if share is not None:
            self.shares = [part.unflatten(1, (k, -1)).flatten(0, 1) for part in share.unbind(0)]  # (g·r·k l 1) each
        self.each_gate = [list(gate.unbind(0)) for gate in gates.unbind(1)]
        self.each_sum = [list(each.unbind(0)) for each in sums.unbind(1)]
        inner = [number for number, equation in enumerate(equations) if equation.slot is None]
        self.place = {number: place for place, number in enumerate(inner)}  # in `sums`
        self.keeps_surprise = gates_surprise(equations)
        self.sorted = [sorted_terms(equation) for equation in equations]
        self.carrier = carrier_of(equations)
        self.adds_in_place = adds_to_momentum(equations, self.carrier)
        # what a new slot is a part of gives its gradient where a block ends, unless other sums have a part in that
        hands_over = not sums_new_slots(equations)
        self.takers = [
            takers_of(equations, number) if hands_over and equation.slot is not None else []
            for number, equation in enumerate(equations)
        ]
        self.gated = [term.source for equation in equations for term in equation.terms if term.gate is not None]

    def of_slot(self, slot: int, index: int) -> Tensor:
        if slot == 0:
            return self.weights[index].movedim(2, 1)
        raise ValueError(f"momenta inside of a renewal are not kept, got slot {slot}")

    def bases(self, index: int) -> Tensor:
        return self.weights[index, :, :, 0]

    def weights_of(self, index: int, first: int, num: int) -> Tensor:
        return self.weights[index].narrow(0, first % self.num_places, num)

    def start_again(self) -> None:
        self.weights[:, 0, :, 0].copy_(self.last)

    def forward(self, n: int) -> None:
        k, like, all_sums = self.per_renewal, self.starts[0][0], range(len(self.sorted))
        if k == 1 and self.adds_in_place:
            self.move_in_place(n, self.taken_left(n), self.right[n], all_sums)
            return
        surprises = torch.bmm(self.taken_left(n).mT, self.right[n]).view(*like.shape[:2], k, *like.shape[2:])
        for block, surprise in enumerate(surprises.unbind(2), n * k):
            self.move(block, self.each_sum[-1][block].copy_(surprise) if self.keeps_surprise else surprise, all_sums)

    def move(self, block: int, surprise: Tensor, sums: Iterable[int]) -> None:
        """Some of a block's sums."""
        for number in sums:
            plain, gated = self.sorted[number]
            sum_into(
                self.value(Source("new", number), block, surprise),
                [self.value(source, block, surprise) for source in plain],
                [(self.value(source, block, surprise), self.each_gate[gate][block]) for gate, source in gated],
            )

    def move_in_place(self, block: int, left: Tensor, right: Tensor, sums: Iterable[int]) -> None:
        """Some of a block's sums, where its surprise is added to what it moves.  left, right: (g·r l p), (g·r l q)"""
        for number in sums:
            plain, gated = self.sorted[number]
            out = self.value(Source("new", number), block, right)
            is_carrier = number == self.carrier
            values = [] if is_carrier else [self.value(source, block, out) for source in plain]
            sum_into(out, values, [(self.value(source, block, out), self.each_gate[g][block]) for g, source in gated])
            if is_carrier:
                out.view(-1, *out.shape[2:]).baddbmm_(left.mT, right)

    def taken_left(self, n: int) -> Tensor:
        """The left factors of a renewal, as far as they are taken.  -> (g·r·k l p)"""
        return self.left[n] if self.shares is None else self.left[n] * self.shares[n]

    def value(self, source: Source, block: int, surprise: Tensor) -> Tensor:
        """-> (g r p q)"""
        if source.kind == "surprise":
            return surprise
        if source.kind == "old":
            return self.starts[source.number][block]
        slot = self.equations[source.number].slot
        return self.each_sum[self.place[source.number]][block] if slot is None else self.ends[slot][block]

    def begin_backward(self, last_bars: list[Tensor | None], others: list[Others | None]) -> None:
        like = self.starts[0][0]
        self.others = others[0]
        # gradients at the end of a block lie where one product reads those of a whole renewal
        n, shape = len(self.left), (*like.shape[:2], self.per_renewal, *like.shape[2:])
        # only those of two renewals are needed at a time: what is written again and again stays in the cache
        before, *self.end_bars = two_by_turns(like.new_empty(2, len(self.starts), *shape), n + 1)
        self.sum_bars = [like.new_empty(shape) for _ in self.place]
        self.surprise_bar = None if self.carrier >= 0 else like.new_empty(shape)
        self.at_once = num_together(like, self.per_renewal)
        self.scratch = like.new_empty(*like.shape[:2], self.at_once, *like.shape[2:])
        # gradients of what the first renewal begins with: where those of one before it would end
        self.bars = [[before[slot, :, :, -1], *self.by_block(slot)] for slot in range(len(self.starts))]
        self.each_sum_bar = [bars.unbind(2) * n for bars in self.sum_bars]
        for bars, last in zip(self.bars, last_bars, strict=True):
            _ = bars[-1].zero_() if last is None else bars[-1].copy_(last)
        self.to_start: list[Parts] = []
        self.found: list[list[Tensor | None]] = []
        self.share_bars: list[Tensor] = []
        if self.goes_again:
            self.lay_out_again()
        self.gate_axes = (-2, -1) if self.gates.shape[-1] == 1 else (-2,)  # those that a gate is the same for

    @property
    def goes_again(self) -> bool:
        """Whether momenta inside of renewals are worked out again on the way back."""
        return self.per_renewal > 1 and len(self.starts) > 1

    def lay_out_again(self) -> None:
        """Room for the momenta inside of one renewal, and of those that its last block leaves."""
        self.again = self.momenta.starts.new_empty(self.per_renewal, *self.momenta.starts.shape[1:])
        for slot, again in enumerate(self.again.unbind(1), 1):
            ends = again.unbind(0)
            firsts = self.momenta.starts[:, slot - 1].unbind(0)
            self.starts[slot] = [moved for first in firsts for moved in (first, *ends[:-1])]
            self.ends[slot] = [*ends] * len(firsts)
        self.of_momenta = [number for number, equation in enumerate(self.equations) if equation.slot]
        self.num_again = self.per_renewal - (not gates_new_momentum(self.equations))

    def go_again(self, n: int, left: Tensor) -> None:
        """Through the momenta of a renewal's blocks, as far as anybody asks for them.  left: its `taken_left`"""
        k = self.per_renewal
        left, right = left.unflatten(0, (-1, k)), self.right[n].unflatten(0, (-1, k))
        for place in range(self.num_again):
            block, factors = n * k + place, (left[:, place], right[:, place])
            if self.adds_in_place:
                self.move_in_place(block, *factors, self.of_momenta)
            else:
                surprise = self.each_sum[-1][block] if self.keeps_surprise else self.product(*factors)
                self.move(block, surprise, self.of_momenta)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """A block's surprise.  (g·r l p), (g·r l q) -> (g r p q)"""
        return torch.bmm(left.mT, right).view_as(self.starts[0][0])

    def of_readers(self, n: int) -> Tensor:
        self.read = torch.zeros_like(self.last) if self.others is None else self.others.of_block(n, 0)
        return self.read

    def by_block(self, slot: int) -> list[Tensor]:
        """A slot's gradients after each block.  -> (g r p q) each"""
        return [block for renewal in self.end_bars for block in renewal[slot].unbind(2)]

    def bars_after(self, n: int) -> Tensor:
        return self.end_bars[n][:, :, :, -1]

    def bar(self, number: int, block: int) -> Tensor:
        """The gradient of a sum, added up in place.  -> (g r p q)"""
        slot = self.equations[number].slot
        return self.each_sum_bar[self.place[number]][block] if slot is None else self.bars[slot][block + 1]

    def bars_of(self, number: int, n: int) -> Tensor:
        """-> (g r k p q)"""
        slot = self.equations[number].slot
        return self.sum_bars[self.place[number]] if slot is None else self.end_bars[n][slot]

    def factor_bars(self, n: int) -> tuple[Tensor, Tensor]:
        first, left = n * self.per_renewal, self.taken_left(n)
        if self.goes_again:
            self.go_again(n, left)
        for bars in self.sum_bars:
            bars.zero_()
        for block in reversed(range(first, first + self.per_renewal)):
            of_surprise = self.block_backward(block)
            if self.surprise_bar is not None:
                sum_parts(self.surprise_bar[:, :, block - first], of_surprise)
            if block > first:
                self.start_of(block)
        self.add_gate_bars(n)
        bars = self.bars_of(self.carrier, n) if self.surprise_bar is None else self.surprise_bar
        bar = bars.flatten(0, 2)
        left_bar, right_bar = torch.bmm(self.right[n], bar.mT), torch.bmm(left, bar)
        if self.shares is not None:
            self.share_bars.append((left_bar * self.left[n]).sum(dim=-1))
            left_bar = left_bar * self.shares[n]
        rows = len(bar) // self.per_renewal
        return left_bar.view(rows, -1, left_bar.shape[-1]), right_bar.view(rows, -1, right_bar.shape[-1])

    def block_backward(self, block: int) -> Parts:
        """From the gradients of a block's end to those of all its sums.  -> those of its surprise"""
        of_surprise: Parts = []
        self.to_start = [[] for _ in self.starts]
        is_last = (block + 1) % self.per_renewal == 0  # of its renewal; of others `start_of` has asked the takers
        for number in reversed(range(len(self.equations))):
            bar, slot = self.bar(number, block), self.equations[number].slot
            for gate_number, source in self.equations[number].terms:
                gate = None if gate_number is None else self.each_gate[gate_number][block]
                if source.kind == "surprise":
                    of_surprise.append((bar, gate))
                elif source.kind == "old":
                    self.to_start[source.number].append((bar, gate))
                elif is_last or (slot, gate_number) not in self.takers[source.number]:
                    target = self.bar(source.number, block)
                    _ = target.add_(bar) if gate is None else target.addcmul_(bar, gate)
        return of_surprise

    def start_bar(self, n: int) -> None:
        self.start_of(n * self.per_renewal)

    def start_of(self, block: int) -> None:
        """From the gradients of a block's sums to those of its start, where inside of a renewal the one before ends."""
        is_inside = block % self.per_renewal > 0
        for number in reversed(range(len(self.equations))):
            if (slot := self.equations[number].slot) is None:
                continue
            parts, read = self.to_start[slot], self.read_at(block) if slot == 0 else None
            parts = parts if read is None else [*parts, (read, None)]
            if is_inside:
                ends = ((self.bars[of][block], gate) for of, gate in self.takers[number])
                parts += [(bar, None if gate is None else self.each_gate[gate][block - 1]) for bar, gate in ends]
            sum_parts(self.bars[slot][block], parts)

    def read_at(self, block: int) -> Tensor | None:
        """The gradient of a block's weights from whoever reads them, and of a renewal's first from its surprises."""
        n, place = divmod(block, self.per_renewal)
        if place == 0:
            return self.read
        return None if self.others is None else self.others.of_block(n, place)

    def add_gate_bars(self, n: int) -> None:
        """Every gate has the dot product of what it multiplies and the gradient of what it is added to."""
        found: list[Tensor | None] = [None] * self.gates.shape[1]
        uses = [(t.gate, number) for number, e in enumerate(self.equations) for t in e.terms if t.gate is not None]
        for (gate, number), source in zip(uses, self.gated, strict=True):
            bar = self.dots(self.bars_of(number, n), self.values_of(source, n))
            so_far = found[gate]
            found[gate] = bar if so_far is None else so_far + bar
        self.found.append(found)

    def dots(self, bars: Tensor, values: list[Tensor]) -> Tensor:
        """Dot products, of as many blocks at once as `values`.  bars: (g r k p q) -> (g r k), of channels (g r k q)"""
        found = [
            torch.mul(x, y, out=self.scratch[:, :, : x.shape[2]]).sum(dim=self.gate_axes)
            for x, y in zip(bars.split(self.at_once, dim=2), values, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def gate_bars(self) -> list[Tensor]:
        shares = [torch.stack(self.share_bars[::-1])] if self.share_bars else []
        if not self.gated:
            return [torch.zeros_like(self.gates), *shares]
        each = [bar for found in self.found[::-1] for bar in found]
        there = next(bar for bar in each if bar is not None)
        bars = torch.stack([torch.zeros_like(there) if bar is None else bar for bar in each])
        bars = bars.unflatten(0, (len(self.left), -1))  # (N G g r k), of channels (N G g r k q)
        return [bars.movedim(4, 1).flatten(0, 1).reshape(self.gates.shape), *shares]

    def values_of(self, source: Source, n: int) -> list[Tensor]:
        """In the blocks of a renewal, as many at once as a cache holds.  -> (g r . p q) each"""
        blocks = slice(n * self.per_renewal, (n + 1) * self.per_renewal)
        slot = source.number if source.kind == "old" else self.equations[source.number].slot
        if source.kind == "old" and slot == 0:
            return list(self.weights[:, n].split(self.at_once, dim=2))
        if source.kind == "surprise" or slot is None:
            sums = self.sums[blocks, -1 if source.kind == "surprise" else self.place[source.number]]
            return list(sums.movedim(0, 2).split(self.at_once, dim=2))
        each = (self.starts if source.kind == "old" else self.ends)[slot][blocks]
        parts = [each[first : first + self.at_once] for first in range(0, len(each), self.at_once)]
        return [torch.stack(part, dim=2) if len(part) > 1 else part[0].unsqueeze(2) for part in parts]


def two_by_turns(pair: Tensor, num: int) -> list[Tensor]:
    """So many things, of which only neighbours are there at a time.  (2 ...) -> (...) each"""
    return [pair[number % 2] for number in range(num)]


def sum_into(out: Tensor, plain: list[Tensor], gated: list[tuple[Tensor, Tensor]]) -> None:
    """out = all that is plain + every value times its gate, in as few operations as there are terms but one."""
    if len(plain) > 1:
        torch.add(plain[0], plain[1], out=out)
    elif plain and gated:
        torch.addcmul(plain[0], *gated[0], out=out)
        gated = gated[1:]
    elif plain:
        out.copy_(plain[0])
    elif gated:
        torch.mul(*gated[0], out=out)
        gated = gated[1:]
    else:
        out.zero_()
    for more in plain[2:]:
        out.add_(more)
    for value, gate in gated:
        out.addcmul_(value, gate)


def sum_parts(out: Tensor, parts: Parts) -> None:
    """out = all parts, each times its gate if it has one."""
    plain = [value for value, gate in parts if gate is None]
    sum_into(out, plain, [(value, gate) for value, gate in parts if gate is not None])
