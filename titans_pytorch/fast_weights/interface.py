"""What goes into an engine and what comes out of it.

A *row* is one head of one sequence: it has its own weights. A *block* is a run of chunks whose surprises are all taken
at the same base weights. Its *entries* are the weights before each of its chunks, and after the last. An engine turns a
block's writes into a `Block` that can be read and that ends in a `Carry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass
from typing_extensions import dataclass_transform

from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.fast_weights.rules.rule import Memory
from titans_pytorch.fast_weights.scale import ZERO
from titans_pytorch.losses import HuberOfTokens

Weights = dict[str, Tensor]
"""name of a parameter of the memory model -> (r ...)"""

LossFn = Callable[[Tensor, Tensor], Tensor]
"""(prediction, value), both (... d) -> loss of each token (...)"""

Entries = slice | Tensor
"""Which entry of a block, 0 for its start, each group of queries reads"""

T = TypeVar("T")
S = TypeVar("S")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A frozen dataclass whose tensors torch finds, as recomputation and detaching need."""
    made = dataclass(frozen=True)(cls)
    register_dataclass(made)
    return made


@record
class PerParameter(Generic[T]):
    """Something of every parameter of a memory: one thing that all of them share, or one for each."""

    each: dict[str, T]
    is_shared: bool

    @classmethod
    def shared(cls, names: Iterable[str], one: T) -> PerParameter[T]:
        return cls(dict.fromkeys(names, one), True)

    def __getitem__(self, name: str) -> T:
        return self.each[name]

    def map(self, fn: Callable[[T], S]) -> PerParameter[S]:
        """fn of each thing; of a shared one once."""
        if self.is_shared:
            return PerParameter.shared(self.each, fn(self.any))
        return PerParameter({name: fn(value) for name, value in self.each.items()}, False)

    @property
    def any(self) -> T:
        """That of some parameter: of all, where they share it."""
        return next(iter(self.each.values()))


class Writes(NamedTuple):
    """What is to be stored: whole chunks, `c` counts every write, also several of one token."""

    keys: Tensor  # (r n c d)
    values: Tensor  # (r n c d)
    rates: PerParameter[Tensor]  # (r n c)  theta, 0 for what is not stored
    gates: PerParameter[Gates]
    modulation: dict[str, Tensor]  # name -> (r n)  share of each parameter in the surprise; empty: all 1
    mix: Tensor | None  # (r n)    share of the previous layer's weights in the base
    slow: Weights  # (r d)    parameters of the memory model that storing does not change
    thresholds: Tensor | None = None  # (r n c)  of losses that have one for each token
    num_older: int = 0  # chunks in front that are stored already, and count again in the windows of those after them

    @property
    def num_chunks(self) -> int:
        """How many are to be stored."""
        return self.keys.shape[1] - self.num_older

    def select(self, chunks: slice) -> Writes:
        """Some of the chunks that are to be stored, with as many older ones in front of them."""
        given = slice(chunks.start, chunks.stop + self.num_older)
        return self._replace(
            keys=self.keys[:, given],
            values=self.values[:, given],
            rates=self.rates.map(lambda rate: rate[:, given]),
            gates=self.gates.map(lambda gates: gates.select(chunks)),
            modulation={name: share[:, given] for name, share in self.modulation.items()},
            mix=None if self.mix is None else self.mix[:, chunks],
            thresholds=None if self.thresholds is None else self.thresholds[:, given],
        )

    def held_to(self, loss_fn: LossFn) -> LossFn:
        """The loss of these writes: with their thresholds, if it has some."""
        return (
            loss_fn.of(self.thresholds)
            if isinstance(loss_fn, HuberOfTokens) and self.thresholds is not None
            else loss_fn
        )


class Carry(NamedTuple):
    """A row's memory between two blocks."""

    base: Weights  # (r ...)    where surprises are taken
    weights: Weights  # (r ...)    what is read
    momenta: dict[str, tuple[Tensor, ...]]  # (r ...) for every order; empty where nothing has moved yet
    start: Weights  # (r ...)    the learned memory of the beginning, for rules that ask for it; else empty

    def memory(self, name: str, num_momenta: int) -> Memory:
        """One parameter, as rules see it."""
        weights = self.weights[name]
        nothing = torch.zeros_like(weights) if torch.compiler.is_compiling() else ZERO
        return Memory(weights, self.momenta.get(name, (nothing,) * num_momenta), self.start.get(name))

    def with_memories(self, after: dict[str, Memory]) -> Carry:
        """The carry after these have moved; the base stays."""
        momenta = {name: memory.moved for name, memory in after.items() if memory.momenta}
        return self._replace(weights={name: memory.weights for name, memory in after.items()}, momenta=momenta)


class Unrolled(NamedTuple):
    """Groups of queries beside the weights that they read, for products one after the other."""

    block: Block
    x: Tensor  # (r' g' k i), of as many rows as the block has
    entries: Entries  # of that block
    back: Callable[[Tensor], Tensor]  # (r' g' k j) -> (r g k j)


class Block(ABC):
    """The weights before each of a block's chunks, and after the last, however they are represented."""

    reads: Tensor | None = None
    """What whoever stored them has read with them, if anything, a group for each chunk  (r n c d)"""

    @property
    @abstractmethod
    def num_chunks(self) -> int: ...

    @abstractmethod
    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        """x @ weight, each group with the weights of its entry.  x: (r g k i) -> (r g k j)"""

    def unrolled(self, x: Tensor, entries: Entries) -> Unrolled:
        """Queries for several products in a row, if a block does those in another order.  x: (r g k i)"""
        return Unrolled(self, x, entries, lambda out: out)

    @abstractmethod
    def materialise(self, name: str) -> Tensor:
        """All entries of a parameter.  -> (r n+1 ...)"""

    @abstractmethod
    def finish(self) -> Carry:
        """What the next block begins with."""

    def vector(self, name: str, entries: Entries) -> Tensor:
        """A parameter with fewer than two axes, broadcasting over a group's tokens.  -> (r g 1 d)"""
        values = self.materialise(name)[:, entries]
        return values.reshape(*values.shape[:2], 1, -1)

    def entry(self, index: int) -> Weights:
        """All weights at one entry.  -> (r ...)"""
        return {name: self.materialise(name)[:, index] for name in self.names}

    @property
    @abstractmethod
    def names(self) -> Iterable[str]:
        """The parameters that it holds."""


class PreviousLayer(Protocol):
    """The trajectory of the memory layer before this one, chunk by chunk, as a weight residual reads it."""

    def product(self, name: str, x: Tensor, first_chunk: int, is_transposed: bool) -> Tensor:
        """x: (r n c i), chunk j read with the weights before chunk first_chunk + j -> (r n c j)"""
        ...

    def materialise(self, name: str, first_chunk: int, num_chunks: int) -> Tensor:
        """-> (r n ...)"""
        ...


class Residual(NamedTuple):
    """Where in the previous layer's trajectory a block begins."""

    layer: PreviousLayer
    first_chunk: int
