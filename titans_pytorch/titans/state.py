"""What a Titans model keeps between two pieces of a sequence; its size depends on the window, not on the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from titans_pytorch.attention.key_values import KeyValues
from titans_pytorch.fast_weights.interface import Weights
from titans_pytorch.memory.rows import Chosen, check_joinable, detached, joined, moved, num_chosen, selected
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.public_names import register_state


@register_state
class SegmentState(NamedTuple):
    """Where a sequence is in the segment of a MAC block."""

    context: KeyValues | None  # of what was read for the segment's tokens so far, h; None: no token yet
    before: Weights  # (b·h ...)  the memory before the segment
    tail: Tensor | None  # (b t dim)  the last tokens, as the convolution of queries needs them; None: none


@register_state
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
    return state if memory is None else state._replace(memory=memory.at_rest())


@register_state
class TitansState(NamedTuple):
    """What all blocks keep after `num_tokens` tokens."""

    num_tokens: int
    batch: int
    layers: tuple[Any, ...]  # the state of each block, of its mixer's State

    def detach(self) -> TitansState:
        """A state that is cut from the graph of what came before, for truncated backpropagation through time."""
        return detached(self)

    def to(self, *args: Any, **kwargs: Any) -> TitansState:
        """Move to another device; the arguments of `torch.Tensor.to`."""
        return moved(self, *args, **kwargs)

    def select(self, rows: Chosen) -> TitansState:
        """The sequences with these numbers, in this order and as often as named: a beam search's next beams."""
        return selected(self, rows, self.batch)._replace(batch=num_chosen(rows, self.batch))

    def repeat(self, times: int) -> TitansState:
        """Every sequence `times` times in a row: (b) -> (b times)"""
        return self.select([row for row in range(self.batch) for _ in range(times)])

    @staticmethod
    def join(states: Sequence[TitansState]) -> TitansState:
        """One batch of the sequences of several states that have seen equally many tokens, the inverse of `select`."""
        check_joinable(TitansState, states, lambda state: state.num_tokens)
        batch = sum(state.batch for state in states)
        return joined([state._replace(batch=batch) for state in states])
