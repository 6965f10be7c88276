"""What a rule is: how a memory's weights follow from the surprises of its chunks.

A rule says in two steps what one chunk does, with `gate * tensor` and `+` alone:

    move     surprise -> what is added to the weights, and the momenta that are kept for the next chunk
    retain   what is left of the weights, with that added

The same two equations are used four ways: with real tensors (`Rule.step`), with all chunks of a block at once
(`coefficients`, which a rule may give in closed form and which are otherwise what the equations make of unit vectors),
by a parallel scan (`blocks.scan`), and chunk by chunk where a rule is not linear in surprises. To add one: write a
subclass, and register it in `rules` or hand it to `NeuralMemory(rule=...)`. docs/extending.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.rules.gates import KEEP, ChunkGates, Gates
from titans_pytorch.fast_weights.scale import ZERO, Sum, Zero, summed

Term = Tensor | Sum | Zero
"""A tensor, or a sum that is not worked out yet"""


class GateSpec(NamedTuple):
    """A gate that a rule asks for, made by a linear layer from each chunk (or token), for every head.

    Attributes:
        kind: factor, a number between 0 and 1 that multiplies what is old; decay, the same made of a number that says
            what is forgotten (both are kept as logarithms); share, numbers that sum to one; scale, numbers between 0
            and 1 that multiply what is new; rate, the step size of a write
        varies: whether all parameters of the memory share it, each has its own, or each entry of their last axes
    """

    name: str  # in the equations
    layer: str  # name of its layer in the memory, by which checkpoints know it
    kind: Literal["factor", "decay", "share", "scale", "rate"] = "factor"
    per: Literal["chunk", "token"] = "chunk"
    number: int = 1
    varies: Literal["memory", "parameter", "channel"] = "memory"
    bias: float | None = None  # its layer starts as this constant; None: at random


class Memory(NamedTuple):
    """One parameter of a memory: what is read, what keeps moving it, and the learned memory that it once was."""

    weights: Tensor  # (r ...)
    momenta: tuple[Tensor | Zero, ...]  # (r ...) each
    start: Tensor | None = None  # (r ...), for rules that ask for it

    @property
    def moved(self) -> tuple[Tensor, ...]:
        """The momenta that are there; none before the first chunk."""
        return tuple(momentum for momentum in self.momenta if isinstance(momentum, Tensor))


class Sums(NamedTuple):
    """One tensor for each chunk, as a sum of what the block began with and of what its chunks bring.

    Coefficients of channels have an axis for them before the chunks.
    """

    past: Tensor  # (o ... n)    of the momenta before the block
    surprise: Tensor  # (... n n)    of the surprises of its chunks


class Coefficients(NamedTuple):
    """All chunks of a block at once: sums whose shares depend on the gates alone."""

    step: Sums  # what each chunk adds to the weights
    keep: Tensor  # (... n+1 n+1)  left after chunk j of the block's first weights (i = 0), of the step of chunk i
    start: Tensor | None  # (... n+1)  share of the learned start after chunk j; None: none
    last_past: Tensor  # (o o ...)  of the momenta before the block in those after it
    last_surprise: Tensor  # (o ... n)  of the surprises in those
    adds_last_momentum: bool = False  # whether the last of the momenta is what each chunk adds to the weights

    def blocks(self, num: int) -> list[Coefficients]:
        """Those of each of so many blocks, computed as one with more rows.  (... b·r ...) -> (... r ...) each"""
        tensors = (*self.step, *self[1:-1])
        axes = (1, 0, 0, 0, 2, 1)  # of the rows
        return [
            Coefficients(Sums(past, surprise), keep, start, last_past, last_surprise, self.adds_last_momentum)
            for past, surprise, keep, start, last_past, last_surprise in zip(
                *map(partial(unfolded, num=num), tensors, axes), strict=True
            )
        ]

    def shares(self) -> Shares:
        """The weights after each chunk, in place of what each adds to them."""
        handed, step = self.keep[..., 1:], self.step
        if handed.ndim > step.surprise.ndim:  # channels are forgotten by themselves; steps have none
            step = Sums(step.past.unsqueeze(-2), step.surprise.unsqueeze(-3))
        past = (handed @ step.past.unsqueeze(-1)).squeeze(-1)
        return Shares(self.keep[..., 0], past, self.start, handed @ step.surprise, self.last_past, self.last_surprise)


class Shares(NamedTuple):
    """Weights before each chunk of a block and after the last, and momenta after the last, as sums."""

    initial: Tensor  # (... n+1)  of the block's first weights
    past: Tensor  # (o ... n+1)  of the momenta before it
    start: Tensor | None  # (... n+1)  of the learned start
    surprise: Tensor  # (... n+1 n)  of the surprises of its chunks
    last_past: Tensor  # (o o ...)  in the last momenta, of the momenta before it
    last_surprise: Tensor  # (o ... n)  in the last momenta, of its surprises

    def blocks(self, num: int) -> list[Shares]:
        """Those of each of so many blocks, computed as one with more rows.  (... b·r ...) -> (... r ...) each"""
        axes = (0, 1, 0, 0, 2, 1)  # of the rows
        return [Shares(*each) for each in zip(*map(partial(unfolded, num=num), self, axes), strict=True)]


def unfolded(x: Tensor | None, axis: int, num: int) -> Sequence[Any]:
    """What each of so many blocks has of a tensor, or nothing.  axis: of the rows, (... b·r ...) -> (... r ...) each"""
    return [None] * num if x is None else x.unflatten(axis, (num, -1)).unbind(axis)


class Rule:
    """How weights follow from surprises; see the head of this file.

    Attributes:
        gates: what it asks for; the rate of each write is always among them
        num_momenta: tensors like the weights that it carries from chunk to chunk
        transform: acts on every step of a matrix before it is added, (... i j) -> same; such rules are built chunk by
            chunk
        is_linear: whether `move` and `retain` are linear in the surprises; if not, weights are built chunk by chunk
        uses_start: whether `retain` looks at the learned start
        forgets_first: whether surprises are taken at what a chunk's forgetting leaves of the base, which has to be
            renewed after every chunk then
        zeros_stay: whether a weight that is zero and is not surprised stays zero, as where a capacity is closed
        window: chunks whose surprises a step adds up; more than one needs the gate of `omega.window_gate`
    """

    gates: tuple[GateSpec, ...] = (GateSpec("rate", "to_adaptive_step", kind="rate", per="token"),)
    num_momenta: int = 0
    transform: Callable[[Tensor], Tensor] | None = None
    is_linear: bool = True
    uses_start: bool = False
    forgets_first: bool = False
    zeros_stay: bool = True
    window: int = 1
    why_built: ClassVar[str] = "a rule that is not linear in surprises"

    def move(self, momenta: tuple[Term, ...], surprise: Term, gates: ChunkGates) -> tuple[Term, tuple[Term, ...]]:
        """What one chunk adds to the weights, and the momenta after it."""
        return surprise, ()

    def retain(self, weights: Term, step: Term, gates: ChunkGates, start: Term) -> Term:
        """The weights after a chunk.  Multiply the old ones by `gates.keep`: it also carries what is not finite."""
        raise NotImplementedError

    def begun(self, weights: Tensor) -> Tensor:
        """The weights that a learned start stands for.  (r ...)"""
        return weights

    @property
    def forgets(self) -> bool:
        """Whether it asks for a gate of what is forgotten."""
        return any(gate.name == KEEP for gate in self.gates)

    @property
    def is_factored(self) -> bool:
        """Whether weights can be read without building a chunk's step."""
        return self.is_linear and self.transform is None

    def step(self, memory: Memory, surprise: Tensor, gates: ChunkGates) -> Memory:
        """One chunk with real tensors; one without anything to store changes nothing.  surprise: (r ...)"""
        gates = gates.acting_on(surprise)
        step, momenta = self.move(memory.momenta, surprise, gates)
        step = summed(step, like=surprise)
        if self.transform is not None and step.ndim == 3:
            step = self.transform(step)
        start = ZERO if memory.start is None else memory.start
        weights = summed(self.retain(memory.weights, step, gates, start), like=surprise)
        before = (0.0 if isinstance(momentum, Zero) else summed(momentum) for momentum in memory.momenta)
        moved = (gates.stored(summed(new, like=surprise), old) for new, old in zip(momenta, before, strict=True))
        return Memory(gates.stored(weights, memory.weights), tuple(moved), memory.start)

    def coefficients(self, gates: Gates) -> Coefficients:
        """All chunks of a block at once: what the equations make of unit vectors, unless a rule has a closed form."""
        return from_unit_vectors(self, gates)


def from_unit_vectors(rule: Rule, gates: Gates) -> Coefficients:
    """Run the equations chunk by chunk on vectors that have one entry for each thing that may be summed."""
    like, n, o = gates.like, gates.num_chunks, rule.num_momenta
    channels = gates.channels

    def unit(place: int, size: int) -> Tensor:
        """(r size), or with channels (r size j)"""
        vector = torch.zeros(size, dtype=like.dtype, device=like.device)
        vector[place] = 1.0
        return vector.expand(len(like), size) if channels is None else vector[:, None].expand(len(like), size, channels)

    momenta: tuple[Tensor, ...] = tuple(unit(order, o + n) for order in range(o))
    weights, start = unit(0, n + 2), unit(n + 1, n + 2) if rule.uses_start else None
    steps, table = [], [weights]
    for chunk in range(n):
        of_chunk = gates.of_chunk(chunk).acting_on(weights)
        step, moved = rule.move(momenta, unit(o + chunk, o + n), of_chunk)
        steps.append(of_chunk.stored(summed(step, like=unit(0, o + n)), 0.0))
        momenta = tuple(of_chunk.stored(summed(new), old) for new, old in zip(moved, momenta, strict=True))
        kept = summed(rule.retain(weights, unit(1 + chunk, n + 2), of_chunk, ZERO if start is None else start))
        weights = of_chunk.stored(kept, weights)
        table.append(weights)

    def last(tensors: list[Tensor]) -> Tensor:
        """Chunks and what is summed become the last two axes.  -> (r n s), with channels (r j n s)"""
        together = torch.stack(tensors, dim=1)
        return together if channels is None else together.permute(0, 3, 1, 2)

    step_table, weight_table = last(steps), last(table)
    ends = last(list(momenta)) if momenta else step_table[..., :0, :]
    share = weight_table[..., n + 1] if rule.uses_start else None
    return Coefficients(
        Sums(step_table[..., :o].movedim(-1, 0), step_table[..., o:]),
        weight_table[..., : n + 1],
        share,
        ends[..., :o].movedim(-2, 0).movedim(-1, 1),
        ends[..., o:].movedim(-2, 0),
    )
