"""What goes into an engine and what comes out of it.

A *row* is one head of one sequence: it has its own weights. A *block* is a run of chunks whose surprises are all taken
at the same base weights. An engine turns a block's writes into a `Block` that can be read and that ends in a `Carry`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from titans_pytorch.fast_weights.rules.recurrence import Gates

Weights = dict[str, Tensor]
"""name of a parameter of the memory model -> (r ...)"""

LossFn = Callable[[Tensor, Tensor], Tensor]
"""(prediction, value), both (... d) -> loss of each token (...)"""

Rows = slice | Tensor
"""Which entry of a block, 0 for its start, each group of queries reads"""


Each = TypeVar("Each")


def assigned(names: Iterable[str], each: Sequence[Each]) -> dict[str, Each]:
    """What is one for all parameters or one for each, by name."""
    names = list(names)
    return dict(zip(names, each if len(each) > 1 else list(each) * len(names), strict=True))


class Writes(NamedTuple):
    """What is to be stored: whole chunks, `c` counts every write, also several of one token."""

    keys: Tensor  # (r n c d)
    values: Tensor  # (r n c d)
    rates: tuple[Tensor, ...]  # (r n c)    theta, 0 for what is not stored; one for all parameters or one for each
    gates: tuple[Gates, ...]  # one for all parameters or one for each
    modulation: dict[str, Tensor]  # name -> (r n)  share of each parameter in the surprise; empty: all 1
    mix: Tensor | None  # (r n)    share of the previous layer's weights in the base
    slow: Weights  # (r d)    parameters of the memory model that storing does not change

    @property
    def num_chunks(self) -> int:
        return self.keys.shape[1]

    def select(self, chunks: slice) -> Writes:
        modulation = {name: share[:, chunks] for name, share in self.modulation.items()}
        mix = None if self.mix is None else self.mix[:, chunks]
        tokens = (self.keys[:, chunks], self.values[:, chunks], tuple(rate[:, chunks] for rate in self.rates))
        return Writes(*tokens, tuple(gates.select(chunks) for gates in self.gates), modulation, mix, self.slow)


class Carry(NamedTuple):
    """A row's memory between two blocks."""

    base: Weights  # (r ...)    where surprises are taken
    weights: Weights  # (r ...)    what is read
    momenta: dict[str, tuple[Tensor, ...]]  # (r ...) for every order; empty where nothing has moved yet


class Block(Protocol):
    """The weights before each of a block's chunks, and after the last, however they are represented."""

    @property
    def num_chunks(self) -> int: ...

    def product(self, name: str, x: Tensor, rows: Rows, is_transposed: bool = False) -> Tensor:
        """x @ weight, each group with the weights of its row.  x: (r g k i) -> (r g k j)"""
        ...

    def vector(self, name: str, rows: Rows) -> Tensor:
        """A parameter with fewer than two axes, broadcasting over a group's tokens.  -> (r g 1 d)"""
        ...

    def materialise(self, name: str) -> Tensor:
        """-> (r n+1 ...)"""
        ...

    def entry(self, row: int) -> Weights:
        """All weights at one entry.  -> (r ...)"""
        ...

    def finish(self) -> Carry: ...


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
