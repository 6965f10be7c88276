"""A call of a memory: from a state and new tokens to what is read and the next state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from titans_pytorch.fast_weights.inner_gradient import plain_autograd_works, written_gradients_work
from titans_pytorch.fast_weights.interface import Carry
from titans_pytorch.memory.core import MemoryCore
from titans_pytorch.memory.layout import Layout
from titans_pytorch.memory.pieces import Stored, StoredTokens
from titans_pytorch.memory.plan import CallPlan, plan_call
from titans_pytorch.memory.results import CallResult, LossAndRates, Moment, by_head
from titans_pytorch.memory.state import NeuralMemState, Updates
from titans_pytorch.memory.still import only_read
from titans_pytorch.memory.streaming import Stream

PreviousWeights = NeuralMemState | Mapping[str, Tensor] | None


def advance(
    memory: MemoryCore,
    seq: Tensor | None,
    new: StoredTokens,
    state: NeuralMemState | None,
    prev_weights: PreviousWeights,
    layout: Layout,
) -> tuple[Tensor | None, NeuralMemState, LossAndRates]:
    """Go on from a state; None: a stream begins.  seq: (b n dim), what is read; None: only store"""
    batch, chunk, is_fresh = new.keys.shape[0], layout.store_chunk, memory.begins(state)
    state = memory.init_state(batch) if state is None else memory.checked_state(state, batch)
    told, new = new, new if memory.writes_are_on else new.without_trace()
    stored = Stored(memory.waiting_tokens(state), new)
    num_chunks, first_chunk = stored.num_tokens // chunk, state.seq_index // chunk
    if memory.writes_are_on:
        residual = memory.checked_residual(prev_weights, first_chunk, num_chunks, batch)
        first_token = state.num_seen + layout.first
        stream = Stream(
            memory, memory.evolution, memory.renewal, layout, residual, first_token, first_chunk, memory.told
        )
        plan = plan_of(memory, layout, batch, first_token, new.keys.shape[1], first_chunk, residual is None)
        result = stream.run(plan, moment_of(memory, state, is_fresh), seq, stored)
    else:
        result = only_read(memory, seq, state, num_chunks, told)
    rest = stored.select(num_chunks * chunk, stored.num_tokens)
    after = state_after(state, result, rest, first_chunk, num_chunks, chunk)
    return result.reads, after, by_head(memory, result.reports, batch)


def moment_of(memory: MemoryCore, state: NeuralMemState, is_fresh: bool) -> Moment:
    """Where the call begins."""
    moved = {} if is_fresh else {name: momenta.unbind(0) for name, momenta in state.momenta.items()}
    start = memory.init_weights(state.batch) if memory.rule.uses_start else {}
    return Moment(Carry(state.base, state.current, moved, start), state.group, state.tails, state.recent, state.span)


def state_after(
    before: NeuralMemState, result: CallResult, rest: StoredTokens, first_chunk: int, num_chunks: int, chunk: int
) -> NeuralMemState:
    """What the next call begins with.  rest: the tokens that wait for their chunk to be complete"""
    base, weights, orders, _ = result.moment.carry
    has_moved = num_chunks > 0 and orders
    momenta = {name: torch.stack(order) for name, order in orders.items()} if has_moved else before.momenta
    has_views = before.waiting.ndim == 4
    return NeuralMemState(
        seq_index=before.seq_index + num_chunks * chunk,
        weights=base,
        cache_store_segment=torch.stack((rest.keys, rest.values)) if has_views else rest.keys.clone(),
        states=(weights, momenta),
        updates=Updates(first_chunk, num_chunks, weights, result.blocks, result.replay),
        cache_store_mask=rest.is_stored,
        group=result.moment.group,
        tails=result.moment.tails,
        recent=result.moment.recent,
        span=result.moment.span,
    )


def plan_of(
    memory: MemoryCore,
    layout: Layout,
    batch: int,
    first_token: int,
    num_tokens: int,
    first_chunk: int,
    is_alone: bool = True,
) -> CallPlan:
    """How a call will be run; `explain()` says it in words.  is_alone: without the weights of a previous layer"""
    return plan_call(
        layout,
        memory.sizes,
        batch=batch,
        first_token=first_token,
        num_tokens=num_tokens,
        first_chunk=first_chunk,
        has_grad=torch.is_grad_enabled(),
        can_recompute=plain_autograd_works(),
        may_loop=is_alone and layout.retrieve_chunk == layout.store_chunk and written_gradients_work(),
        may_solve=is_alone and layout.retrieve_chunk == layout.store_chunk,
        device=memory.memory_model_parameters[0].device.type,
    )
