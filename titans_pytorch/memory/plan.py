"""A call is planned before it runs: which tokens are stored and read in which block; nothing but whole numbers.

Positions are 1-based: token i is the i-th since the state was fresh. Chunk k, from 0, holds tokens k c + 1 .. (k+1) c.
Token i belongs to the reading group i // c_r and reads the weights after (i // c_r) c_r // c_s chunks, so a token that
completes a chunk already reads it, and reads lag one token behind writes.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from titans_pytorch.memory.costs import COSTS, Costs, Sizes, held_elements, kept_elements, solved_writes


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


class CallPlan(NamedTuple):
    """How one call is run."""

    spans: tuple[tuple[BlockPlan, ...], ...]  # blocks that are projected, and recomputed, together
    recomputes: bool  # a span is computed again in the backward pass
    keeps_blocks: bool  # blocks stay for whoever looks at the weights; else they are made again
    longest_series: int = 1  # how many blocks go through one loop, or are stored at once; 1: block by block
    at_once: bool = False  # those that are surprised at one base, as far as there is no loop between bases
    has_loop: bool = False  # where a base is renewed
    num_places: int | None = None  # renewals that a loop reads together while it runs; None: all, after it
    why: str = ""  # blocks are as long as they are
    solves: bool = False  # the base is renewed after every chunk of a block, and that is solved for

    @property
    def num_chunks(self) -> int:
        return sum(block.num_chunks for span in self.spans for block in span)

    def explain(self) -> str:
        """What will be done, in a sentence."""
        num_blocks = sum(block.num_chunks > 0 for span in self.spans for block in span)
        way = "block by block" if self.longest_series == 1 else f"up to {self.longest_series} blocks in one loop"
        way += ", all at once where they share a base" if self.at_once else ""
        way += f", {self.num_places} renewal(s) read together" if self.num_places is not None else ""
        way = "renewals solved for, in all blocks of a span at once" if self.solves else way
        return (
            f"{self.num_chunks} chunk(s) in {num_blocks} block(s), {len(self.spans)} span(s), "
            f"{'computed again in a backward pass' if self.recomputes else 'kept if a backward pass may come'}; "
            f"weights {'kept' if self.keeps_blocks else 'made again'} for whoever looks at them; "
            f"{way}{f'; {self.why}' if self.why else ''}"
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
    at_once = costs.at_once and sizes.can_fold and layout.retrieve_chunk == layout.store_chunk
    has_loop = sizes.has_loop and may_loop and (layout.batch or 0) <= costs.loop_tokens
    fit_together = costs.series_elements // (rows * sizes.num_elements * sizes.num_slots)
    most, why = block_chunks(sizes, rows, costs)
    if has_loop and fit_together > 1 and 0 < (layout.batch or 0) <= costs.loop_chunks * layout.store_chunk:
        most, why = 1, "in a loop each chunk of so short a batch is moved by itself"
    has_loop = has_loop and (most == 1 or sizes.representation != "channels")  # which is written for single chunks
    longest_series = max(1, fit_together) if has_loop or at_once else 1
    num_places = None
    if has_loop and not has_grad and most == 1:
        num_places = renewals_together(layout, costs.read_elements // (rows * sizes.num_elements))
    if num_places is not None:  # only tokens have to fit
        longest_series = max(longest_series, longest)
    is_renewed = may_solve and layout.batch == layout.store_chunk
    solved, not_solved = solved_writes(sizes, costs) if is_renewed else (0, "")
    why = f"{why}; {not_solved}" if not_solved else why
    if solved:  # the base is renewed inside of blocks, but for those of a single chunk
        most, why = solved // sizes.writes_per_chunk, "half a key's width is best for a triangular system"
        has_loop, at_once, num_places, longest_series = False, False, None, num_tokens
        kept += 8 * rows * solved
        layout = layout._replace(batch=None)
    blocks = plan_blocks(layout, first_token, num_tokens, first_chunk, most, longest_series > 1)
    blocks = [block._replace(renews_base=block.num_chunks == 1) for block in blocks] if solved else blocks
    num_chunks, num_blocks = sum(b.num_chunks for b in blocks), sum(b.num_chunks > 0 for b in blocks)
    recomputes = has_grad and can_recompute and num_chunks * kept > costs.kept_elements
    is_small = num_chunks * rows * held_elements(sizes) <= costs.block_elements
    keeps_blocks = num_blocks <= 1 or (has_grad and (is_small or not recomputes))
    spans, is_serial = in_spans(blocks, longest), longest_series > 1
    at_once, has_loop = at_once and is_serial, has_loop and is_serial
    return CallPlan(spans, recomputes, keeps_blocks, longest_series, at_once, has_loop, num_places, why, solved > 0)


def renewals_together(layout: Layout, num_chunks: int) -> int | None:
    """How many renewals have at most so many chunks, at least one; None: the base is never renewed."""
    return None if layout.batch is None else max(1, num_chunks * layout.store_chunk // layout.batch)


def in_spans(blocks: list[BlockPlan], longest: int) -> tuple[tuple[BlockPlan, ...], ...]:
    """Runs of blocks of at most so many chunks, if one block has not more."""
    spans: list[list[BlockPlan]] = [[]]
    for block in blocks:
        if spans[-1] and block.num_chunks and sum(b.num_chunks for b in (*spans[-1], block)) > longest:
            spans.append([])
        spans[-1].append(block)
    return tuple(map(tuple, spans))


def block_chunks(sizes: Sizes, rows: int, costs: Costs) -> tuple[int, str]:
    """How many chunks make the cheapest block, and why.

    Products over pairs of writes grow with its square; the cost of a block itself (starting it, carrying the weights)
    is shared by its writes. Long chunks are best alone: they need not read and carry the momentum through products.
    """
    elements, writes = rows * sizes.num_elements, max(sizes.writes_per_chunk, 1)
    block = costs.block_overhead + costs.carry_cost * elements
    if sizes.representation == "built":
        return max(1, costs.built_elements // elements), "weights are built, as many as fit"
    if sizes.representation == "channels":  # every group of queries scales all factors of its block for itself
        best = round(math.sqrt(block / (costs.channel_cost * rows * sizes.num_channels * writes)))
        fewest, most = costs.channel_chunks
        return (1 if best < fewest else min(best, most)), "each group of queries scales the factors of its block"
    per_pair = 4 * rows * sizes.width
    best = max(2, round(math.sqrt(block / max(per_pair, 1)) / writes))
    together = block / best + writes * (22 * elements + best * writes * per_pair)
    alone = block + 14 * writes * elements
    if alone < together:
        return 1, f"{best} chunks to a block would cost {together / alone:.1f} times as much"
    return best, f"one chunk to a block would cost {alone / together:.1f} times as much"


def plan_blocks(
    layout: Layout, first_token: int, num_tokens: int, first_chunk: int, max_chunks: int, are_equal: bool = False
) -> list[BlockPlan]:
    """All blocks of a call.  The last one stores nothing: it serves what reads the weights as they are at the end.

    first_token: position of the call's first token; first_chunk: the first chunk that was not yet complete before it;
    are_equal: whether blocks are equally long but for the last of a batch, else only about equally
    """
    end = (first_token + num_tokens - 1) // layout.store_chunk
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
