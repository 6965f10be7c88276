"""What a memory knows between two calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from titans_pytorch.fast_weights.blocks.dense import DenseBlock
from titans_pytorch.fast_weights.interface import Block, Carry, Weights
from titans_pytorch.memory.convolution import Tails
from titans_pytorch.memory.key_span import KeySpan
from titans_pytorch.memory.recent import RecentWrites
from titans_pytorch.memory.rows import (
    Chosen,
    check_joinable,
    detached,
    joined,
    map_rows,
    moved,
    outside_inference,
    rows_along,
    selected,
)
from titans_pytorch.public_names import register_state
from titans_pytorch.ragged.state import RaggedState

Tree = TypeVar("Tree")
AnyState = TypeVar("AnyState", "NeuralMemState", RaggedState)


def cut(tree: Tree) -> Tree:
    """Blocks of weights, or weights, with every tensor cut from its graph."""
    found: Tree = tree_map_only(Tensor, Tensor.detach, tree)
    return found


class Updates(Mapping[str, Tensor]):
    """The weights of every parameter before each chunk of one call and after its last, name -> (r N+1 ...).

    They are built when somebody looks: a call's blocks hold all that is needed, and where a call was too long to keep
    its blocks, `replay` runs its storing once more. Pickled copies begin anew with the current weights (N = 0).
    """

    def __init__(
        self,
        first_chunk: int,
        num_chunks: int,
        last: Weights,
        blocks: list[Block],
        replay: Callable[[], list[Block]] | None = None,
    ) -> None:
        self.first_chunk, self.num_chunks, self.last = first_chunk, num_chunks, last
        self._blocks, self._replay = blocks, replay

    @property
    def blocks(self) -> list[Block]:
        return self._blocks if self._replay is None else self._replay()

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Updates:
        """Weights that are there as tensors (r N+1 ...), from a stream's first chunk on."""
        last = {name: weight[:, -1] for name, weight in weights.items()}
        num_chunks = next(iter(weights.values())).shape[1] - 1
        return cls(0, num_chunks, last, [DenseBlock(dict(weights), Carry({}, {}, {}, {}))])

    def with_blocks(self, blocks: list[Block]) -> Updates:
        """Weights over time with all blocks at hand, for somebody who will look many times."""
        return Updates(self.first_chunk, self.num_chunks, self.last, blocks)

    def anew(self, weights: Weights) -> Updates:
        """What follows on these: nothing yet but the current weights, which keep no call alive."""
        return Updates(self.first_chunk + self.num_chunks, 0, weights, [])

    def detach(self) -> Updates:
        """Weights over time, cut from the graph of what came before."""
        replay = self._replay
        again = None if replay is None else lambda: cut(replay())
        return Updates(self.first_chunk, self.num_chunks, cut(self.last), cut(self._blocks), again)

    def __getitem__(self, name: str) -> Tensor:
        before = [block.materialise(name)[:, : block.num_chunks] for block in self.blocks]
        return torch.cat([*before, self.last[name].unsqueeze(1)], dim=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.last)

    def __len__(self) -> int:
        return len(self.last)

    def __repr__(self) -> str:
        return f"Updates({', '.join(self.last)}; from chunk {self.first_chunk})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Updates, (self.first_chunk + self.num_chunks, 0, self.last, [])

    # ---- as the previous layer of a weight residual, chunk by chunk

    def overlaps(self, first_chunk: int, num_chunks: int) -> Iterator[tuple[Block, slice, slice]]:
        """Blocks that hold the weights before some chunks, with the entries of the block and of the request."""
        start = self.first_chunk
        for block in self.blocks:
            first, last = max(start, first_chunk), min(start + block.num_chunks, first_chunk + num_chunks)
            if first < last:
                yield block, slice(first - start, last - start), slice(first - first_chunk, last - first_chunk)
            start += block.num_chunks

    def product(self, name: str, x: Tensor, first_chunk: int, is_transposed: bool) -> Tensor:
        """x: (r n c i), chunk j read with the weights before chunk first_chunk + j -> (r n c j)"""
        found = self.overlaps(first_chunk, x.shape[1])
        return torch.cat(
            [block.product(name, x[:, where], entries, is_transposed) for block, entries, where in found], dim=1
        )

    def materialise(self, name: str, first_chunk: int, num_chunks: int) -> Tensor:
        """The weights before each of so many chunks.  -> (r n ...)"""
        found = self.overlaps(first_chunk, num_chunks)
        return torch.cat([block.materialise(name)[:, entries] for block, entries, _ in found], dim=1)

    def covers(self, first_chunk: int, num_chunks: int) -> bool:
        """Whether the weights before these chunks are among them."""
        return self.first_chunk <= first_chunk and first_chunk + num_chunks <= self.first_chunk + self.num_chunks


@register_state
class ReadingGroup(NamedTuple):
    """What the tokens to come need to know of their reading group, if it has already begun."""

    queries: Tensor | None  # (r k d)  of the group's tokens, for memory models that mix tokens
    weights: Weights | None  # (r ...)  that the group reads, where they may be older than the current ones


@register_state
class QueryTail(NamedTuple):
    """What reading a memory needs to know of the tokens that were read before (`NeuralMemory.ask`)."""

    num_read: int
    convolution: Tensor | None  # (b size-1 channels)  what the convolution of queries still sees
    group: ReadingGroup
    span: KeySpan | None = None  # the keys that queries are projected on


@register_state
@rows_along(cache_store_segment=-3, states=(0, 1))
class NeuralMemState(NamedTuple):
    """The state of a stream; its size does not depend on the number of tokens seen.

    The fields after `updates` are ours; everything else is as in the published package.
    """

    seq_index: int  # tokens stored so far
    weights: Weights  # (b·h ...)  where surprises are taken, the base
    cache_store_segment: Tensor  # (b t dim), with views (2 b t dim): tokens of the unfinished chunk
    states: tuple[Weights, Weights]  # current weights (b·h ...) and momenta (o b·h ...)
    updates: Updates  # name -> (b·h N+1 ...)  the weights over the chunks of the last call
    cache_store_mask: Tensor | None = None  # (b t)  which of the waiting tokens are to be stored; None: all
    group: ReadingGroup = ReadingGroup(None, None)
    tails: Tails = Tails(None, None, None)  # what convolutions still see of the tokens before
    recent: RecentWrites | None = None  # what a window still sees of the chunks before
    span: KeySpan | None = None  # the keys that queries are projected on, with qk_projection

    @property
    def base(self) -> Weights:
        """The weights at which surprises are taken.  (b·h ...)"""
        return self.weights

    @property
    def current(self) -> Weights:
        """The weights that are read.  (b·h ...)"""
        return self.states[0]

    @property
    def momenta(self) -> Weights:
        """The momenta of every order.  (o b·h ...)"""
        return self.states[1]

    @property
    def waiting(self) -> Tensor:
        """Tokens whose chunk is not complete.  (b t dim), with views (2 b t dim)"""
        return self.cache_store_segment

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return self.waiting.shape[-3]

    @property
    def num_seen(self) -> int:
        """Tokens seen so far, those that wait included."""
        return self.seq_index + self.waiting.shape[-2]

    def detach(self) -> NeuralMemState:
        """A state of the memory that is cut from the graph of what came before."""
        return detached(self)._replace(updates=self.updates.detach())

    def outside_inference(self) -> NeuralMemState:
        """A state that may take part in a graph, whether it was made in inference mode or not."""
        weight = next(iter(self.base.values()))
        return self if outside_inference(weight) is weight else map_rows(lambda _, t: outside_inference(t), self)

    def to(self, *args: Any, **kwargs: Any) -> NeuralMemState:
        """Move to another device or dtype; the arguments of `torch.Tensor.to`.  `updates` begin anew."""
        return moved(self, *args, **kwargs)

    def select(self, rows: Chosen) -> NeuralMemState:
        """The sequences with these numbers, in this order and as often as named: a beam search's next beams.

        `updates` begin anew.
        """
        return selected(self, rows, self.batch)

    def repeat(self, times: int) -> NeuralMemState:
        """Every sequence `times` times in a row: (b) -> (b times)"""
        return self.select(torch.arange(self.batch, device=self.waiting.device).repeat_interleave(times))

    @staticmethod
    def join(states: Sequence[NeuralMemState]) -> NeuralMemState:
        """One batch of the sequences of several states that have seen equally many tokens, the inverse of `select`.

        `updates` begin anew.
        """
        check_joinable(NeuralMemState, states, lambda state: state.num_seen)
        if any(state.cache_store_mask is not None for state in states):
            states = [state.comparable() for state in states]
        return joined(states)

    def settled(self) -> NeuralMemState:
        """A state whose `updates` begin anew with the current weights."""
        return self._replace(updates=self.updates.anew(self.current))

    def at_rest(self) -> NeuralMemState:
        """A state without what would keep the call that returned it alive: its weights over time, views of it."""
        queries = self.group.queries
        group = self.group if queries is None else self.group._replace(queries=queries.clone())
        return self._replace(group=group).settled()

    def comparable(self) -> NeuralMemState:
        """A state that says of every waiting token whether it is to be stored, as others of its kind may do."""
        if self.cache_store_mask is not None:
            return self
        mask = torch.ones(self.waiting.shape[-3:-1], dtype=torch.bool, device=self.waiting.device)
        return self._replace(cache_store_mask=mask)


def mem_state_detach(state: AnyState) -> AnyState:
    """Cut a state from the graph of what came before, for truncated backpropagation through time."""
    if not isinstance(state, NeuralMemState | RaggedState):
        raise TypeError(f"state must be a NeuralMemState, got {type(state).__name__}")
    return state.detach()


def restarted(state: NeuralMemState, fresh: NeuralMemState, rows: Tensor) -> NeuralMemState:
    """A state in which some sequences begin anew.  fresh: a state that has seen nothing, rows: (b) bool"""
    state = state.comparable() if state.waiting.shape[-2] else state
    group, mask = state.group, state.cache_store_mask
    fresh = fresh._replace(
        seq_index=state.seq_index,
        cache_store_segment=state.waiting,
        updates=state.updates,
        cache_store_mask=None if mask is None else torch.zeros_like(mask),
        group=ReadingGroup(
            None if group.queries is None else torch.zeros_like(group.queries),
            None if group.weights is None else fresh.weights,
        ),
    )

    def mixed(axis: int, new: Tensor, old: Tensor) -> Tensor:
        marked = rows.repeat_interleave(old.shape[axis] // state.batch)
        return torch.where(marked.reshape(-1, *[1] * (old.ndim - 1 - axis % old.ndim)), new, old)

    return map_rows(mixed, fresh, state)
