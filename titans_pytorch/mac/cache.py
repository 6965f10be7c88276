"""What a transformer keeps between two pieces of a sequence; its size does not depend on how long that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from titans_pytorch.attention.key_values import KeyValueCache
from titans_pytorch.memory.rows import Chosen, check_joinable, detached, joined, moved, selected
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.public_names import register_state


class LayerCache(NamedTuple):
    """One layer's part."""

    attention: KeyValueCache
    memory: NeuralMemState | None


@register_state
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
        """The number of sequences."""
        return self.windows[0].keys.shape[0]

    def detach(self) -> MACCache:
        """A cache that is cut from the graph of what came before, for truncated backpropagation through time."""
        return detached(self)

    def to(self, *args: Any, **kwargs: Any) -> MACCache:
        """Move to another device; the arguments of `torch.Tensor.to`."""
        return moved(self, *args, **kwargs)

    def select(self, rows: Chosen) -> MACCache:
        """The sequences with these numbers, in this order and as often as named: a beam search's next beams."""
        return selected(self, rows, self.batch)

    def repeat(self, times: int) -> MACCache:
        """Every sequence `times` times in a row: (b) -> (b times)"""
        device = self.windows[0].keys.device
        return self.select(torch.arange(self.batch, device=device).repeat_interleave(times))

    @staticmethod
    def join(caches: Sequence[MACCache]) -> MACCache:
        """One batch of the sequences of several caches that have seen equally many tokens, the inverse of `select`."""
        check_joinable(MACCache, caches, lambda cache: cache.num_tokens)
        return joined(caches)
