"""A call of a memory for rows that differ in length."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from titans_pytorch.memory.core import MemoryCore
from titans_pytorch.memory.growing import advance_growing
from titans_pytorch.memory.layout import Layout
from titans_pytorch.memory.pieces import StoredTokens
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.ragged import Marks, read_marked


def check_for_each_row(**given: bool) -> None:
    """Refuse what only rows at one position have."""
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise ValueError(f"{wrong[0]} is of rows at one position, got it with padding, documents or a RaggedState")


def advance_ragged(
    memory: MemoryCore, queries: Tensor, new: StoredTokens, marks: Marks, state: Any, layout: Layout
) -> tuple[Tensor, Any]:
    """What `advance` gives, row by row as alone: views and the mask of what is stored move with their tokens."""
    views = list(dict.fromkeys((queries, new.keys, new.values)))  # those that differ
    masks = [] if new.is_stored is None else [new.is_stored[..., None].to(queries.dtype)]

    def read(piece: Tensor, before: NeuralMemState | None) -> tuple[Tensor, NeuralMemState]:
        parts = dict(zip(views, piece.split(memory.dim, dim=-1), strict=False))
        is_stored = piece[..., -1] > 0 if masks else None
        stored = StoredTokens(parts[new.keys], parts[new.values], is_stored)
        retrieved, after, _ = advance_growing(memory, parts[queries], stored, before, None, layout)
        return cast(Tensor, retrieved), after.at_rest()

    return read_marked(read, torch.cat([*views, *masks], dim=-1), marks, state)
