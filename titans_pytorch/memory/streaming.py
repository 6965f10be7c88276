"""One call of a memory: store and read, block by block, in memory bounded by a span of blocks.

A call goes on where the last one stopped, at any token, and is planned before it runs (`memory.plan`). So pieces of any
lengths give what one call gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.engine import BlockShares, Engine
from titans_pytorch.fast_weights.inner_gradient import plain_autograd_works
from titans_pytorch.fast_weights.interface import Block, Carry, Residual
from titans_pytorch.memory.convolution import Tails
from titans_pytorch.memory.pieces import Pieces, Stored
from titans_pytorch.memory.plan import BlockPlan, CallPlan, Layout
from titans_pytorch.memory.projections import ProjectedWrites, Projections
from titans_pytorch.memory.reading import SpanReader
from titans_pytorch.memory.recompute import recomputed
from titans_pytorch.memory.state import ReadingGroup, Updates


class Report(NamedTuple):
    """How badly each write was predicted, and how eagerly it was stored.  (r n c) each"""

    loss: Tensor
    rates: Tensor


class Moment(NamedTuple):
    """A memory between two spans: all that the tokens to come need."""

    carry: Carry
    group: ReadingGroup
    tails: Tails


class SpanResult(NamedTuple):
    """What one span gives."""

    reads: Tensor | None  # (b t dim)
    moment: Moment
    report: Report | None
    blocks: list[Block]


class CallResult(NamedTuple):
    """What a whole call gives; `blocks` are there or can be had by `replay`."""

    reads: Tensor | None  # (b t dim)
    moment: Moment
    reports: list[Report]
    blocks: list[Block]
    replay: Callable[[], list[Block]] | None


RunSpan = Callable[..., SpanResult]


@dataclass(frozen=True)
class Stream:
    """A memory at one moment of a sequence, with what it needs to go on."""

    layers: Projections  # from tokens to writes and queries, from reads to tokens
    engine: Engine  # from writes to weights, from queries to reads
    renewal: Callable[[int], Callable[[Carry], Carry]]  # of a batch: what happens where the base is renewed
    layout: Layout
    residual: Updates | None  # the weights of the previous memory layer
    first_token: int  # position of the first new token
    first_chunk: int  # the first chunk that is not complete

    def run(self, plan: CallPlan, moment: Moment, seq: Tensor | None, stored: Stored) -> CallResult:
        """All of a call, as planned.  seq: (b t dim), what is read; None: only store"""
        run, previous = self.runner(plan.recomputes), self.previous_blocks
        reads, reports, blocks = Pieces(0 if seq is None else seq.shape[1]), [], []
        begin = moment
        for span in plan.spans:
            result = run(moment, seq, stored, previous, span, plan.keeps_blocks)
            moment = result.moment
            if result.reads is not None:
                reads.add(result.reads)
            reports += [] if result.report is None else [result.report]
            blocks += result.blocks
        replay = None
        if not plan.keeps_blocks:
            replay = partial(self.all_blocks, plan, begin, stored, torch.is_grad_enabled())
        return CallResult(None if seq is None else reads.joined(), moment, reports, blocks, replay)

    def all_blocks(self, plan: CallPlan, moment: Moment, stored: Stored, is_differentiable: bool) -> list[Block]:
        """Store once more, for somebody who wants to look at the weights on the way."""
        run, previous = self.runner(is_differentiable and plain_autograd_works()), self.previous_blocks
        blocks: list[Block] = []
        with torch.set_grad_enabled(is_differentiable):
            for span in plan.spans:
                result = run(moment, None, stored, previous, span, True)
                moment = result.moment
                blocks += result.blocks
        return blocks

    def runner(self, recomputes: bool) -> RunSpan:
        """How a span is run: as it is, or so that only what goes in and comes out is kept for the backward pass."""
        if not recomputes:
            return self.run_span
        return partial(recomputed, self.run_span, parameters=[p for p in self.layers.parameters() if p.requires_grad])

    @property
    def previous_blocks(self) -> list[Block] | None:
        """The blocks of the previous layer, an argument of every span: only arguments get gradients when recomputed."""
        return None if self.residual is None else self.residual.blocks

    def run_span(
        self,
        moment: Moment,
        seq: Tensor | None,
        stored: Stored,
        previous: list[Block] | None,
        span: Sequence[BlockPlan],
        keeps_blocks: bool,
    ) -> SpanResult:
        """Project a span, then store and read it block by block."""
        carry, first = moment.carry, span[0].first_chunk
        layer = None if self.residual is None or previous is None else self.residual.with_blocks(previous)
        projected = self.project(stored, span, moment)
        reader = None if seq is None else self.reader(seq, moment, span)
        renew = self.renewal(len(stored.new.keys)) if any(plan.renews_base for plan in span) else None
        shares = self.shares(projected, span)
        blocks, losses = [], []
        for plan in span:
            if projected is None or plan.num_chunks == 0:
                block = self.engine.at_rest(carry)
            else:
                start = plan.first_chunk - first
                writes = projected.writes.select(slice(start, start + plan.num_chunks))
                residual = None if layer is None else Residual(layer, plan.first_chunk)
                block, loss = self.engine.store(carry, writes, residual, next(shares))
                losses.append(loss)
                blocks += [block] if keeps_blocks else []
            if reader is not None:
                reader.read(block, plan)
            carry = block.finish()
            if renew is not None and plan.renews_base:
                carry = renew(carry)
        report = None if projected is None else report_of(projected, torch.cat(losses, dim=1))
        reads, group = (None, moment.group) if reader is None else reader.finish()
        tails = moment.tails if projected is None else projected.tails
        tails = tails if reader is None else tails._replace(queries=reader.tail)
        return SpanResult(reads, Moment(carry, group, tails), report, blocks)

    def project(self, stored: Stored, span: Sequence[BlockPlan], moment: Moment) -> ProjectedWrites | None:
        """The writes of a span's chunks; None: it has none."""
        num_chunks = sum(plan.num_chunks for plan in span)
        if num_chunks == 0:
            return None
        chunk, start = self.layout.store_chunk, span[0].first_chunk - self.first_chunk
        tokens = stored.select(start * chunk, (start + num_chunks) * chunk)
        return self.layers.project_writes(tokens, chunk, dtype_of(moment.carry), moment.tails)

    def shares(self, projected: ProjectedWrites | None, span: Sequence[BlockPlan]) -> Iterator[BlockShares]:
        """What the weights of each block are sums of; they depend on gates alone, so all of them are had at once."""
        if projected is None:
            return iter(())
        sizes = [plan.num_chunks for plan in span if plan.num_chunks]
        return iter(self.engine.shares_of_blocks(projected.writes.gates, sizes))

    def reader(self, seq: Tensor, moment: Moment, span: Sequence[BlockPlan]) -> SpanReader:
        """Whoever reads the span's tokens; the first span of a call begins with a group that may have begun earlier."""
        chunk, is_first = self.layout.retrieve_chunk, span[0].first_chunk == self.first_chunk
        start = 0 if is_first else max(span[0].first_group * chunk - self.first_token, 0)
        stop = min(max(span[-1].last_group * chunk - self.first_token, start), seq.shape[1])
        reader = SpanReader(
            self.layers,
            self.engine,
            self.layout,
            seq[:, start:stop],
            self.first_token + start,
            moment.group,
            moment.tails.queries,
            dtype_of(moment.carry),
        )
        if is_first:
            reader.read_older(span[0].first_group)
        return reader


def dtype_of(carry: Carry) -> torch.dtype:
    """In which a memory's weights are kept."""
    return next(iter(carry.weights.values())).dtype


def report_of(projected: ProjectedWrites, loss: Tensor) -> Report:
    """Loss and rate (the mean of those of all parameters) of every write, where it stood; 0 where nothing is stored."""
    of_all = projected.writes.rates
    rates = of_all.any if of_all.is_shared else torch.stack(list(of_all.each.values())).mean(dim=0)
    if projected.order is not None:
        back = projected.order.argsort(dim=-1)
        loss, rates = loss.gather(2, back), rates.gather(2, back)
    return Report(loss if projected.is_stored is None else torch.where(projected.is_stored, loss, 0.0), rates)
