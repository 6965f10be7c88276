"""Reading the queries of one span of a call, group by group, each from the block whose weights it sees."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.engine import Engine
from titans_pytorch.fast_weights.interface import Block, Carry, Entries
from titans_pytorch.memory.key_span import KeySpan, Told, on_keys
from titans_pytorch.memory.layout import Layout
from titans_pytorch.memory.plan import BlockPlan
from titans_pytorch.memory.projections import Projections
from titans_pytorch.memory.state import ReadingGroup


class SpanReader:
    """Reads the tokens of a span (b t dim).  Positions are as in `memory.plan`.

    first_token: the position of the first of them; group: what was before them in its reading group;
    tail: what the convolution of queries still sees of the tokens before; afterwards, of these;
    told: whose keys queries are projected on; None: they are not
    """

    def __init__(
        self,
        layers: Projections,
        engine: Engine,
        layout: Layout,
        tokens: Tensor,
        first_token: int,
        group: ReadingGroup,
        tail: Tensor | None,
        dtype: torch.dtype,
        told: Told | None = None,
    ) -> None:
        self.layers, self.engine, self.layout = layers, engine, layout
        self.first_token, self.group = first_token, group
        self.normed = layers.retrieve_norm(tokens)
        queries, self.tail = layers.queries(self.normed, tail)
        self.queries, self.slow = queries.to(dtype), layers.slow_weights(len(tokens), dtype)
        self.span: KeySpan | None = None
        if told is not None:
            self.queries, self.span = on_keys(layers, self.queries, told)
        self.reads: list[Tensor] = []
        self.num_read = 0
        self.last_block: tuple[Block, int] | None = None

    def read_older(self, first_group: int) -> None:
        """The group that had begun before the call may read weights older than the current ones.

        first_group: the first one that does not
        """
        begun = self.first_token // self.layout.retrieve_chunk
        if self.group.weights is not None and begun < first_group:
            block = self.engine.at_rest(Carry(self.group.weights, self.group.weights, {}, {}))
            self.read(block, BlockPlan(self.layout.weight_index(begun), 0, begun, first_group, False))

    def read(self, block: Block, plan: BlockPlan) -> None:
        """All groups that read a block's weights."""
        if plan.num_groups == 0:
            return
        chunk, num_read = self.layout.retrieve_chunk, self.num_read
        first = self.first_token + num_read
        stop = min(plan.last_group * chunk - self.first_token, self.queries.shape[1])
        queries, entries = self.queries[:, num_read:stop], self.entries(plan)
        front = first - plan.first_group * chunk
        if block.reads is not None:
            reads = block.reads[:, entries]
        elif self.engine.mixes_tokens:
            reads = self.read_mixing(block, self.in_groups(queries, front, plan.num_groups), entries)
        else:
            front = 0 if plan.num_groups == 1 else front  # a group by itself need not be filled
            reads = self.engine.read(block, self.in_groups(queries, front, plan.num_groups), entries, self.slow)
        self.reads.append(reads.flatten(1, 2).narrow(1, front, queries.shape[1]))
        self.num_read += queries.shape[1]
        self.last_block = (block, plan.first_chunk)

    def ahead(self, plan: BlockPlan) -> Tensor | None:
        """What a series' groups will ask of a loop that reads.  -> (r n c d); None: less than two groups"""
        chunk, num_read, each = self.layout.retrieve_chunk, self.num_read, self.entries(plan)
        if plan.num_groups < 2 or not isinstance(each, slice):
            return None
        queries = self.queries[:, num_read : plan.last_group * chunk - self.first_token]
        grouped = self.in_groups(queries, self.first_token + num_read - plan.first_group * chunk, plan.num_groups)
        return F.pad(grouped, (0, 0, 0, 0, each.start, plan.num_chunks - each.stop))

    def read_mixing(self, block: Block, grouped: Tensor, entries: Entries) -> Tensor:
        """A model that mixes tokens: 0 * NaN is NaN, so what is not finite must not reach the tokens before it."""
        poison = (grouped.detach() * 0).sum(dim=-1, keepdim=True).cumsum(dim=2)
        return self.engine.read(block, grouped.nan_to_num(0.0, 0.0, 0.0), entries, self.slow) + poison

    def in_groups(self, queries: Tensor, front: int, num_groups: int) -> Tensor:
        """Queries with what comes before them in their group, and whatever fills the last one.  (r t d) -> (r g k d)"""
        if front:
            is_mixing = self.engine.mixes_tokens
            before = self.begun(queries) if is_mixing else queries[:, :1].expand(-1, front, -1)
            queries = torch.cat((before, queries), dim=1)
        if num_groups == 1:
            return queries.unsqueeze(1)
        size = num_groups * self.layout.retrieve_chunk
        filled = torch.cat((queries, queries[:, -1:].expand(-1, size - queries.shape[1], -1)), dim=1)
        return filled.unflatten(1, (num_groups, -1))

    def begun(self, like: Tensor) -> Tensor:
        """Queries of the group that had begun before the call; the very first group begins with a zero."""
        return like.new_zeros(like.shape[0], 1, like.shape[2]) if self.group.queries is None else self.group.queries

    def entries(self, plan: BlockPlan) -> Entries:
        """Which of the block's weights each group reads."""
        first = self.layout.weight_index(plan.first_group) - plan.first_chunk
        if plan.num_groups == 1 or self.layout.retrieve_chunk == self.layout.store_chunk:
            return slice(first, first + plan.num_groups)
        groups = torch.arange(plan.first_group, plan.last_group, device=self.queries.device)
        return groups * self.layout.retrieve_chunk // self.layout.store_chunk - plan.first_chunk

    def finish(self) -> tuple[Tensor, ReadingGroup]:
        """-> what was read (b t dim), and what the tokens after it need to know"""
        reads = torch.cat(self.reads, dim=1) if self.reads else self.queries
        return self.layers.merge(reads.to(self.normed.dtype), self.normed), self.next_group()

    def next_group(self) -> ReadingGroup:
        """The reading group of the next token, if it has begun."""
        chunk, last = self.layout.retrieve_chunk, self.first_token + self.queries.shape[1] - 1
        if last < self.first_token:
            return self.group
        if (last + 1) % chunk == 0:
            return ReadingGroup(None, None)
        group_start = last // chunk * chunk
        queries, weights = None, None
        if self.engine.mixes_tokens:
            queries = self.queries[:, max(group_start - self.first_token, 0) :].clone()  # not the whole call's
            if group_start < self.first_token:
                queries = torch.cat((self.begun(queries), queries), dim=1)
        if self.layout.store_chunk % chunk != 0 and self.last_block is not None:
            block, first_chunk = self.last_block
            weights = block.entry(self.layout.weight_index(last // chunk) - first_chunk)
        return ReadingGroup(queries, weights)
