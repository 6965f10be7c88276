"""One call of a memory: which tokens it stores and reads when, block by block, in memory bounded by a span of blocks.

A call goes on where the last one stopped, at any token; a long call is cut into spans that are projected (and, in
training, recomputed) one after another. So pieces of any lengths give what one call gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.engine import Engine
from titans_pytorch.fast_weights.inner_gradient import plain_autograd_works
from titans_pytorch.fast_weights.interface import Block, Carry, Residual
from titans_pytorch.memory.convolution import Tails
from titans_pytorch.memory.projections import Projected, Projections, StoredTokens
from titans_pytorch.memory.reading import Reader
from titans_pytorch.memory.recompute import recomputed
from titans_pytorch.memory.schedule import BlockPlan, Layout, plan_blocks
from titans_pytorch.memory.state import ReadingGroup, Updates

SPAN_TOKENS = 4096
"""Tokens (of all rows together) that are projected at once"""

SPAN_ELEMENTS = 2**26
KEPT_ELEMENTS = 2**28
"""Numbers that training keeps for its backward pass: of a span, and of a call (1 GB in float32); a call that would keep
more keeps only what is carried between spans and computes the rest again"""

BLOCK_ELEMENTS = 2**26
"""Numbers in the blocks of a call that are kept for a next layer's weight residual rather than made again"""


class Stored(NamedTuple):
    """Everything to be stored, as two parts in time that are only joined where they are used."""

    waiting: StoredTokens
    new: StoredTokens

    def select(self, start: int, stop: int) -> StoredTokens:
        """Tokens start..stop, counted from the first that waits."""
        num_waiting = self.waiting.keys.shape[1]

        def part(waiting: Tensor, new: Tensor) -> Tensor:
            before, after = waiting[:, start:stop], new[:, max(start - num_waiting, 0) : max(stop - num_waiting, 0)]
            return after if before.shape[1] == 0 else torch.cat((before, after), dim=1)

        keys = part(self.waiting.keys, self.new.keys)
        same = self.new.values is self.new.keys
        values = keys if same else part(self.waiting.values, self.new.values)
        if self.waiting.is_stored is None and self.new.is_stored is None:
            return StoredTokens(keys, values, None)
        masks = (
            torch.ones(t.keys.shape[:2], dtype=torch.bool, device=keys.device) if t.is_stored is None else t.is_stored
            for t in (self.waiting, self.new)
        )
        return StoredTokens(keys, values, part(*masks))

    @property
    def num_tokens(self) -> int:
        return self.waiting.keys.shape[1] + self.new.keys.shape[1]


class Pieces:
    """Pieces of a sequence (b t dim) that come one after another; without gradients they need no second copy."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.num_filled = num_tokens, 0
        self.parts: list[Tensor] = []

    def add(self, piece: Tensor) -> None:
        if torch.is_grad_enabled() or piece.shape[1] == self.num_tokens:
            self.parts.append(piece)
            return
        if not self.parts:
            self.parts.append(piece.new_empty(piece.shape[0], self.num_tokens, piece.shape[2]))
        self.parts[0][:, self.num_filled : self.num_filled + piece.shape[1]] = piece
        self.num_filled += piece.shape[1]

    def joined(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=1)


class Surprise(NamedTuple):
    """What was stored how eagerly.  (r n c) each"""

    loss: Tensor
    rates: Tensor


class Step(NamedTuple):
    """One span done."""

    reads: Tensor | None  # (b t dim)
    carry: Carry
    group: ReadingGroup
    tails: Tails
    surprises: list[Surprise]
    blocks: list[Block]


class Outcome(NamedTuple):
    """A whole call done; `blocks` are there or can be had by `replay`."""

    reads: Tensor | None  # (b t dim)
    carry: Carry
    group: ReadingGroup
    tails: Tails
    surprises: list[Surprise]
    blocks: list[Block]
    replay: Callable[[], list[Block]] | None


@dataclass(frozen=True)
class Stream:
    """A memory at one moment of a sequence, with what it needs to go on."""

    projections: Projections
    engine: Engine
    layout: Layout
    renew: Callable[[Carry], Carry]  # what happens to a carry where the base is renewed
    mixes_tokens: bool
    residual: Updates | None
    first_token: int  # position of the first new token
    first_chunk: int  # the first chunk that is not complete

    def run(self, carry: Carry, group: ReadingGroup, tails: Tails, seq: Tensor | None, stored: Stored) -> Outcome:
        """All of a call.  seq: (b t dim), what is read; None: only store"""
        rows = stored.new.keys.shape[0] * self.projections.heads
        spans = self.spans(stored.new.keys.shape[1], rows)
        num_chunks = sum(plan.num_chunks for plans in spans for plan in plans)
        is_training = torch.is_grad_enabled() and plain_autograd_works()
        recomputes = is_training and num_chunks * self.kept_elements(rows) > KEPT_ELEMENTS
        reads = Pieces(0 if seq is None else seq.shape[1])
        surprises: list[Surprise] = []
        blocks: list[Block] = []
        num_blocks = sum(plan.num_chunks > 0 for plans in spans for plan in plans)
        has_small_blocks = num_chunks * rows * self.engine.block_elements(self.writes_per_chunk) <= BLOCK_ELEMENTS
        keeps_blocks = num_blocks <= 1 or (torch.is_grad_enabled() and (has_small_blocks or not recomputes))
        replay = (
            None if keeps_blocks else partial(self.all_blocks, carry, tails, stored, spans, torch.is_grad_enabled())
        )
        step = self.recomputed_step() if recomputes else self.step
        previous = None if self.residual is None else self.residual.blocks
        for plans in spans:
            read, carry, group, tails, surprise, done = step(
                carry, group, tails, seq, stored, previous, plans, keeps_blocks
            )
            if read is not None:
                reads.add(read)
            surprises.extend(surprise)
            blocks.extend(done)
        joined = None if seq is None else reads.joined()
        return Outcome(joined, carry, group, tails, surprises, blocks, replay)

    def all_blocks(
        self, carry: Carry, tails: Tails, stored: Stored, spans: list[list[BlockPlan]], is_differentiable: bool
    ) -> list[Block]:
        """Store once more, for somebody who wants to look at the weights on the way."""
        blocks: list[Block] = []
        previous = None if self.residual is None else self.residual.blocks
        run = self.recomputed_step() if is_differentiable and plain_autograd_works() else self.step
        with torch.set_grad_enabled(is_differentiable):
            for plans in spans:
                step = run(carry, ReadingGroup(None, None), tails, None, stored, previous, plans, True)
                carry, tails = step.carry, step.tails
                blocks.extend(step.blocks)
        return blocks

    def recomputed_step(self) -> Callable[..., Step]:
        """`step`, of which only what goes in and what comes out is kept for the backward pass."""
        parameters = [p for p in self.projections.parameters() if p.requires_grad]
        return partial(recomputed, self.step, parameters=parameters)

    @property
    def writes_per_chunk(self) -> int:
        return self.layout.store_chunk * self.projections.num_kv_per_token

    def kept_elements(self, rows: int) -> int:
        """What training keeps of one chunk."""
        return rows * self.engine.kept_elements(self.writes_per_chunk)

    def spans(self, num_tokens: int, rows: int) -> list[list[BlockPlan]]:
        """All blocks of a call, in runs of about as many tokens as are projected at once."""
        chunk = self.layout.store_chunk
        most = self.engine.block_chunks(rows, self.writes_per_chunk)
        longest = max(1, min(SPAN_TOKENS // (rows * chunk), SPAN_ELEMENTS // self.kept_elements(rows)))
        spans: list[list[BlockPlan]] = [[]]
        for plan in plan_blocks(self.layout, self.first_token, num_tokens, self.first_chunk, most):
            if spans[-1] and plan.num_chunks and sum(p.num_chunks for p in (*spans[-1], plan)) > longest:
                spans.append([])
            spans[-1].append(plan)
        return spans

    def step(
        self,
        carry: Carry,
        group: ReadingGroup,
        tails: Tails,
        seq: Tensor | None,
        stored: Stored,
        previous: list[Block] | None,
        plans: list[BlockPlan],
        keeps_blocks: bool,
    ) -> Step:
        """One span: project, then store and read block by block."""
        dtype = next(iter(carry.weights.values())).dtype
        layer = None if self.residual is None or previous is None else self.residual.with_blocks(previous)
        first, num_chunks = plans[0].first_chunk, sum(plan.num_chunks for plan in plans)
        chunk, start = self.layout.store_chunk, plans[0].first_chunk - self.first_chunk
        tokens = stored.select(start * chunk, (start + num_chunks) * chunk)
        projected = self.projections.project_writes(tokens, chunk, dtype, tails) if num_chunks else None
        reader = None if seq is None else self.reader(seq, group, tails.queries, plans, dtype)
        blocks, losses = [], []
        for plan in plans:
            if projected is None or plan.num_chunks == 0:
                block = self.engine.at_rest(carry)
            else:
                writes = projected.writes.select(
                    slice(plan.first_chunk - first, plan.first_chunk - first + plan.num_chunks)
                )
                residual = None if layer is None else Residual(layer, plan.first_chunk)
                block, loss = self.engine.store(carry, writes, residual)
                losses.append(loss)
                if keeps_blocks:
                    blocks.append(block)
            if reader is not None:
                reader.read(block, plan)
            carry = block.finish()
            if plan.renews_base:
                carry = self.renew(carry)
        surprises = [] if projected is None else [surprise_of(projected, torch.cat(losses, dim=1))]
        reads, group = (None, group) if reader is None else reader.finish()
        tails = tails if projected is None else projected.tails
        tails = tails if reader is None else tails._replace(queries=reader.tail)
        return Step(reads, carry, group, tails, surprises, blocks)

    def reader(
        self, seq: Tensor, group: ReadingGroup, tail: Tensor | None, plans: list[BlockPlan], dtype: torch.dtype
    ) -> Reader:
        """Whoever reads the span's tokens; the first span of a call begins with a group that may have begun earlier."""
        first_group = self.first_token // self.layout.retrieve_chunk
        is_first = plans[0].first_chunk == self.first_chunk
        reader = Reader(self.projections, self.engine, self.layout, self.mixes_tokens, self.first_token, group, tail)
        reader.begin(seq, first_group if is_first else plans[0].first_group, plans[-1].last_group, dtype)
        if is_first:
            reader.read_older(plans)
        return reader


def surprise_of(projected: Projected, loss: Tensor) -> Surprise:
    """Loss and rate (the mean of those of all parameters) of every write, where it stood; 0 where nothing is stored."""
    rates = (
        projected.writes.rates[0] if len(projected.writes.rates) == 1 else torch.stack(projected.writes.rates).mean(0)
    )
    if projected.order is not None:
        back = projected.order.argsort(dim=-1)
        loss, rates = loss.gather(2, back), rates.gather(2, back)
    return Surprise(loss if projected.is_stored is None else torch.where(projected.is_stored, loss, 0.0), rates)
