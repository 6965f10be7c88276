"""What decodes rows at positions of their own: states go into buffers and come out of them, a step fills logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from titans_pytorch.decoding.due import Cadence, TokenStep


def have_hooks(*modules: nn.Module | None) -> bool:
    """Whether somebody watches calls of these modules, which decoding by rows does not make."""
    return any(
        each._forward_hooks or each._forward_pre_hooks or hasattr(each, "_hf_hook")
        for each in modules
        if each is not None
    )


class RowModel(ABC):
    """A model that reads one token of every row.

    Buffers are a tree of named tuples as states are (`memory.rows`), every tensor of which has a row's entry along its
    first axis, whatever the row's position is. A step writes them in place.
    """

    cadence: Cadence
    compiles = False  # whether steps are compiled

    @abstractmethod
    def fits(self, state: Any) -> bool:
        """Whether a state of the model can become rows."""

    @abstractmethod
    def enter(self, state: Any) -> Any:
        """The buffers of a state's sequences, as copies."""

    @abstractmethod
    def leave(self, buffers: Any, row: int, position: int) -> Any:
        """The state of one row that has read so many tokens, as a copy."""

    def prepared(self) -> RowModel:
        """The model with what is the same for all tokens worked out, for as long as parameters do not change."""
        return self

    @abstractmethod
    def read_between(self, buffers: Any, positions: Sequence[int]) -> None:
        """Read what is no token of theirs and stands before the next token of some rows, which have read so many."""

    @abstractmethod
    def step(self, positions: Sequence[int]) -> TokenStep:
        """What is due at the next token of rows that have read so many."""

    @abstractmethod
    def hidden(self, x: Tensor, buffers: Any, step: TokenStep) -> Tensor:
        """All layers, for the next token of each row; a function of tensors alone.  x: (b 1 dim) -> same, normed"""

    @abstractmethod
    def logits(self, ids: Tensor, buffers: Any, step: TokenStep) -> Tensor:
        """Logits of the token after the next one of each row.  ids: (b) -> (b num_tokens)"""
