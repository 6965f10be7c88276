"""Reading the queries of one span of a call, group by group, each from the block whose weights it sees."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.fast_weights.engine import Engine
from titans_pytorch.fast_weights.interface import Block, Carry, Rows
from titans_pytorch.memory.projections import Projections
from titans_pytorch.memory.schedule import BlockPlan, Layout
from titans_pytorch.memory.state import ReadingGroup


class Reader:
    """Positions are as in `fast_weights.schedule`; `start` and `stop` count the tokens of the call.

    seq: (b t dim), all tokens of the call; first_token: the position of the first of them;
    tail: what the convolution of queries still sees of the tokens before those that are read
    """

    def __init__(
        self,
        projections: Projections,
        engine: Engine,
        layout: Layout,
        mixes_tokens: bool,
        first_token: int,
        group: ReadingGroup,
        tail: Tensor | None,
    ) -> None:
        self.projections, self.engine, self.layout = projections, engine, layout
        self.mixes_tokens, self.first_token, self.group = mixes_tokens, first_token, group
        self.tail = tail

    def begin(self, seq: Tensor, first_group: int, last_group: int, dtype: torch.dtype) -> None:
        chunk = self.layout.retrieve_chunk
        start = max(first_group * chunk - self.first_token, 0)
        stop = min(max(last_group * chunk - self.first_token, start), seq.shape[1])
        self.first_position = self.first_token + start
        self.normed = self.projections.retrieve_norm(seq[:, start:stop])
        queries, self.tail = self.projections.queries(self.normed, self.tail)
        self.queries, self.slow = queries.to(dtype), self.projections.slow_weights(seq.shape[0], dtype)
        self.reads: list[Tensor] = []
        self.last_block: tuple[Block, int] | None = None

    def read_older(self, plans: list[BlockPlan]) -> None:
        """The group that had begun before the call may read weights older than the current ones."""
        first_group = self.first_token // self.layout.retrieve_chunk
        if self.group.weights is not None and first_group < plans[0].first_group:
            block = self.engine.at_rest(Carry(self.group.weights, self.group.weights, {}))
            chunk = self.layout.weight_index(first_group)
            self.read(block, BlockPlan(chunk, 0, first_group, plans[0].first_group, False))

    def read(self, block: Block, plan: BlockPlan) -> None:
        if plan.num_groups == 0:
            return
        chunk, num_read = self.layout.retrieve_chunk, sum(reads.shape[1] for reads in self.reads)
        first = self.first_position + num_read
        stop = min(plan.last_group * chunk - self.first_position, self.queries.shape[1])
        queries = self.queries[:, num_read:stop]
        front = first - plan.first_group * chunk
        if plan.num_groups == 1 and not self.mixes_tokens:
            front = 0  # a group by itself need not be filled
        grouped = self.in_groups(queries, front, plan.num_groups)
        if self.mixes_tokens:  # 0 * NaN is NaN: what is not finite must not reach the tokens before it
            poison = (grouped.detach() * 0).sum(dim=-1, keepdim=True).cumsum(dim=2)
            reads = self.engine.read(block, grouped.nan_to_num(0.0, 0.0, 0.0), self.rows(plan), self.slow) + poison
        else:
            reads = self.engine.read(block, grouped, self.rows(plan), self.slow)
        reads = reads.flatten(1, 2)
        self.reads.append(reads.narrow(1, front, queries.shape[1]))
        self.last_block = (block, plan.first_chunk)

    def in_groups(self, queries: Tensor, front: int, num_groups: int) -> Tensor:
        """Queries with what comes before them in their group, and whatever fills the last one.  (r t d) -> (r g k d)"""
        if front:
            before = self.begun(queries) if self.mixes_tokens else queries[:, :1].expand(-1, front, -1)
            queries = torch.cat((before, queries), dim=1)
        if num_groups == 1:
            return queries.unsqueeze(1)
        size = num_groups * self.layout.retrieve_chunk
        filled = torch.cat((queries, queries[:, -1:].expand(-1, size - queries.shape[1], -1)), dim=1)
        return filled.unflatten(1, (num_groups, -1))

    def begun(self, like: Tensor) -> Tensor:
        """Queries of the group that had begun before the call; the very first group begins with a zero."""
        return like.new_zeros(like.shape[0], 1, like.shape[2]) if self.group.queries is None else self.group.queries

    def rows(self, plan: BlockPlan) -> Rows:
        """Which of the block's weights each group reads."""
        first = self.layout.weight_index(plan.first_group) - plan.first_chunk
        if plan.num_groups == 1 or self.layout.retrieve_chunk == self.layout.store_chunk:
            return slice(first, first + plan.num_groups)
        groups = torch.arange(plan.first_group, plan.last_group, device=self.queries.device)
        return groups * self.layout.retrieve_chunk // self.layout.store_chunk - plan.first_chunk

    def finish(self) -> tuple[Tensor, ReadingGroup]:
        """-> what was read (b t dim), and what the tokens after it need to know"""
        reads = torch.cat(self.reads, dim=1) if self.reads else self.queries
        return self.projections.merge(reads.to(self.normed.dtype), self.normed), self.next_group()

    def next_group(self) -> ReadingGroup:
        chunk, last = self.layout.retrieve_chunk, self.first_position + self.queries.shape[1] - 1
        if last < self.first_position:
            return self.group
        if (last + 1) % chunk == 0:
            return ReadingGroup(None, None)
        group_start = last // chunk * chunk
        queries, weights = None, None
        if self.mixes_tokens:
            queries = self.queries[:, max(group_start - self.first_position, 0) :].clone()  # not the whole call's
            if group_start < self.first_position:
                queries = torch.cat((self.begun(queries), queries), dim=1)
        if self.layout.store_chunk % chunk != 0 and self.last_block is not None:
            block, first_chunk = self.last_block
            row = self.layout.weight_index(last // chunk) - first_chunk
            weights = block.entry(row)
        return ReadingGroup(queries, weights)
