"""Reading a memory that stands still: one that is asked alone, or whose writes are off."""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.fast_weights.blocks.dense import DenseBlock
from titans_pytorch.fast_weights.blocks.still import StillBlock
from titans_pytorch.fast_weights.interface import Block, Carry
from titans_pytorch.memory.core import MemoryCore
from titans_pytorch.memory.pieces import StoredTokens
from titans_pytorch.memory.plan import BlockPlan
from titans_pytorch.memory.reading import SpanReader
from titans_pytorch.memory.results import CallResult, Moment
from titans_pytorch.memory.state import NeuralMemState, QueryTail, ReadingGroup


def read_block(
    memory: MemoryCore, tokens: Tensor, block: Block, tail: QueryTail | None, stored: StoredTokens | None = None
) -> tuple[Tensor, QueryTail]:
    """Read weights that are there.  tokens: (b n dim) -> (b n dim), the next tail; stored: what is told meanwhile"""
    num_read, convolution, group, span = QueryTail(0, None, ReadingGroup(None, None)) if tail is None else tail
    told = None if stored is None else memory.told(stored, span, num_read)
    layout, first = memory.layout, num_read + memory.layout.first
    reader = SpanReader(memory, memory.evolution, layout, tokens, first, group, convolution, memory.weight_dtype, told)
    groups = first // layout.retrieve_chunk, (first + tokens.shape[1] - 1) // layout.retrieve_chunk + 1
    reader.read(block, BlockPlan(0, block.num_chunks, *groups, False))
    reads, group = reader.finish()
    return reads, QueryTail(num_read + tokens.shape[1], reader.tail, group._replace(weights=None), reader.span)


def only_read(
    memory: MemoryCore, seq: Tensor | None, state: NeuralMemState, num_chunks: int, told: StoredTokens
) -> CallResult:
    """Read the memory of a state for so many chunks; it goes on in time and in nothing else.  seq: (b n dim)"""
    weights, reads = state.current, None
    tail = QueryTail(state.num_seen, state.tails.queries, state.group, state.span)
    if seq is not None:
        reads, tail = read_block(memory, seq, StillBlock(Carry(weights, weights, {}, {})), tail, told)
    recent = None if state.recent is None else state.recent.after_nothing(num_chunks)
    tails = state.tails._replace(queries=tail.convolution)
    moment = Moment(Carry(state.base, weights, {}, {}), tail.group, tails, recent, tail.span)
    over_chunks = {name: w.unsqueeze(1).expand(-1, num_chunks + 1, *w.shape[1:]) for name, w in weights.items()}
    return CallResult(reads, moment, [], [DenseBlock(over_chunks, Carry({}, {}, {}, {}))], None)
