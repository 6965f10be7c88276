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
    """Of MAC: where the stream is in its segment."""

    context: KeyValues | None  # of what was read for the segment's tokens so far, h; None: no token yet
    before: Weights  # (b·h ...)  the memory before the segment
    tail: Tensor | None  # (b t dim)  the last tokens, as the convolution of queries needs them; None: none


class LayerState(NamedTuple):
    """Of one block; what its mixer has no use for is None."""

    memory: NeuralMemState | None = None
    prefix: KeyValues | None = None  # of the persistent tokens
    recent: KeyValues | None = None  # of the window before the next token, or of its segment so far
    segment: SegmentState | None = None

    @property
    def parts(self) -> frozenset[str]:
        """What of it every state of such a model has."""
        found = {"memory": self.memory, "prefix": self.prefix, "segment": self.segment}
        return frozenset(name for name, part in found.items() if part is not None)

    def at_rest(self) -> LayerState:
        """Without what would keep the whole call that returned it alive."""
        return self if self.memory is None else self._replace(memory=at_rest(self.memory))


class TitansState(NamedTuple):
    """All blocks after `num_tokens` tokens."""

    num_tokens: int
    batch: int
    layers: tuple[LayerState, ...]

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
        """fn of tensors whose first axis is the batch, of weights (b·h ...) and of memories."""

        def pairs(given: KeyValues | None) -> KeyValues | None:
            return None if given is None else given.map(tensors)

        def segment(given: SegmentState | None) -> SegmentState | None:
            if given is None:
                return None
            before = {name: weights(weight) for name, weight in given.before.items()}
            return SegmentState(pairs(given.context), before, None if given.tail is None else tensors(given.tail))

        layers = (
            LayerState(
                None if layer.memory is None else memories(layer.memory),
                pairs(layer.prefix),
                pairs(layer.recent),
                segment(layer.segment),
            )
            for layer in self.layers
        )
        return self._replace(layers=tuple(layers))
