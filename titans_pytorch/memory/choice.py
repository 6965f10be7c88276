"""How long blocks are and which way they are stored: what is cheapest, of the ways that a memory has."""

from __future__ import annotations

import math
from typing import NamedTuple

from titans_pytorch.memory.costs import Costs, Sizes, solved_writes
from titans_pytorch.memory.layout import Layout


class Choice(NamedTuple):
    """How long blocks are, and which way they are stored."""

    chunks: int  # of a block, at most
    why: str = ""  # that many
    longest_series: int = 1  # how many blocks go through one loop, or are stored at once; 1: block by block
    at_once: bool = False  # those that are surprised at one base, as far as there is no loop between bases
    has_loop: bool = False  # where a base is renewed
    num_places: int | None = None  # renewals that a loop reads together while it runs; None: all, after it
    solved_writes: int = 0  # of a block whose renewals, after every chunk, are solved for; 0: they are not

    @property
    def are_equal(self) -> bool:
        """Whether blocks are to be equally long, as those that are stored together."""
        return self.longest_series > 1

    def explain(self) -> str:
        """Which way, and why, in half a sentence."""
        way = "block by block" if self.longest_series == 1 else f"up to {self.longest_series} blocks in one loop"
        way += ", all at once where they share a base" if self.at_once else ""
        way += f", {self.num_places} renewal(s) read together" if self.num_places is not None else ""
        way = "renewals solved for, in all blocks of a span at once" if self.solved_writes else way
        return f"{way}; {self.why}" if self.why else way


def choose(
    layout: Layout,
    sizes: Sizes,
    costs: Costs,
    rows: int,
    span_chunks: int,
    *,
    has_grad: bool,
    may_loop: bool,
    may_solve: bool,
) -> Choice:
    """The way of a call.

    span_chunks: how many are projected together; has_grad: a backward pass may follow; may_loop, may_solve: whether
    blocks may go through one loop, renewals be solved for
    """
    solved, not_solved = solved_writes(sizes, costs, may_solve and layout.batch == layout.store_chunk)
    if solved:
        why = "half a key's width is best for a triangular system"
        return Choice(solved // sizes.writes_per_chunk, why, max(2, span_chunks), solved_writes=solved)
    most, why = block_chunks(sizes, rows, costs)
    at_once = costs.at_once and sizes.can_fold and layout.retrieve_chunk == layout.store_chunk
    has_loop = sizes.has_loop and may_loop and (layout.batch or 0) <= costs.loop_tokens
    fit_together = costs.series_elements // (rows * sizes.num_elements * sizes.num_slots)
    if has_loop and fit_together > 1 and 0 < (layout.batch or 0) <= costs.loop_chunks * layout.store_chunk:
        most, why = 1, "in a loop each chunk of so short a batch is moved by itself"
    has_loop = has_loop and (most == 1 or sizes.representation != "channels")  # which is written for single chunks
    longest_series, num_places = max(1, fit_together) if has_loop or at_once else 1, None
    if has_loop and not has_grad and most == 1:
        num_places = renewals_together(layout, costs.read_elements // (rows * sizes.num_elements))
    if num_places is not None:  # only tokens have to fit
        longest_series = max(longest_series, span_chunks)
    if longest_series == 1:
        at_once, has_loop = False, False
    why = f"{why}; {not_solved}" if not_solved else why
    return Choice(most, why, longest_series, at_once, has_loop, num_places)


def renewals_together(layout: Layout, num_chunks: int) -> int | None:
    """How many renewals have at most so many chunks, at least one; None: the base is never renewed."""
    return None if layout.batch is None else max(1, num_chunks * layout.store_chunk // layout.batch)


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
