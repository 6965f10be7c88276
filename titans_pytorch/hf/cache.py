"""What `generate` calls `past_key_values`: states of constant size, which can be selected by row and taken back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.decoding import RowBatch, RowModel
from titans_pytorch.ragged import Marks, RaggedState, read_marked
from titans_pytorch.ragged.reading import Read
from titans_pytorch.ragged.state import settled

MakeRows = Callable[[], RowModel | None]
"""What decodes rows at positions of their own as one batch, asked for where there are some; None: nothing does"""

MAX_PAST_CALLS = 64
"""An assistant model drafts a token per call, 20 by default, and takes several calls back at once"""


@dataclass(frozen=True)
class Fed:
    """Columns of a batch that a model was given."""

    embeddings: Tensor  # (b n dim)
    mask: Tensor | None  # (b n); None: all are real

    @property
    def num_columns(self) -> int:
        return self.embeddings.shape[1]

    def split(self, at: int) -> tuple[Fed, Fed]:
        """The first so many columns, and the others."""
        return self.columns(slice(at)), self.columns(slice(at, None))

    def columns(self, some: slice) -> Fed:
        """Some columns of all rows."""
        return Fed(self.embeddings[:, some], None if self.mask is None else self.mask[:, some])

    def of_rows(self, rows: Tensor) -> Fed:
        """Some rows of the batch, in any order."""
        rows = rows.to(self.embeddings.device)
        return Fed(self.embeddings[rows], None if self.mask is None else self.mask[rows])

    def then(self, other: Fed) -> Fed:
        """These columns, and others behind them."""
        embeddings = torch.cat((self.embeddings, other.embeddings), dim=1)
        if self.mask is None and other.mask is None:
            return Fed(embeddings, None)
        masks = [
            torch.ones_like(fed.embeddings[..., 0], dtype=torch.bool) if fed.mask is None else fed.mask
            for fed in (self, other)
        ]
        return Fed(embeddings, torch.cat(masks, dim=1))


class Before(NamedTuple):
    """Where a call began, and what it was fed; states are values, so keeping one copies nothing."""

    state: Any
    num_columns: int
    fed: Fed


class TitansCache:
    """What rows have read so far, for `past_key_values`; its size does not depend on how much that is.

    It is no `transformers.Cache`, whose layers hold keys and values. Beams are rows of states. A rollback goes back to
    where a call began, and what stays of its tokens is read once more with the next call: exact, as pieces of any
    length give what one call gives.

    Args:
        max_past_calls: calls that `crop` can take back, once they are recorded
    """

    is_compileable = False  # else generate makes masks of four dimensions
    is_initialized = True
    is_croppable = True
    layers: tuple[()] = ()

    def __init__(self, max_past_calls: int = MAX_PAST_CALLS) -> None:
        self.max_past_calls = max_past_calls
        self.reset()

    def reset(self) -> None:
        """Forget all that was read."""
        self.state: Any = None  # of the library, a RaggedState where rows differ; None: nothing was read, or `rows` did
        self.rows: RowBatch | None = None  # rows at positions of their own, while they are decoded token by token
        self.batch_size = -1  # rows; -1: nothing was read
        self.num_read = 0  # columns that the state has read, padding included
        self.pending: Fed | None = None  # columns after them, to be read with the next call
        self.records_past = False
        self.past: deque[Before] = deque(maxlen=self.max_past_calls)

    # ---- reading

    def advance(self, read: Read, fed: Fed, num_asked: int = 0, by_rows: MakeRows | None = None) -> Tensor:
        """Read the next columns of all rows.  -> (b n ...), 0 at padding

        num_asked: of so many last columns logits will be computed, which may be taken back: while the past is recorded
        a checkpoint is made before them; 0: all; by_rows: None: rows are read by groups of equal length
        """
        num_new, batch = fed.num_columns, len(fed.embeddings)
        if self.batch_size not in (-1, batch):
            raise ValueError(f"past_key_values must be of the input's batch size {batch}, got {self.batch_size}")
        fed = fed if self.pending is None else self.pending.then(fed)
        split = fed.num_columns - num_asked if self.records_past and 0 < num_asked < fed.num_columns else 0
        outputs = []
        for part in fed.split(split):
            if part.num_columns:
                if self.goes_by_rows(part, by_rows):
                    outputs.append(self.rows.read(part.embeddings).unsqueeze(2))  # type: ignore[union-attr]
                    self.batch_size, self.num_read, self.pending = batch, self.num_read + 1, None
                    continue
                self.settle()
                before = Before(self.state, self.num_read, part)
                outputs.append(self.read_part(read, part))
                if self.records_past:
                    self.past.append(before)
                self.batch_size, self.num_read, self.pending = batch, self.num_read + part.num_columns, None
        return torch.cat(outputs, dim=1)[:, -num_new:]

    def read_part(self, read: Read, part: Fed) -> Tensor:
        """Read columns, of which all may be padding."""
        x, mask = part.embeddings, part.mask
        if mask is not None and not mask.any():
            like = read(x[:1, :1], None)[0]
            return like.new_zeros(*x.shape[:2], *like.shape[2:])
        outputs, self.state = read_marked(read, x, Marks(mask, None), self.state)
        return outputs

    def goes_by_rows(self, part: Fed, by_rows: MakeRows | None) -> bool:
        """Whether columns are one token of each row, at positions of their own; the state becomes rows then."""
        if by_rows is None or self.records_past or part.mask is not None or part.num_columns > 1:
            return False
        state = self.state
        differs = isinstance(state, RaggedState) and state.documents is None
        if not (differs or self.rows) or (model := by_rows()) is None:
            return False
        if differs and all(map(model.fits, state.states)):
            self.rows, self.state = RowBatch.of_groups(model, state.groups), None
        if self.rows is not None:
            self.rows.model = model  # as it is now
        return self.rows is not None

    def settle(self) -> None:
        """Rows become a state again, which is a value."""
        if self.rows is not None:
            self.state = settled(RaggedState.join([self.rows.state(row) for row in range(self.rows.batch)]))
            self.rows = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies are made of: no rows, which know the model."""
        self.settle()
        return self.__dict__

    # ---- taking back, for assisted decoding and prompt lookup

    def activate_past_recording(self) -> None:
        """From now on, keep what is needed to take the last calls back."""
        self.records_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back this many tokens of every row, as a negative number."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number, of tokens to take back, got {tokens_to_remove}")
        target = self.get_seq_length() + tokens_to_remove
        if target < 0:
            raise ValueError(f"crop can take back {self.get_seq_length()} token(s) at most, got {tokens_to_remove}")
        while self.num_read > target:
            if not self.past:
                raise RuntimeError(
                    "crop can take back calls that were recorded, after activate_past_recording(), and of these the "
                    f"last {self.max_past_calls}: past_key_values=TitansCache(max_past_calls=...) keeps more"
                )
            self.state, self.num_read, self.pending = self.past.pop()
        stays = target - self.num_read
        self.pending = self.pending.columns(slice(stays)) if self.pending is not None and stays else None

    # ---- rows, for beams

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order and as often as named; what was recorded of the past is forgotten."""
        self.past.clear()
        if self.pending is not None:
            self.pending = self.pending.of_rows(indices)
        if self.state is not None:
            self.state = self.state.select(indices)
        if self.rows is not None:
            self.rows = self.rows.select(indices.tolist())
        if self.batch_size >= 0:
            self.batch_size = len(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """A beam search's next beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times in a row."""
        if self.batch_size >= 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    # ---- what transformers asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that every row was fed, padding included."""
        return self.num_read + (0 if self.pending is None else self.pending.num_columns)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """There is no longest sequence: -1."""
        return -1

    def has_previous_state(self, *_: Any) -> bool:
        """Whether anything was read."""
        return self.get_seq_length() > 0
