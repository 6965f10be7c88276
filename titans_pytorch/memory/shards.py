"""A memory that restarts (TNT, arXiv 2511.07343): every `shard` tokens it is its learned start again.

    W_t = W_init  where t is a multiple of the shard, as if a stream began there        eq. (6)

So shards do not wait for each other: whole ones of a call become rows of its batch, and all of them are stored and read
together. Convolutions go on, as they are no memory: every row is given the tokens that theirs saw before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from titans_pytorch.memory.call import PreviousWeights, advance, plan_of
from titans_pytorch.memory.convolution import ConvolvedLinear, Tails
from titans_pytorch.memory.core import MemoryCore
from titans_pytorch.memory.layout import Layout
from titans_pytorch.memory.pieces import StoredTokens
from titans_pytorch.memory.plan import CallPlan
from titans_pytorch.memory.results import LossAndRates
from titans_pytorch.memory.rows import selected
from titans_pytorch.memory.state import NeuralMemState, Updates


class Part(NamedTuple):
    """Tokens of a call that are advanced together: some of one shard, or whole shards."""

    start: int
    stop: int
    num_shards: int = 1


def parts_of(first: int, num_tokens: int, shard: int, whole_together: bool = True) -> Iterator[Part]:
    """A call cut where the memory restarts.  first: tokens before it; whole_together: whole shards are one part"""
    start = 0
    while start < num_tokens:
        rest = shard - (first + start) % shard
        num_whole = (num_tokens - start) // shard if rest == shard and whole_together else 0
        stop = start + num_whole * shard if num_whole else min(start + rest, num_tokens)
        yield Part(start, stop, max(num_whole, 1))
        start = stop


def advance_in_shards(
    memory: MemoryCore,
    seq: Tensor | None,
    new: StoredTokens,
    state: NeuralMemState | None,
    prev_weights: PreviousWeights,
    layout: Layout,
) -> tuple[Tensor | None, NeuralMemState, LossAndRates]:
    """What `advance` gives; a memory with shards restarts where one ends.  seq: (b t dim); None: only store"""
    shard, batch = memory.sharding.shard, new.keys.shape[0]
    if shard is None:
        return advance(memory, seq, new, state, prev_weights, layout)
    if seq is None:
        raise ValueError(f"store_memories needs a memory without shards, got shard={shard}")
    state = memory.init_state(batch) if state is None else memory.checked_state(state, batch)
    if state.num_seen > 0 and state.num_seen % shard == 0:  # nothing was stored when it came here, perhaps
        state = restarted_shard(memory, state)
    reads: list[Tensor] = []
    surprises = []
    for start, stop, num in parts_of(state.num_seen, new.keys.shape[1], shard, memory.writes_are_on):
        piece, stored, merge = seq[:, start:stop], new.between(start, stop), "(b k) h n -> b h (k n)"
        before = state if num == 1 else state_of_rows(memory, piece, stored, state, num)
        found, after, of_writes = advance(memory, in_rows(piece, num), stored.map(in_rows, num), before, None, layout)
        reads.append(rearrange(cast(Tensor, found), "(b k) t d -> b (k t) d", k=num))
        surprises.append([rearrange(each, merge, k=num) for each in of_writes])
        state = after if num == 1 else last_row(after, num, state.seq_index)
        if state.num_seen % shard == 0:
            state = restarted_shard(memory, state)
    loss, rates = (torch.cat(each, dim=2) for each in zip(*surprises, strict=True))
    return torch.cat(reads, dim=1), state, (loss, rates)


def in_rows(x: Tensor, num: int) -> Tensor:
    """Shards as sequences of their own.  (b k·t ...) -> (b·k t ...)"""
    return x if num == 1 else x.unflatten(1, (num, -1)).flatten(0, 1)


def state_of_rows(
    memory: MemoryCore, seq: Tensor, stored: StoredTokens, state: NeuralMemState, num: int
) -> NeuralMemState:
    """What shards begin with that are rows: the start of the memory, and what convolutions see of the shard before."""
    shard, lookback = seq.shape[1] // num, memory.lookback
    fresh = memory.init_state(len(seq) * num)
    if lookback == 0:
        return fresh

    def ends(x: Tensor) -> Tensor:
        """The last tokens of all shards but the last.  (b k·t ...) -> (b·(k-1) size-1 ...)"""
        return x.unflatten(1, (num, shard))[:, :-1, shard - lookback :].flatten(0, 1)

    def tails(layer: nn.Module, before: Tensor | None, normed: Tensor) -> Tensor | None:
        if not isinstance(layer, ConvolvedLinear) or before is None:
            return before
        within = layer.linear(normed).unflatten(0, (-1, num - 1))
        return torch.cat((before.unsqueeze(1), within.to(before.dtype)), dim=1).flatten(0, 1)

    told = stored.map(ends)
    keys = memory.normed(told.keys, told.is_stored)
    values = keys if told.values is told.keys else memory.normed(told.values, told.is_stored)
    queries = memory.retrieve_norm(ends(seq))
    found = Tails(
        tails(memory.to_queries, state.tails.queries, queries),
        tails(memory.to_keys, state.tails.keys, keys),
        tails(memory.to_values, state.tails.values, values),
    )
    return begun_with(fresh, found)


def begun_with(state: NeuralMemState, tails: Tails) -> NeuralMemState:
    """A memory that begins, whose convolutions do not."""
    span = None if state.span is None else state.span._replace(tail=tails.keys)
    return state._replace(tails=tails, span=span)


def last_row(state: NeuralMemState, num: int, seq_index: int) -> NeuralMemState:
    """The state after shards that were rows: that of the last one.  seq_index: tokens stored before the first"""
    last = selected(state._replace(seq_index=0), slice(num - 1, None, num), state.batch)
    return last._replace(seq_index=seq_index + num * state.seq_index)


def restarted_shard(memory: MemoryCore, state: NeuralMemState) -> NeuralMemState:
    """A state at a border: its memory is the start again, unless nothing is stored, and a span of keys begins."""
    fresh = begun_with(memory.init_state(state.batch), state.tails)
    if not memory.writes_are_on:
        return state._replace(span=fresh.span)
    updates = Updates(state.seq_index // memory.layout.store_chunk, 0, fresh.current, [])
    return fresh._replace(seq_index=state.seq_index, updates=updates)


def plan_in_shards(
    memory: MemoryCore, layout: Layout, batch: int, first_token: int, num_tokens: int, first_chunk: int
) -> CallPlan:
    """How the longest part of a call will be run."""
    shard = memory.sharding.shard
    if shard is not None:
        parts = list(parts_of(first_token - layout.first, num_tokens, shard))
        longest = max(parts, key=lambda part: part.stop - part.start)
        first_token, batch = first_token + longest.start, batch * longest.num_shards
        num_tokens = (longest.stop - longest.start) // longest.num_shards
        first_chunk = (first_token - layout.first) // layout.store_chunk
    return plan_of(memory, layout, batch, first_token, num_tokens, first_chunk)
