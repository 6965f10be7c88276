"""Many equal blocks in a row as one: what they hold is read and built for all of them at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.blocks.factored import FactoredBlock
from titans_pytorch.fast_weights.interface import Block, Carry, Entries, Weights, record


@record
class StartsBlock(Block):
    """Blocks of one chunk, each by the weights it begins with."""

    starts: Weights  # (N k r i j), vectors (N k r 1 d), of n = N k chunks; rows lie before k
    last: Carry

    @property
    def num_chunks(self) -> int:
        n, k = next(iter(self.starts.values())).shape[:2]
        return n * k

    @property
    def names(self) -> Iterable[str]:
        return self.starts

    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        starts = self.starts[name]
        if isinstance(entries, slice):
            out = torch.bmm(folded(filled(x, entries, self.num_chunks), starts), self.rows_of(starts, is_transposed))
            out = out.unflatten(0, (starts.shape[0], starts.shape[2], starts.shape[1])).movedim(1, 0).flatten(1, 2)
            return out[:, entries]
        weights = self.all_entries(name)[entries].flatten(0, 1)
        out = torch.bmm(x.movedim(1, 0).flatten(0, 1), weights.mT if is_transposed else weights)
        return out.unflatten(0, (x.shape[1], -1)).movedim(0, 1)

    def rows_of(self, starts: Tensor, is_transposed: bool) -> Tensor:
        """-> (N·r·k i j), where they lie"""
        weights = starts.movedim(2, 1).flatten(0, 2)
        return weights.mT if is_transposed else weights

    def vector(self, name: str, entries: Entries) -> Tensor:
        """-> (r g 1 d)"""
        entered = self.starts[name].flatten(0, 1) if isinstance(entries, slice) else self.all_entries(name)
        return entered[entries].movedim(0, 1)

    def all_entries(self, name: str) -> Tensor:
        """The weights before each chunk and after the last.  -> (n+1 r i j), vectors (n+1 r 1 d)"""
        starts = self.starts[name].flatten(0, 1)
        return torch.cat((starts, self.last.weights[name].reshape(1, *starts.shape[1:])))

    def materialise(self, name: str) -> Tensor:
        """-> (r n+1 ...)"""
        starts, last = self.starts[name].flatten(0, 1).movedim(0, 1), self.last.weights[name].unsqueeze(1)
        return torch.cat((starts.reshape(*starts.shape[:2], *last.shape[2:]), last), dim=1)

    def entry(self, index: int) -> Weights:
        if index == self.num_chunks:
            return self.last.weights
        last = self.last.weights
        return {name: w.flatten(0, 1)[index].reshape(last[name].shape) for name, w in self.starts.items()}

    def finish(self) -> Carry:
        return self.last


@record
class ListedBlock(Block):
    """Blocks of one chunk that may have been read on the way; for whoever looks at them again they are put together."""

    each: list[Weights]  # the weights that each chunk begins with (r ...)
    last: Carry
    reads: Tensor | None  # (r n c d)

    @property
    def num_chunks(self) -> int:
        return len(self.each)

    @property
    def names(self) -> Iterable[str]:
        return self.each[0]

    @property
    def together(self) -> StartsBlock:
        starts = {name: torch.stack([weights[name] for weights in self.each]) for name in self.names}
        starts = {name: w if w.ndim == 4 else w.unsqueeze(2) for name, w in starts.items()}  # vectors as one row
        return StartsBlock({name: w.unsqueeze(1) for name, w in starts.items()}, self.last)

    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        return self.together.product(name, x, entries, is_transposed)

    def vector(self, name: str, entries: Entries) -> Tensor:
        return self.together.vector(name, entries)

    def materialise(self, name: str) -> Tensor:
        return self.together.materialise(name)

    def entry(self, index: int) -> Weights:
        return self.last.weights if index == self.num_chunks else self.each[index]

    def finish(self) -> Carry:
        return self.last


def filled(x: Tensor, entries: slice, num_chunks: int) -> Tensor:
    """Groups for every chunk, with zeros for those that are not asked for.  (r g ...) -> (r n ...)"""
    before, after = entries.start, num_chunks - entries.stop
    return F.pad(x, (0, 0, 0, 0, before, after)) if before or after else x


def folded(x: Tensor, starts: Tensor) -> Tensor:
    """Groups of queries beside the weights they read.  x: (r N·k c i), starts: (N k r i j) -> (N·r·k c i)"""
    return x.unflatten(1, (starts.shape[0], starts.shape[1])).movedim(1, 0).flatten(0, 2)


@record
class FoldedBlock(Block):
    """Blocks of several chunks: one block whose rows are those of all of them, (T·r)."""

    inner: FactoredBlock
    last: Carry
    num_blocks: int

    @property
    def num_chunks(self) -> int:
        return self.inner.num_chunks * self.num_blocks

    @property
    def names(self) -> Iterable[str]:
        return self.inner.names

    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        if not isinstance(entries, slice):
            raise TypeError("blocks of several chunks are read by groups as long as chunks")
        of_all = filled(x, entries, self.num_chunks)
        by_block = of_all.unflatten(1, (self.num_blocks, -1)).movedim(1, 0).flatten(0, 1)
        out = self.inner.product(name, by_block, slice(0, self.inner.num_chunks), is_transposed)
        return self.unfolded(out)[:, entries]

    def unfolded(self, x: Tensor) -> Tensor:
        """(T·r b ...) -> (r T·b ...)"""
        return x.unflatten(0, (self.num_blocks, -1)).movedim(0, 1).flatten(1, 2)

    def vector(self, name: str, entries: Entries) -> Tensor:
        """-> (r g 1 d)"""
        return self.before(name)[:, entries].unsqueeze(2)

    def before(self, name: str) -> Tensor:
        """The weights before each chunk.  -> (r n ...)"""
        return self.unfolded(self.inner.materialise(name)[:, : self.inner.num_chunks])

    def materialise(self, name: str) -> Tensor:
        """-> (r n+1 ...)"""
        return torch.cat((self.before(name), self.last.weights[name].unsqueeze(1)), dim=1)

    def finish(self) -> Carry:
        return self.last
