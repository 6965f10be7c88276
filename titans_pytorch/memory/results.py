"""What a call of a memory gives on the way: of one span, of all of them, and what each write was worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from titans_pytorch.fast_weights.interface import Block, Carry
from titans_pytorch.memory.convolution import Tails
from titans_pytorch.memory.core import MemoryCore
from titans_pytorch.memory.key_span import KeySpan
from titans_pytorch.memory.projections import ProjectedWrites
from titans_pytorch.memory.recent import RecentWrites
from titans_pytorch.memory.state import ReadingGroup

LossAndRates = tuple[Tensor, Tensor]
"""Unweighted loss and step size of every write, (b h writes) each"""


class Report(NamedTuple):
    """How badly each write was predicted, and how eagerly it was stored.  (r n c) each"""

    loss: Tensor
    rates: Tensor


class Moment(NamedTuple):
    """A memory between two spans: all that the tokens to come need."""

    carry: Carry
    group: ReadingGroup
    tails: Tails
    recent: RecentWrites | None  # where a window looks back
    span: KeySpan | None = None  # of queries on keys

    @property
    def dtype(self) -> torch.dtype:
        """In which the memory's weights are kept."""
        return next(iter(self.carry.weights.values())).dtype


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


def report_of(projected: ProjectedWrites, loss: Tensor) -> Report:
    """Loss and rate (the mean of those of all parameters) of every write, where it stood; 0 where nothing is stored."""
    of_all = projected.writes.rates
    rates = of_all.any if of_all.is_shared else torch.stack(list(of_all.each.values())).mean(dim=0)
    if projected.order is not None:
        back = projected.order.argsort(dim=-1)
        loss, rates = loss.gather(2, back), rates.gather(2, back)
    return Report(loss if projected.is_stored is None else torch.where(projected.is_stored, loss, 0.0), rates)


def by_head(memory: MemoryCore, reports: list[Report], batch: int) -> LossAndRates:
    """Losses and rates of all writes.  (r n c) each -> (b h writes)"""
    if not reports:
        nothing = memory.memory_model_parameters[0].new_zeros(batch, memory.heads, 0)
        return nothing, nothing
    loss, rates = (torch.cat(parts, dim=1) for parts in zip(*reports, strict=True))
    merge = "(b h) n c -> b h (n c)"
    return rearrange(loss, merge, h=memory.heads), rearrange(rates, merge, h=memory.heads)
