"""No chunk at all: the weights that were carried, for every group that reads them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from titans_pytorch.fast_weights.interface import Block, Carry, Entries, Weights, record


@record
class StillBlock(Block):
    """Weights that stand still; every entry is the same."""

    start: Carry

    @property
    def num_chunks(self) -> int:
        return 0

    @property
    def names(self) -> Iterable[str]:
        return self.start.weights

    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        weight = self.start.weights[name]
        return (x.flatten(1, 2) @ (weight.mT if is_transposed else weight)).unflatten(1, x.shape[1:3])

    def vector(self, name: str, entries: Entries) -> Tensor:
        """-> (r 1 1 d)"""
        return self.start.weights[name].reshape(len(self.start.weights[name]), 1, 1, -1)

    def materialise(self, name: str) -> Tensor:
        """-> (r 1 ...)"""
        return self.start.weights[name].unsqueeze(1)

    def entry(self, index: int) -> Weights:
        return self.start.weights

    def finish(self) -> Carry:
        return self.start
