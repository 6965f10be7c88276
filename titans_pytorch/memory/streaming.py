"""One call of a memory: store and read, block by block, in memory bounded by a span of blocks.

A call goes on where the last one stopped, at any token, and is planned before it runs (`memory.plan`). So pieces of any
lengths give what one call gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from titans_pytorch.fast_weights.engine import BlockSums, Engine
from titans_pytorch.fast_weights.inner_gradient import plain_autograd_works
from titans_pytorch.fast_weights.interface import Block, Carry, Residual, Writes
from titans_pytorch.fast_weights.loop.tables import Series
from titans_pytorch.fast_weights.renewal import Renewal
from titans_pytorch.memory.key_span import KeySpan, Told
from titans_pytorch.memory.layout import Layout
from titans_pytorch.memory.pieces import Pieces, Stored, StoredTokens
from titans_pytorch.memory.plan import BlockPlan, CallPlan
from titans_pytorch.memory.projections import ProjectedWrites, Projections
from titans_pytorch.memory.reading import SpanReader
from titans_pytorch.memory.recent import written
from titans_pytorch.memory.recompute import recomputed
from titans_pytorch.memory.results import CallResult, Moment, SpanResult, report_of
from titans_pytorch.memory.series import SeriesPlan, in_series
from titans_pytorch.memory.state import Updates

RunSpan = Callable[..., SpanResult]

Done = tuple[BlockPlan, Block, Tensor | None]
"""What was planned as a block, that block, and the loss of every write (r n c); None: nothing was stored"""


@dataclass(frozen=True)
class Stream:
    """A memory at one moment of a sequence, with what it needs to go on."""

    layers: Projections  # from tokens to writes and queries, from reads to tokens
    engine: Engine  # from writes to weights, from queries to reads
    renewal: Callable[[int], Renewal]  # of a batch: what happens where the base is renewed
    layout: Layout
    residual: Updates | None  # the weights of the previous memory layer
    first_token: int  # position of the first new token
    first_chunk: int  # the first chunk that is not complete
    told: Callable[[StoredTokens, KeySpan | None, int], Told | None]  # tokens as what queries are projected on

    def run(self, plan: CallPlan, moment: Moment, seq: Tensor | None, stored: Stored) -> CallResult:
        """All of a call, as planned.  seq: (b t dim), what is read; None: only store"""
        run = self.runner(plan.recomputes, plan.noted)
        previous, renewal = self.previous_blocks, self.renewal_of(plan, stored)
        reads, reports, blocks = Pieces(0 if seq is None else seq.shape[1]), [], []
        begin = moment
        for span in plan.spans:
            result = run(moment, seq, stored, previous, renewal, span, plan, plan.keeps_blocks)
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
            renewal = self.renewal_of(plan, stored)
            for span in plan.spans:
                result = run(moment, None, stored, previous, renewal, span, plan, True)
                moment = result.moment
                blocks += result.blocks
        return blocks

    def renewal_of(self, plan: CallPlan, stored: Stored) -> Renewal | None:
        """What happens where a call renews the base, if it does; the same for all spans."""
        renews = any(block.renews_base for span in plan.spans for block in span)
        return self.renewal(len(stored.new.keys)) if renews else None

    def runner(self, recomputes: bool, noted: int = 0) -> RunSpan:
        """How a span is run: as it is, or so that only what goes in and comes out is kept for the backward pass.

        noted: how many other numbers may be kept, of those that take long to make
        """
        if not recomputes:
            return self.run_span
        trained = [p for p in self.layers.parameters() if p.requires_grad]
        return partial(recomputed, self.run_span, parameters=trained, room=noted)

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
        renewal: Renewal | None,
        span: Sequence[BlockPlan],
        call: CallPlan,
        keeps_blocks: bool,
    ) -> SpanResult:
        """Project a span, then store and read it block by block."""
        carry, first = moment.carry, span[0].first_chunk
        layer = None if self.residual is None or previous is None else self.residual.with_blocks(previous)
        projected = self.project(stored, span, moment)
        reader = None if seq is None else self.reader(seq, moment, span, stored.new)
        writes = None if projected is None else written(projected.writes, moment.recent)
        series = in_series(span, call.choice)
        blocks, losses = [], []
        for each, sums in zip(series, self.sums(projected, series), strict=True):
            if writes is None or each.num_chunks == 0:
                done: Iterable[Done] = [(each.as_one(), self.engine.at_rest(carry), None)]
            else:
                start = each.first_chunk - first
                chosen = writes.select(slice(start, start + each.num_chunks))
                residual = None if layer is None else Residual(layer, each.first_chunk)
                if each.is_single:
                    done = [(each.as_one(), *self.engine.store(carry, chosen, residual, sums))]
                elif each.is_solved:
                    done = [(each.as_one(), *self.engine.store_solved(carry, chosen, len(each.blocks)))]
                elif each.renews_inside(call.choice.at_once):
                    done = self.stored_by_loops(each, carry, chosen, renewal, call, reader, keeps_blocks)
                else:
                    done = [(each.as_one(), *self.engine.store_at_once(carry, chosen, residual, each.per_renewal))]
            for plan, block, loss in done:
                if loss is not None:
                    losses.append(loss)
                    blocks += [block] if keeps_blocks else []
                if reader is not None:
                    reader.read(block, plan)
                carry = block.finish()
                if renewal is not None and plan.renews_base and not each.renews_inside(call.choice.at_once):
                    carry = renewal(carry)
        report = None if projected is None else report_of(projected, torch.cat(losses, dim=1))
        reads, group = (None, moment.group) if reader is None else reader.finish()
        tails = moment.tails if projected is None else projected.tails
        tails = tails if reader is None else tails._replace(queries=reader.tail)
        recent = moment.recent
        recent = recent if writes is None or recent is None else recent.after(writes)
        keys = moment.span if reader is None else reader.span
        return SpanResult(reads, Moment(carry, group, tails, recent, keys), report, blocks)

    def stored_by_loops(
        self,
        series: SeriesPlan,
        carry: Carry,
        writes: Writes,
        renewal: Renewal | None,
        call: CallPlan,
        reader: SpanReader | None,
        keeps_blocks: bool,
    ) -> Iterator[Done]:
        """A series in loops, each read before the next one runs, or while it runs."""
        num_places, longest = None if keeps_blocks else call.choice.num_places, call.choice.longest_series
        chunks, queries = series.blocks[0].num_chunks, None
        if reader is not None and chunks == 1:  # a loop reads what blocks of one chunk begin with
            queries = reader.ahead(series.as_one())
            num_places = None if queries is None else num_places
        form = Series(len(series.blocks), series.per_renewal, series.blocks[-1].renews_base, queries, num_places)
        first = 0
        for block, loss in self.engine.store_series(
            carry, writes, form, renewal or Renewal(), longest // series.per_renewal
        ):
            last = first + block.num_chunks // chunks
            yield series.as_one(first, last), block, loss
            first = last

    def project(self, stored: Stored, span: Sequence[BlockPlan], moment: Moment) -> ProjectedWrites | None:
        """The writes of a span's chunks; None: it has none."""
        num_chunks = sum(plan.num_chunks for plan in span)
        if num_chunks == 0:
            return None
        chunk, start = self.layout.store_chunk, span[0].first_chunk - self.first_chunk
        tokens = stored.select(start * chunk, (start + num_chunks) * chunk)
        return self.layers.project_writes(tokens, chunk, moment.dtype, moment.tails)

    def sums(self, projected: ProjectedWrites | None, series: Sequence[SeriesPlan]) -> list[BlockSums]:
        """What the weights of each single block are sums of; they depend on gates alone, so all are had at once."""
        if projected is None:
            return [None] * len(series)
        sizes = [each.num_chunks if each.is_single else -each.num_chunks for each in series]
        return self.engine.sums_of_blocks(projected.writes.gates, sizes)

    def reader(self, seq: Tensor, moment: Moment, span: Sequence[BlockPlan], new: StoredTokens) -> SpanReader:
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
            moment.dtype,
            self.told(new.between(start, stop), moment.span, self.first_token - self.layout.first + start),
        )
        if is_first:
            reader.read_older(span[0].first_group)
        return reader
