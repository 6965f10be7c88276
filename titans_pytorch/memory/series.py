"""Which blocks of a span are stored together: equal ones, in equal batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from titans_pytorch.memory.choice import Choice
from titans_pytorch.memory.plan import BlockPlan


class SeriesPlan(NamedTuple):
    """Equal blocks that are stored together; a single one may be of any kind."""

    blocks: tuple[BlockPlan, ...]
    per_renewal: int  # blocks that are surprised at one base
    is_solved: bool = False  # whether the base is renewed after every chunk, and that is solved for

    @property
    def is_single(self) -> bool:
        return len(self.blocks) == 1 and not self.is_solved

    @property
    def shares_base(self) -> bool:
        """Whether all of them are surprised at one base."""
        return len(self.blocks) == self.per_renewal

    def renews_inside(self, at_once: bool) -> bool:
        """Whether whoever stores it renews the base as well; at_once: what shares a base is no loop"""
        return not self.is_single and not (self.shares_base and at_once)

    @property
    def first_chunk(self) -> int:
        return self.blocks[0].first_chunk

    @property
    def num_chunks(self) -> int:
        return sum(block.num_chunks for block in self.blocks)

    def as_one(self, first: int = 0, last: int | None = None) -> BlockPlan:
        """All of them, or the first'th to that before the last'th, as one block."""
        blocks = self.blocks[first:last]
        num_chunks = sum(block.num_chunks for block in blocks)
        start, end = blocks[0], blocks[-1]
        return BlockPlan(start.first_chunk, num_chunks, start.first_group, end.last_group, end.renews_base)


def in_series(span: Sequence[BlockPlan], choice: Choice) -> list[SeriesPlan]:
    """A span as series of equal blocks, as far as a plan has them stored together."""
    found: list[SeriesPlan] = []
    for batch in equal_runs(span, choice.longest_series):
        if choice.solved_writes > 0 and batch[0].num_chunks > 1:
            found.append(SeriesPlan(batch, len(batch), is_solved=True))
        elif choice.has_loop and found and may_follow(found[-1], batch):
            found[-1] = found[-1]._replace(blocks=(*found[-1].blocks, *batch))
        else:
            found.append(SeriesPlan(batch, len(batch)))
    return found


def may_follow(before: SeriesPlan, batch: tuple[BlockPlan, ...]) -> bool:
    """Whether a batch goes on with a series: where the base is renewed, with as many blocks as long."""
    is_same = before.per_renewal == len(batch) and before.blocks[0].num_chunks == batch[0].num_chunks > 0
    return before.blocks[-1].renews_base and is_same


def equal_runs(span: Sequence[BlockPlan], longest: int) -> list[tuple[BlockPlan, ...]]:
    """Runs of at most so many equal blocks without a renewal inside."""
    runs: list[list[BlockPlan]] = []
    for block in span:
        last = runs[-1] if runs else None
        is_same = last is not None and last[-1].num_chunks == block.num_chunks > 0 and not last[-1].renews_base
        if last is not None and is_same and len(last) < longest:
            last.append(block)
        else:
            runs.append([block])
    return list(map(tuple, runs))
