"""A call is planned before it runs: which tokens are stored and read in which block; nothing but whole numbers.

Positions are 1-based: token i is the i-th since the state was fresh. Chunk k, from 0, holds tokens k c + 1 .. (k+1) c.
Token i belongs to the reading group i // c_r and reads the weights after (i // c_r) c_r // c_s chunks, so a token that
completes a chunk already reads it, and reads lag one token behind writes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from titans_pytorch.memory.choice import Choice, choose
from titans_pytorch.memory.costs import COSTS, Sizes, held_elements, kept_elements
from titans_pytorch.memory.layout import Layout


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


class CallPlan(NamedTuple):
    """How one call is run."""

    spans: tuple[tuple[BlockPlan, ...], ...]  # blocks that are projected, and recomputed, together
    recomputes: bool  # a span is computed again in the backward pass
    keeps_blocks: bool  # blocks stay for whoever looks at the weights; else they are made again
    choice: Choice
    noted: int = 0  # numbers of each span that are kept all the same where it is computed again, at most

    @property
    def num_chunks(self) -> int:
        return sum(block.num_chunks for span in self.spans for block in span)

    def explain(self) -> str:
        """What will be done, in a sentence."""
        num_blocks = sum(block.num_chunks > 0 for span in self.spans for block in span)
        return (
            f"{self.num_chunks} chunk(s) in {num_blocks} block(s), {len(self.spans)} span(s), "
            f"{'computed again in a backward pass' if self.recomputes else 'kept if a backward pass may come'}; "
            f"weights {'kept' if self.keeps_blocks else 'made again'} for whoever looks at them; "
            f"{self.choice.explain()}"
        )


def plan_call(
    layout: Layout,
    sizes: Sizes,
    *,
    batch: int,
    first_token: int,
    num_tokens: int,
    first_chunk: int,
    has_grad: bool,
    can_recompute: bool,
    may_loop: bool = False,
    may_solve: bool = False,
    device: str = "cpu",
) -> CallPlan:
    """The plan of a call.

    first_token: position of its first token; first_chunk: the first chunk that was not yet complete before it;
    has_grad: a backward pass may follow; can_recompute: in which spans may be computed again;
    may_loop, may_solve: whether blocks may go through one loop, renewals be solved for; device: kind of device
    """
    costs = COSTS.get(device, COSTS["cpu"])
    rows = batch * sizes.heads
    kept = rows * kept_elements(sizes, costs)
    longest = max(1, min(costs.span_tokens // (rows * layout.store_chunk), costs.span_elements // max(kept, 1)))
    choice = choose(layout, sizes, costs, rows, longest, has_grad=has_grad, may_loop=may_loop, may_solve=may_solve)
    if choice.solved_writes:  # the base is renewed inside of blocks, but for those of a single chunk
        layout, kept = layout._replace(batch=None), kept + 8 * rows * choice.solved_writes
    blocks = plan_blocks(layout, first_token, num_tokens, first_chunk, choice.chunks, choice.are_equal)
    if choice.solved_writes:
        blocks = [block._replace(renews_base=block.num_chunks == 1) for block in blocks]
    num_chunks, num_blocks = sum(b.num_chunks for b in blocks), sum(b.num_chunks > 0 for b in blocks)
    recomputes = has_grad and can_recompute and num_chunks * kept > costs.kept_elements
    is_small = num_chunks * rows * held_elements(sizes) <= costs.block_elements
    keeps_blocks = num_blocks <= 1 or (has_grad and (is_small or not recomputes))
    spans = in_spans(blocks, longest)
    return CallPlan(spans, recomputes, keeps_blocks, choice, costs.noted_elements // len(spans) if recomputes else 0)


def in_spans(blocks: list[BlockPlan], longest: int) -> tuple[tuple[BlockPlan, ...], ...]:
    """Runs of blocks of at most so many chunks, if one block has not more."""
    spans: list[list[BlockPlan]] = [[]]
    for block in blocks:
        if spans[-1] and block.num_chunks and sum(b.num_chunks for b in (*spans[-1], block)) > longest:
            spans.append([])
        spans[-1].append(block)
    return tuple(map(tuple, spans))


def plan_blocks(
    layout: Layout, first_token: int, num_tokens: int, first_chunk: int, max_chunks: int, are_equal: bool = False
) -> list[BlockPlan]:
    """All blocks of a call.  The last one stores nothing: it serves what reads the weights as they are at the end.

    first_token: position of the call's first token; first_chunk: the first chunk that was not yet complete before it;
    are_equal: whether blocks are equally long but for the last of a batch, else only about equally
    """
    end = (first_token - layout.first + num_tokens) // layout.store_chunk
    first_group = first_token // layout.retrieve_chunk
    last_group = (first_token + num_tokens - 1) // layout.retrieve_chunk + 1

    def block(chunk: int, num_chunks: int, last: int, renews: bool) -> BlockPlan:
        first = min(max(layout.first_group(chunk), first_group), last)
        return BlockPlan(chunk, num_chunks, first, last, renews)

    blocks = []
    for start, stop, renews in batches(layout, first_chunk, end):
        for chunk, num_chunks in (full if are_equal else even)(start, stop, max_chunks):
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


def full(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """start..stop in equal runs, about as long as is best: half to twice of that; if there are none, with a rest."""
    total = stop - start
    sizes = [*range(min(most, total), most // 2, -1), *range(most + 1, 2 * most + 1)]
    size = next((size for size in sizes if total % size == 0), most)
    return [(first, min(size, stop - first)) for first in range(start, stop, size)]
