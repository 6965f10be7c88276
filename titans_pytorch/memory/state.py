"""What a memory knows between two calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from titans_pytorch.fast_weights.blocks.dense import DenseBlock
from titans_pytorch.fast_weights.interface import Block, Carry, Weights
from titans_pytorch.memory.convolution import Tails

Tree = TypeVar("Tree")


def detached(tree: Tree) -> Tree:
    """The same containers with every tensor cut from its graph."""
    found: Tree = tree_map_only(Tensor, Tensor.detach, tree)
    return found


def outside_inference(x: Tensor) -> Tensor:
    """The same, as a tensor that may take part in a graph; one that was made in inference mode may not."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()


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
        """Of tensors (r N+1 ...), from a stream's first chunk on."""
        last = {name: weight[:, -1] for name, weight in weights.items()}
        num_chunks = next(iter(weights.values())).shape[1] - 1
        return cls(0, num_chunks, last, [DenseBlock(dict(weights), Carry({}, {}, {}, {}))])

    def with_blocks(self, blocks: list[Block]) -> Updates:
        """The same with all blocks at hand, for somebody who will look many times."""
        return Updates(self.first_chunk, self.num_chunks, self.last, blocks)

    def detach(self) -> Updates:
        replay = self._replay
        again = None if replay is None else lambda: detached(replay())
        return Updates(self.first_chunk, self.num_chunks, detached(self.last), detached(self._blocks), again)

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
        """-> (r n ...)"""
        found = self.overlaps(first_chunk, num_chunks)
        return torch.cat([block.materialise(name)[:, entries] for block, entries, _ in found], dim=1)

    def covers(self, first_chunk: int, num_chunks: int) -> bool:
        return self.first_chunk <= first_chunk and first_chunk + num_chunks <= self.first_chunk + self.num_chunks


class ReadingGroup(NamedTuple):
    """What the tokens to come need to know of their reading group, if it has already begun."""

    queries: Tensor | None  # (r k d)  of the group's tokens, for memory models that mix tokens
    weights: Weights | None  # (r ...)  that the group reads, where they may be older than the current ones


class QueryTail(NamedTuple):
    """What reading a memory needs to know of the tokens that were read before (`NeuralMemory.ask`)."""

    num_read: int
    convolution: Tensor | None  # (b size-1 channels)  what the convolution of queries still sees
    group: ReadingGroup


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

    @property
    def base(self) -> Weights:
        return self.weights

    @property
    def current(self) -> Weights:
        return self.states[0]

    @property
    def momenta(self) -> Weights:
        return self.states[1]

    @property
    def waiting(self) -> Tensor:
        return self.cache_store_segment

    @property
    def batch(self) -> int:
        return self.cache_store_segment.shape[-3]

    @property
    def num_seen(self) -> int:
        """Tokens seen so far, those that wait included."""
        return self.seq_index + self.cache_store_segment.shape[-2]

    def detach(self) -> NeuralMemState:
        """The same memory, cut from the graph of what came before."""
        return self._map(lambda t, _: t.detach())._replace(updates=self.updates.detach())

    def outside_inference(self) -> NeuralMemState:
        """The same memory, whether it was made in inference mode or not."""
        weight = next(iter(self.weights.values()))
        return self if outside_inference(weight) is weight else self._map(lambda t, _: outside_inference(t))

    def to(self, *args: Any, **kwargs: Any) -> NeuralMemState:
        """Move to another device or dtype; the arguments of `torch.Tensor.to`.  `updates` begin anew."""
        device = self.cache_store_segment[..., :0, :].to(*args, **kwargs).device
        return self._map(lambda t, _: t.to(*args, **kwargs) if t.is_floating_point() else t.to(device))

    def select(self, rows: Tensor | slice | list[int]) -> NeuralMemState:
        """The sequences with these numbers, in this order and as often as named: a beam search's next beams.

        `updates` begin anew.
        """

        def pick(t: Tensor, axis: int) -> Tensor:
            split = t.unflatten(axis, (self.batch, -1)).movedim(axis, 0)
            return split[rows].movedim(0, axis).flatten(axis, axis + 1)

        return self._map(pick)

    def repeat(self, times: int) -> NeuralMemState:
        """Every sequence `times` times in a row: (b) -> (b times)"""
        return self.select(torch.arange(self.batch, device=self.cache_store_segment.device).repeat_interleave(times))

    def _map(self, fn: Callable[[Tensor, int], Tensor]) -> NeuralMemState:
        """fn(tensor, axis of its rows) of everything that goes on."""

        def each(weights: Weights, axis: int) -> Weights:
            return {name: fn(weight, axis) for name, weight in weights.items()}

        segment, mask, group = self.cache_store_segment, self.cache_store_mask, self.group
        states = (each(self.states[0], 0), each(self.states[1], 1))
        return self._replace(
            weights=each(self.weights, 0),
            cache_store_segment=fn(segment, segment.ndim - 3),
            states=states,
            updates=Updates(self.updates.first_chunk + self.updates.num_chunks, 0, states[0], []),
            cache_store_mask=None if mask is None else fn(mask, 0),
            group=ReadingGroup(
                None if group.queries is None else fn(group.queries, 0),
                None if group.weights is None else each(group.weights, 0),
            ),
            tails=Tails(*(None if tail is None else fn(tail, 0) for tail in self.tails)),
        )


def mem_state_detach(state: NeuralMemState) -> NeuralMemState:
    """Cut a state from the graph of what came before, for truncated backpropagation through time."""
    if not isinstance(state, NeuralMemState):
        raise TypeError(f"state must be a NeuralMemState, got {type(state).__name__}")
    return state.detach()


def restarted(state: NeuralMemState, fresh: NeuralMemState, rows: Tensor, chunk: int) -> NeuralMemState:
    """Some sequences of a batch anew.  fresh: a state that has seen nothing, rows: (b) bool, chunk: of storing"""
    batch = state.batch

    def mixed(new: Tensor, old: Tensor, axis: int = 0) -> Tensor:
        marked = rows.repeat_interleave(old.shape[axis] // batch)
        return torch.where(marked.reshape(-1, *[1] * (old.ndim - 1 - axis)), new, old)

    def anew(weights: Weights) -> Weights:
        return {name: mixed(fresh.weights[name], weight) for name, weight in weights.items()}

    current = anew(state.states[0])
    momenta = {name: mixed(fresh.states[1][name], m, 1) for name, m in state.states[1].items()}
    mask, group = state.cache_store_mask, state.group
    if state.cache_store_segment.shape[-2]:
        old = torch.ones(state.cache_store_segment.shape[-3:-1], dtype=torch.bool, device=rows.device)
        mask = (old if mask is None else mask) & ~rows[:, None]
    if group.queries is not None:
        group = group._replace(queries=mixed(torch.zeros_like(group.queries), group.queries))
    if group.weights is not None:
        group = group._replace(weights=anew(group.weights))
    pairs = zip(fresh.tails, state.tails, strict=True)
    return state._replace(
        weights=anew(state.weights),
        states=(current, momenta),
        updates=Updates(state.seq_index // chunk, 0, current, []),
        cache_store_mask=mask,
        group=group,
        tails=Tails(*(None if new is None or old is None else mixed(new, old) for new, old in pairs)),
    )
