"""The memories of rows at positions of their own: each token is read, the chunks of some rows are stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans_pytorch.decoding.due import TokenStep
from titans_pytorch.fast_weights.interface import Carry, Weights
from titans_pytorch.memory.convolution import Tails
from titans_pytorch.memory.core import MemoryCore
from titans_pytorch.memory.pieces import StoredTokens
from titans_pytorch.memory.recent import RecentWrites
from titans_pytorch.memory.rows import map_rows, selected
from titans_pytorch.memory.state import NeuralMemState, ReadingGroup, Updates
from titans_pytorch.neural_memory import NeuralMemory


class MemoryRows(NamedTuple):
    """What a memory keeps of every row, in place."""

    base: Weights  # (b h ...)
    current: Weights  # (b h ...)
    momenta: tuple[Weights, ...]  # (b h ...)  of every order
    waiting: Tensor  # (b c dim)  tokens of the unfinished chunk, with room for all of it
    tails: Tails
    recent: RecentWrites | None  # what a window still sees of the chunks before


def why_not_memory_by_rows(memory: nn.Module) -> str:
    """What keeps a memory from being decoded by rows, as the end of a sentence; empty: nothing does."""
    if type(memory) is not NeuralMemory:
        return f"has a memory of another kind, {type(memory).__name__}"
    if memory.sharding.key_span is not None:
        return "has a memory whose queries are projected on keys"
    if memory.evolution.mixes_tokens:
        return "has a memory model that mixes the tokens of a chunk"
    if memory.layout.retrieve_chunk != memory.layout.store_chunk:
        return "has a memory that reads in other chunks than it stores in"
    if memory.num_views is not None or memory.to_learned_weight_residual_mix is not None:
        return "has a memory that is given more than its tokens"
    if memory.sharding.shard is not None:
        return "has a memory that restarts with every shard"
    if memory.capacity is not None:
        return "has a memory whose capacity grows"
    return "" if memory.writes_are_on else "has a memory whose writes are off"


def fits_rows(state: NeuralMemState, num_seen: int) -> bool:
    """Whether a state is one of rows that store every token and have seen so many."""
    return state.cache_store_mask is None and state.num_seen == num_seen


class MemoryByRows:
    """A memory that reads one token of each row, whichever of them end a chunk with it."""

    def __init__(self, memory: MemoryCore) -> None:
        self.memory = memory

    def each(self, weight: Tensor) -> Tensor:
        """(b·h ...) -> (b h ...)"""
        return weight.unflatten(0, (-1, self.memory.heads))

    def enter(self, state: NeuralMemState) -> MemoryRows:
        """The memories of all sequences of a state, as copies."""
        waiting = state.waiting.new_zeros(state.batch, self.memory.layout.store_chunk, self.memory.dim)
        waiting[:, : state.waiting.shape[1]] = state.waiting
        orders = [
            {name: m[order] for name, m in state.momenta.items()} for order in range(self.memory.rule.num_momenta)
        ]
        base, current, *momenta = (
            {name: self.each(w).clone() for name, w in weights.items()}
            for weights in (state.base, state.current, *orders)
        )
        tails = Tails(*(None if tail is None else tail.clone() for tail in state.tails))
        recent = map_rows(lambda _, tensor: tensor.clone(), state.recent)
        return MemoryRows(base, current, tuple(momenta), waiting, tails, recent)

    def leave(self, rows: MemoryRows, row: int, num_seen: int) -> NeuralMemState:
        """The state of a row whose memory has seen so many tokens, as a copy."""
        chunk = self.memory.layout.store_chunk
        base, current, *orders = (
            {name: w[row].clone() for name, w in weights.items()}
            for weights in (rows.base, rows.current, *rows.momenta)
        )
        momenta = {name: torch.stack([order[name] for order in orders]) for name in current} if orders else {}
        return NeuralMemState(
            seq_index=num_seen // chunk * chunk,
            weights=base,
            cache_store_segment=rows.waiting[row : row + 1, : num_seen % chunk].clone(),
            states=(current, momenta),
            updates=Updates(num_seen // chunk, 0, current, []),
            group=ReadingGroup(None, None),
            tails=Tails(*(None if tail is None else tail[row : row + 1].clone() for tail in rows.tails)),
            recent=selected(rows.recent, [row], len(rows.waiting)),
        )

    def advance(self, x: Tensor, rows: MemoryRows, step: TokenStep) -> Tensor:
        """Store the next token of every row, and read it.  x: (b 1 dim) -> same"""
        rows.waiting[step.rows, step.waiting] = x[:, 0]
        early = None if self.memory.layout.first else self.ask(x, rows.current, rows.tails.queries)
        if step.chunks is not None:
            self.store(rows, step.chunks, step.renewals)
        return self.ask(x, rows.current, rows.tails.queries) if early is None else early

    def ask(self, x: Tensor, weights: Weights, tail: Tensor | None) -> Tensor:
        """Read weights (b h ...) for one token of each row.  x: (b 1 dim) -> same; tail: of queries, is moved on"""
        memory, dtype = self.memory, self.memory.weight_dtype
        normed = memory.retrieve_norm(x)
        queries, after = memory.queries(normed, tail)
        if tail is not None and after is not None:
            tail.copy_(after)
        flat = {name: weight.flatten(0, 1) for name, weight in weights.items()}
        block = memory.evolution.at_rest(Carry(flat, flat, {}, {}))
        slow = memory.slow_weights(len(x), dtype)
        if torch.compiler.is_compiling():  # of a product with a single token inductor makes sums, which are slow
            queries = queries.expand(-1, 2, -1)
        reads = memory.evolution.read(block, queries.to(dtype).unsqueeze(1), slice(0, 1), slow).squeeze(1)
        return memory.merge(reads[:, :1].to(normed.dtype), normed)

    def store(self, rows: MemoryRows, chunks: Tensor, renewals: Tensor | None) -> None:
        """The chunks of those rows that have come to the end of one.  chunks: (k)"""
        memory, num, waiting = self.memory, len(chunks), rows.waiting[chunks]

        def some(weights: Weights) -> Weights:
            return {name: weight[chunks].flatten(0, 1) for name, weight in weights.items()}

        orders = [some(order) for order in rows.momenta]
        momenta = {name: tuple(order[name] for order in orders) for name in rows.current} if orders else {}
        start = memory.init_weights(num) if memory.rule.uses_start else {}
        carry = Carry(some(rows.base), some(rows.current), momenta, start)
        tails = Tails(None, *(None if tail is None else tail[chunks] for tail in rows.tails[1:]))
        chunk = StoredTokens(waiting, waiting, None)
        writes, _, _, tails = memory.project_writes(chunk, waiting.shape[1], memory.weight_dtype, tails)
        older = selected(rows.recent, chunks, len(rows.waiting))
        writes = writes if older is None else older.before(writes)
        block, _ = memory.evolution.store(carry, writes)
        after = block.finish()
        if renewals is not None and memory.layout.batch is not None:
            after = self.renewed(after, renewals)
            self.put(rows.base, after.base, chunks)
        self.put(rows.current, after.weights, chunks)
        for number, order in enumerate(rows.momenta):
            self.put(order, {name: moved[number] for name, moved in after.momenta.items()}, chunks)
        for kept, new in zip(rows.tails[1:], tails[1:], strict=True):
            if kept is not None and new is not None:
                kept.index_copy_(0, chunks, new)
        if rows.recent is not None and older is not None:
            heads = torch.arange(memory.heads, device=chunks.device)
            where = (chunks[:, None] * memory.heads + heads).flatten()
            map_rows(lambda axis, kept, new: kept.index_copy_(axis, where, new), rows.recent, older.after(writes))

    def renewed(self, carry: Carry, renewals: Tensor) -> Carry:
        """The weights of some rows become their base, within limits.  renewals: (k)"""
        after = self.memory.renewal(len(renewals))(carry)
        is_renewed = renewals.repeat_interleave(self.memory.heads)

        def mixed(new: Weights, old: Weights) -> Weights:
            return {
                name: torch.where(is_renewed.view(-1, *[1] * (w.ndim - 1)), w, old[name]) for name, w in new.items()
            }

        return carry._replace(base=mixed(after.base, carry.base), weights=mixed(after.weights, carry.weights))

    def put(self, kept: Weights, new: Weights, chunks: Tensor) -> None:
        """New weights (k·h ...) in the place of those of some rows (b h ...)."""
        for name, weight in new.items():
            kept[name].index_copy_(0, chunks, self.each(weight))
