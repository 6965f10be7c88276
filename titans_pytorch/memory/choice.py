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
    most, why = block_chunks(sizes, rows, costs, has_grad=has_grad)
    fit_together = costs.series_elements // (rows * sizes.num_elements * sizes.num_slots)
    at_once = costs.at_once and sizes.can_fold and layout.retrieve_chunk == layout.store_chunk
    longest_series, num_places = max(1, fit_together) if at_once else 1, None
    batch = layout.batch or 0  # where no base is ever renewed
    has_loop = sizes.has_loop and may_loop and batch <= costs.loop_tokens and (batch > 0 or has_grad or at_once)
    if has_loop:
        is_alone = fit_together > 1 and 0 < batch <= costs.loop_chunks * layout.store_chunk
        each = 1 if is_alone else most
        num = loop_blocks(batch, each * layout.store_chunk, costs, fit_together, has_grad=has_grad)
        if batch > 0 and each == 1 and not has_grad:  # only tokens have to fit
            num = max(num, span_chunks)
            num_places = max(1, costs.read_elements // (rows * sizes.num_elements) * layout.store_chunk // batch)
        has_loop = num > 0 and (each == 1 or sizes.representation != "channels")  # which is written for single chunks
        if has_loop:
            longest_series = max(longest_series, num)
            most, why = (1, "in a loop each chunk of so short a batch is moved by itself") if is_alone else (most, why)
    if longest_series == 1:
        at_once, has_loop = False, False
    why = f"{why}; {not_solved}" if not_solved else why
    return Choice(most, why, longest_series, at_once, has_loop, num_places)


def loop_blocks(batch: int, block: int, costs: Costs, fit_together: int, *, has_grad: bool) -> int:
    """How many blocks go through one loop; 0: none, as there would be too few.

    batch, block: tokens of a renewal, 0: there is none, and of a block; fit_together: blocks whose slots fit
    """
    fewest = costs.loop_renewals * -(-batch // block) if batch else costs.loop_blocks
    if has_grad and 1 < fit_together < fewest and block == batch <= costs.wide_loop_tokens:
        return fewest
    return fit_together if fit_together >= (fewest if has_grad else 2) else 0


def block_chunks(sizes: Sizes, rows: int, costs: Costs, *, has_grad: bool) -> tuple[int, str]:
    """How many chunks make the cheapest block, and why.

    Products over pairs of writes grow with its square; the cost of a block itself (starting it, carrying the weights)
    is shared by its writes. Long chunks are best alone: they need not read and carry the momentum through products.
    """
    elements, writes = rows * sizes.num_elements, max(sizes.writes_per_chunk, 1)
    block = costs.block_overhead + costs.carry_cost * elements
    if sizes.representation == "built":
        room = costs.built_in_training if has_grad else costs.built_elements
        return max(1, room // elements), "weights are built, as many as fit"
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
