"""What a Titans model keeps between two pieces of a sequence; its size depends on the window, not on the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.attention.key_values import KeyValues
from titans_pytorch.fast_weights.interface import Weights
from titans_pytorch.mac.cache import at_rest
from titans_pytorch.memory.state import NeuralMemState

TensorFn = Callable[[Tensor], Tensor]


class SegmentState(NamedTuple):
    """Where a sequence is in the segment of a MAC block."""

    context: KeyValues | None  # of what was read for the segment's tokens so far, h; None: no token yet
    before: Weights  # (b·h ...)  the memory before the segment
    tail: Tensor | None  # (b t dim)  the last tokens, as the convolution of queries needs them; None: none


class LayerState(NamedTuple):
    """The state of any block as files hold it that were written before every mixer had a state of its own."""

    memory: NeuralMemState | None = None
    prefix: KeyValues | None = None
    recent: KeyValues | None = None
    segment: SegmentState | None = None


def parts_of(state: Any) -> frozenset[str]:
    """Names of what a state of a block holds in all of its tokens, as far as a mixer has it."""
    return frozenset(name for name in ("memory", "prefix", "segment") if getattr(state, name, None) is not None)


def resting(state: Any) -> Any:
    """The state of a block without what would keep the whole call that returned it alive."""
    memory = getattr(state, "memory", None)
    return state if memory is None else state._replace(memory=at_rest(memory))


class TitansState(NamedTuple):
    """All blocks after `num_tokens` tokens."""

    num_tokens: int
    batch: int
    layers: tuple[Any, ...]  # the state of each block, of its mixer's State

    def detach(self) -> TitansState:
        """Cut from the graph of what came before, for truncated backpropagation through time."""
        return self._map(lambda t: t.detach(), lambda t: t.detach(), lambda memory: memory.detach())

    def to(self, *args: Any, **kwargs: Any) -> TitansState:
        """Move to another device; the arguments of `torch.Tensor.to`."""
        return self._map(
            lambda t: t.to(*args, **kwargs), lambda t: t.to(*args, **kwargs), lambda memory: memory.to(*args, **kwargs)
        )

    def select(self, rows: Tensor | slice | list[int]) -> TitansState:
        """The sequences with these numbers, in this order and as often as named: a beam search's next beams."""

        def of_heads(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (self.batch, -1))[rows].flatten(0, 1)

        selected = self._map(lambda t: t[rows], of_heads, lambda memory: memory.select(rows))
        return selected._replace(batch=len(torch.arange(self.batch)[rows]))

    def repeat(self, times: int) -> TitansState:
        """Every sequence `times` times in a row: (b) -> (b times)"""
        return self.select([row for row in range(self.batch) for _ in range(times)])

    def _map(
        self, tensors: TensorFn, weights: TensorFn, memories: Callable[[NeuralMemState], NeuralMemState]
    ) -> TitansState:
        """fn of tensors whose first axis is the batch, of weights (b·h ...), which are dicts, and of memories."""

        def mapped(part: Any) -> Any:
            if isinstance(part, Tensor):
                return tensors(part)
            if isinstance(part, NeuralMemState):
                return memories(part)
            if isinstance(part, dict):
                return {name: weights(weight) for name, weight in part.items()}
            return type(part)(*map(mapped, part)) if isinstance(part, tuple) else part

        return self._replace(layers=tuple(map(mapped, self.layers)))
