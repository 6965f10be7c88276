"""Many equal blocks in a row as one: what they hold is read and built for all of them at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.blocks.factored import FactoredBlock
from titans_pytorch.fast_weights.blocks.still import StillBlock
from titans_pytorch.fast_weights.interface import Block, Carry, Entries, Unrolled, Weights, record


@record
class StartsBlock(Block):
    """Blocks of one chunk, each by the weights it begins with."""

    starts: Weights  # (N k r i j), vectors (N k r 1 d), of n = N k chunks; rows lie before k
    last: Carry
    reads: Tensor | None = None  # (r n c d)

    @property
    def num_chunks(self) -> int:
        n, k = next(iter(self.starts.values())).shape[:2]
        return n * k

    @property
    def names(self) -> Iterable[str]:
        return self.starts

    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        if isinstance(entries, slice):
            block, x, of_block, back = self.unrolled(x, entries)
            return back(block.product(name, x, of_block, is_transposed))
        weights = self.all_entries(name)[entries].flatten(0, 1)
        out = torch.bmm(x.movedim(1, 0).flatten(0, 1), weights.mT if is_transposed else weights)
        return out.unflatten(0, (x.shape[1], -1)).movedim(0, 1)

    def unrolled(self, x: Tensor, entries: Entries) -> Unrolled:
        """With a row for every chunk, N·r·k in all."""
        if not isinstance(entries, slice):
            return super().unrolled(x, entries)
        n, k, r = next(iter(self.starts.values())).shape[:3]
        rows = filled(x, entries, self.num_chunks).unflatten(1, (n, k)).movedim(1, 0).flatten(0, 2).unsqueeze(1)
        still = Carry({}, {name: starts.movedim(2, 1).flatten(0, 2) for name, starts in self.starts.items()}, {}, {})

        def back(out: Tensor) -> Tensor:
            return out.squeeze(1).unflatten(0, (n, r, k)).movedim(1, 0).flatten(1, 2)[:, entries]

        return Unrolled(StillBlock(still), rows, slice(0, 1), back)

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


@record
class ReadBlock(Block):
    """Blocks that were read on the way and whose weights are gone, as nobody would look at them again."""

    num_blocks: int
    last: Carry
    reads: Tensor | None  # (r n c d)

    @property
    def num_chunks(self) -> int:
        return self.num_blocks

    @property
    def names(self) -> Iterable[str]:
        return self.last.weights

    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        raise RuntimeError("the weights on the way are not kept: they were read where they were made")

    def materialise(self, name: str) -> Tensor:
        raise RuntimeError("the weights on the way are not kept: they were read where they were made")

    def finish(self) -> Carry:
        return self.last


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
        block, x, of_block, back = self.unrolled(x, entries)
        return back(block.product(name, x, of_block, is_transposed))

    def unrolled(self, x: Tensor, entries: Entries) -> Unrolled:
        """With the rows of all blocks."""
        if not isinstance(entries, slice):
            raise TypeError("blocks of several chunks are read by groups as long as chunks")
        of_all = filled(x, entries, self.num_chunks)
        by_block = of_all.unflatten(1, (self.num_blocks, -1)).movedim(1, 0).flatten(0, 1)
        of_inner = slice(0, self.inner.num_chunks)
        return Unrolled(self.inner, by_block, of_inner, lambda out: self.unfolded(out)[:, entries])

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
