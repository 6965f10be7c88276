"""Memories that store nothing for a while: what is left of a model is what it does without memorising."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from titans_pytorch.memory.core import MemoryCore


@contextmanager
def writes_off(model: nn.Module) -> Iterator[int]:
    """Inside, no memory of a model stores anything: all are read as they were, in a fresh sequence as training left
    them at their start, persistent tokens included.  Gives how many memories there are.

        with writes_off(model):
            frozen = model.loss(ids)          # the same checkpoint, without what is written at test time

    States pass through with their weights and momenta unchanged; what was seen inside leaves no trace afterwards.
    Calls with gradients train the start and the way it is read. Afterwards, every memory is as it was before.
    A step that was captured as a CUDA graph goes on as it was captured.
    """
    memories = [module for module in model.modules() if isinstance(module, MemoryCore)]
    before = [memory.writes_are_on for memory in memories]
    for memory in memories:
        memory.writes_are_on = False
    try:
        yield len(memories)
    finally:
        for memory, was_on in zip(memories, before, strict=True):
            memory.writes_are_on = was_on
