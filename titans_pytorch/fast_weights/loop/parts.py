"""What goes into a loop, what comes out of it, and what it keeps for its backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.loop.by_equations import Momenta
from titans_pytorch.fast_weights.loop.equations import Equation, gates_new_momentum, moves_in_place, num_sums
from titans_pytorch.fast_weights.loop.evolution import PackFactors
from titans_pytorch.fast_weights.loop.mlp import Normed, Products, Tokens
from titans_pytorch.fast_weights.loop.packing import Packing
from titans_pytorch.fast_weights.loop.reading import Reading
from titans_pytorch.memory_models import NORM_GAIN


class Shape(NamedTuple):
    """What the loop does, as far as it is no tensor."""

    packing: Packing
    matrices: tuple[str, ...]  # of the memory model, in the order of its layers
    num_blocks: int  # T
    per_renewal: int  # blocks of a renewal, k
    num_slots: int  # a: weights and momenta
    equations: tuple[Equation, ...] | None  # of blocks of one chunk; None: by shares
    renews_last: bool  # whether the base is renewed after the last block
    num_places: int | None = None  # renewals whose starts are kept until they are read; None: all

    @property
    def takes_states(self) -> bool:
        """Whether `Inputs.states` are moved where they lie, and come out again: nobody looks back at the way."""
        return self.num_places is not None and self.equations is not None and moves_in_place(self.equations)

    @property
    def num_renewals(self) -> int:
        return self.num_blocks // self.per_renewal

    def renews(self, renewal: int) -> bool:
        """Whether the base is renewed after a renewal's blocks."""
        return renewal + 1 < self.num_renewals or self.renews_last


class Inputs(NamedTuple):
    """What goes in; lists are of packs."""

    tokens: Tokens
    gain: Tensor | None  # (r 1 d)  of a norm, where storing does not change it
    base: list[Tensor] | None  # (g r p q)  of the first renewal; None: the weights
    states: list[Tensor]  # (g r a p q)  weights and momenta
    mixes: list[Tensor]  # by shares (T g r a a), by equations (T G g r 1 1|q), of a gain (N r a+k-1 a+k-1+L)
    shares: list[Tensor | None]  # by shares (T g r l a); by equations (N g r L 1), None: all of every surprise
    limit: Tensor | None  # (r)  the largest norm of a base
    share: Tensor | None  # ()  how far the base goes to the current weights; None: all the way
    queries: Tensor | None = None  # (N r k c d)  for a loop that reads what each block begins with


class Results(NamedTuple):
    """What comes out."""

    last: list[Tensor]  # of packs, weights and momenta after the last block, as `Inputs.states`  (g r a p q)
    starts: dict[str, list[Tensor]]  # the same where blocks begin, as they lie in packs  (N k r p q)
    inputs: dict[str, Tensor]  # of every matrix but the first  (N r L i)
    errors: dict[str, Tensor]  # of every parameter  (N r L j)
    error: Tensor  # (N r L d)  of what was predicted
    each: list[dict[str, Tensor]] | None = None  # instead of `starts`: every block's, as their owner sees them (r i j)
    reads: Tensor | None = None  # (N r k c d)
    base: list[Tensor] | None = None  # of packs, of the last renewal, where starts are not kept and it is still in use


class Kept(NamedTuple):
    """What the backward pass needs beside what goes in."""

    states: list[Tensor]  # by shares (T+1 g r a p q), by equations weights (g M r k p q), of a gain (N+1 r a+k-1+L d)
    lasts: list[Tensor]  # by equations, weights after the last block (g r p q)
    momenta: list[Momenta]  # by equations
    factors: list[PackFactors]
    sums: list[Tensor]  # (T s g r p q) by equations
    products: list[Products]
    left: Normed | Tensor  # (N r L .)  of a norm; Tensor: its output alone, without a backward pass, or no norm
    scales: Tensor | None  # (N r)  by which a base was made smaller, 1 where it was not
    norms: Tensor | None  # (N r)
    read: Reading | None = None  # of queries

    def for_backward(self, shape: Shape) -> Kept:
        """Without momenta inside of renewals, which are worked out again, and those that only come out."""
        if shape.equations is None:
            return self
        is_needed = shape.per_renewal == 1 and gates_new_momentum(shape.equations)  # a gate multiplies the last ones
        momenta = [Momenta(starts, None, last if is_needed else None) for starts, _, last in self.momenta]
        return self._replace(momenta=momenta)


def begin(shape: Shape, inputs: Inputs, keeps_all: bool) -> Kept:
    """Room for all that a loop keeps; where nobody asks for it afterwards, every renewal uses the same again."""
    keys = inputs.tokens.keys
    n, rows, length, _ = keys.shape

    def room(*sizes: int) -> Tensor:
        """(N ...)"""
        return keys.new_empty(n if keeps_all else 1, *sizes).expand(n, *sizes)

    states, lasts, momenta, factors, sums = [], [], [], [], []
    for number, start in enumerate(inputs.states):
        count, _, _, p, q = start.shape
        is_gain = shape.packing.packs[number] == (NORM_GAIN,)
        is_table = is_gain and shape.equations is not None and inputs.mixes[number].ndim == 4
        if shape.equations is None:
            states.append(start.new_empty(shape.num_blocks + 1, *start.shape))
            states[-1][0] = start
        elif is_table:
            head = shape.num_slots + shape.per_renewal - 1
            states.append(start.new_zeros(n + 1, rows, head + length, q))
            states[-1][0, :, : shape.num_slots] = start[0, :, :, 0]
            lasts.append(start)
            momenta.append(Momenta(start, None, None))
            sums.append(start)
            factors.append(PackFactors(keys, states[-1][:-1, :, head:]))
            continue
        else:
            num_places = n if shape.num_places is None or is_gain else min(shape.num_places, n)
            if shape.takes_states and num_places * shape.per_renewal == 1:
                states.append(start[:, None, :, :1])
            else:
                states.append(start.new_empty(count, num_places, rows, shape.per_renewal, p, q))
                states[-1][:, 0, :, 0] = start[:, :, 0]
            lasts.append(start.new_empty(count, rows, p, q))
            momenta.append(room_for_momenta(shape, start[:, :, 1:].movedim(2, 0), keeps_all))
            kept_sums = start.new_empty(
                shape.num_blocks if keeps_all else 1, num_sums(shape.equations), *start.shape[:2], p, q
            )
            sums.append(kept_sums.expand(shape.num_blocks, *kept_sums.shape[1:]))
        if is_gain:  # summed over tokens: its left factor is 1
            left = keys.new_ones(()).expand(n, rows, length, 1)
        else:
            holds_keys = number == shape.packing.places[shape.matrices[0]].pack
            left = keys.new_empty(n, count * rows, length, p) if holds_keys else room(count * rows, length, p)
        factors.append(PackFactors(left, room(count * rows, length, q)))
    place = shape.packing.places[shape.matrices[0]]
    factors[place.pack].left.narrow(1, place.number * rows, rows).copy_(keys)  # the first of a pack is never turned
    widths = [widths_of(inputs, shape, name) for name in shape.matrices[:-1]]
    products = [Products(*(room(rows, length, width) for _ in range(2))) for width in widths]
    return Kept(states, lasts, momenta, factors, sums, products, keys, None, None)


def room_for_momenta(shape: Shape, given: Tensor, keeps_all: bool) -> Momenta:
    """Room for all momenta, and in it those of the first renewal.  given: (o g r p q)"""
    n, inside = shape.num_renewals, shape.per_renewal - 1
    if shape.takes_states or (not keeps_all and moves_in_place(shape.equations or ())):
        place = given if shape.takes_states else given.clone()
        return Momenta(place.expand(n, *given.shape), place.expand(inside, *given.shape), place)
    starts = given.new_empty(n, *given.shape)
    starts[0] = given
    return Momenta(starts, given.new_empty(inside, *given.shape), torch.empty_like(starts[0]))


def widths_of(inputs: Inputs, shape: Shape, name: str) -> int:
    """How many numbers come out of a matrix."""
    place = shape.packing.places[name]
    return inputs.states[place.pack].shape[-2 if place.is_turned else -1]
