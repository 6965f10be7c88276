"""What a transformer keeps between two pieces of a sequence; its size does not depend on how long that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.attention.key_values import KeyValueCache
from titans_pytorch.memory.state import NeuralMemState, Updates


class LayerCache(NamedTuple):
    """One layer's part."""

    attention: KeyValueCache
    memory: NeuralMemState | None


class MACCache(NamedTuple):
    """Windows of attention and states of memories after `num_tokens` tokens.

    Everything else follows from that number: positions, and which long-term tokens are still to be inserted.
    """

    num_tokens: int
    windows: tuple[KeyValueCache, ...]  # of every layer
    memories: tuple[NeuralMemState, ...]  # of the layers that have one

    @staticmethod
    def of(num_tokens: int, layers: Iterable[LayerCache]) -> MACCache:
        windows, memories = zip(*layers, strict=True)
        return MACCache(num_tokens, windows, tuple(memory for memory in memories if memory is not None))

    def layers(self, have_memory: Iterable[bool]) -> list[LayerCache]:
        """Layer by layer, of a model whose layers have a memory, or not."""
        memories = iter(self.memories)
        return [
            LayerCache(window, next(memories) if has_memory else None)
            for window, has_memory in zip(self.windows, have_memory, strict=True)
        ]

    @property
    def batch(self) -> int:
        return self.windows[0].keys.shape[0]

    def detach(self) -> MACCache:
        """Cut from the graph of what came before, for truncated backpropagation through time."""
        return self._map(lambda t: t.detach(), lambda state: state.detach())

    def to(self, *args: Any, **kwargs: Any) -> MACCache:
        """Move to another device; the arguments of `torch.Tensor.to`."""
        return self._map(lambda t: t.to(*args, **kwargs), lambda state: state.to(*args, **kwargs))

    def select(self, rows: Tensor | slice | list[int]) -> MACCache:
        """The sequences with these numbers, in this order and as often as named: a beam search's next beams."""
        return self._map(lambda t: t[rows], lambda state: state.select(rows))

    def repeat(self, times: int) -> MACCache:
        """Every sequence `times` times in a row: (b) -> (b times)"""
        device = self.windows[0].keys.device
        return self.select(torch.arange(self.batch, device=device).repeat_interleave(times))

    def _map(
        self, tensors: Callable[[Tensor], Tensor], memories: Callable[[NeuralMemState], NeuralMemState]
    ) -> MACCache:
        windows = tuple(window.map(tensors) for window in self.windows)
        return self._replace(windows=windows, memories=tuple(map(memories, self.memories)))


def at_rest(state: NeuralMemState) -> NeuralMemState:
    """A state without what would keep the whole call that returned it alive: its weights over time, views of it."""
    updates = state.updates
    group = state.group if state.group.queries is None else state.group._replace(queries=state.group.queries.clone())
    updates = Updates(updates.first_chunk + updates.num_chunks, 0, state.states[0], [])
    return state._replace(updates=updates, group=group)
