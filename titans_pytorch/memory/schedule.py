"""Which tokens are stored and which are read in which block; nothing but whole numbers.

Positions are 1-based: token i is the i-th since the state was fresh. Chunk k, from 0, holds tokens k c + 1 .. (k+1) c.
Token i belongs to the reading group i // c_r and reads the weights after (i // c_r) c_r // c_s chunks, so a token that
completes a chunk already reads it, and reads lag one token behind writes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple


class Layout(NamedTuple):
    """How a memory cuts time."""

    retrieve_chunk: int
    store_chunk: int
    batch: int | None  # tokens after which the base is renewed

    def weight_index(self, group: int) -> int:
        """After how many chunks the weights are that a group reads."""
        return group * self.retrieve_chunk // self.store_chunk

    def first_group(self, chunks: int) -> int:
        """The first group that reads weights of at least so many chunks."""
        return -(-chunks * self.store_chunk // self.retrieve_chunk)


class BlockPlan(NamedTuple):
    """Chunks stored together and the groups that read the weights before each of them."""

    first_chunk: int
    num_chunks: int
    first_group: int
    last_group: int  # one past the last
    renews_base: bool

    @property
    def num_groups(self) -> int:
        return self.last_group - self.first_group


def plan_blocks(
    layout: Layout, first_token: int, num_tokens: int, first_chunk: int, max_chunks: int
) -> list[BlockPlan]:
    """All blocks of a call.  The last one stores nothing: it serves what reads the weights as they are at the end.

    first_token: position of the call's first token; first_chunk: the first chunk that was not yet complete before it
    """
    end = (first_token + num_tokens - 1) // layout.store_chunk
    first_group = first_token // layout.retrieve_chunk
    last_group = (first_token + num_tokens - 1) // layout.retrieve_chunk + 1

    def block(chunk: int, num_chunks: int, last: int, renews: bool) -> BlockPlan:
        first = min(max(layout.first_group(chunk), first_group), last)
        return BlockPlan(chunk, num_chunks, first, last, renews)

    blocks = []
    for start, stop, renews in batches(layout, first_chunk, end):
        for chunk, num_chunks in even(start, stop, max_chunks):
            is_last = chunk + num_chunks == stop
            last = max(min(layout.first_group(chunk + num_chunks), last_group), first_group)
            blocks.append(block(chunk, num_chunks, last, renews and is_last))
    return [*blocks, block(end, 0, last_group, False)]


def batches(layout: Layout, start: int, end: int) -> list[tuple[int, int, bool]]:
    """The chunks start..end cut where the base is renewed: (first, one past the last, whether it is renewed then)."""
    if layout.batch is None:
        return [(start, end, False)] if end > start else []
    size = layout.batch // layout.store_chunk
    edges = [start, *range((start // size + 1) * size, end, size), end] if end > start else []
    return [(a, b, b % size == 0) for a, b in pairwise(edges)]


def even(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """start..stop in as few runs of at most `most` as possible, all about equally long: (first, how many)."""
    num_runs = -(-(stop - start) // most)
    edges = [start + (stop - start) * run // num_runs for run in range(num_runs + 1)]
    return [(a, b - a) for a, b in pairwise(edges)]
