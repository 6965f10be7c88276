"""A call of a memory whose capacity grows: it is cut where hidden units are opened."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from titans_pytorch.memory.call import PreviousWeights, advance
from titans_pytorch.memory.core import MemoryCore
from titans_pytorch.memory.layout import Layout
from titans_pytorch.memory.pieces import StoredTokens
from titans_pytorch.memory.plan import CallPlan
from titans_pytorch.memory.results import LossAndRates
from titans_pytorch.memory.shards import advance_in_shards, plan_in_shards
from titans_pytorch.memory.state import NeuralMemState, Updates


def advance_growing(
    memory: MemoryCore,
    seq: Tensor | None,
    new: StoredTokens,
    state: NeuralMemState | None,
    prev_weights: PreviousWeights,
    layout: Layout,
) -> tuple[Tensor | None, NeuralMemState, LossAndRates]:
    """What `advance_in_shards` gives; a memory that grows does so where it should.  seq: (b t dim); None: only store"""
    capacity, batch = memory.capacity, new.keys.shape[0]
    if capacity is None:
        return advance_in_shards(memory, seq, new, state, prev_weights, layout)
    if seq is None:
        raise ValueError(f"store_memories needs a memory without capacity, got capacity={tuple(capacity)}")
    state = memory.init_state(batch) if state is None else memory.checked_state(state, batch)
    reads: list[Tensor] = []
    surprises = []
    for part in capacity.parts(state.num_seen, seq.shape[1]):
        before = capacity.num_open(state.num_seen)
        stored = new.between(part.start, part.stop)
        found, state, of_writes = advance(memory, seq[:, part], stored, state, None, layout)
        reads.append(cast(Tensor, found))
        surprises.append(of_writes)
        if capacity.num_open(state.num_seen) > before:
            state = grown(memory, state)
    loss, rates = (torch.cat(each, dim=2) for each in zip(*surprises, strict=True))
    return torch.cat(reads, dim=1), state, (loss, rates)


def grown(memory: MemoryCore, state: NeuralMemState) -> NeuralMemState:
    """A state at a border: the block that opens there begins as in the learned start."""
    now, before = (memory.init_weights(state.batch, num_seen) for num_seen in (state.num_seen, state.num_seen - 1))
    base = {name: weight + (now[name] - before[name]) for name, weight in state.base.items()}
    current = {name: weight + (now[name] - before[name]) for name, weight in state.current.items()}
    updates = Updates(state.seq_index // memory.layout.store_chunk, 0, current, [])
    return state._replace(weights=base, states=(current, state.momenta), updates=updates)


def plan_growing(
    memory: MemoryCore, layout: Layout, batch: int, first_token: int, num_tokens: int, first_chunk: int
) -> CallPlan:
    """How the longest part of a call will be run."""
    if memory.capacity is not None:
        longest = max(
            memory.capacity.parts(first_token - layout.first, num_tokens), key=lambda part: part.stop - part.start
        )
        first_token, num_tokens = first_token + longest.start, longest.stop - longest.start
        first_chunk = (first_token - layout.first) // layout.store_chunk
    return plan_in_shards(memory, layout, batch, first_token, num_tokens, first_chunk)
