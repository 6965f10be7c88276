"""What a function that is run twice makes once: noted in the first run, taken from the notes in the second.

A span that training computes again (`memory.recompute`) makes most things anew, as they are many. What takes long and
is small may be noted instead, as far as there is room. Notes are taken in the order in which they were made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class Notes:
    """What a function notes in its first run, as far as there is room, and takes from there in its second.

    room: how many numbers may be noted
    known: in the second run, what the first one noted
    """

    def __init__(self, room: int = 0, known: Iterable[Tensor] = ()) -> None:
        self.room, self.known, self.is_full = room, deque(known), room == 0
        self.made: list[Tensor] = []

    def noted(self, make: Callable[[], Tensor]) -> Tensor:
        """What is made now, or was made before."""
        if self.known:
            return self.known.popleft()
        made = make()
        self.is_full |= made.numel() > self.room  # what comes later is not noted either: the order tells which is which
        if not self.is_full:
            self.room -= made.numel()
            self.made.append(made)
        return made

    def taken(self, num: int) -> list[Tensor]:
        """The next so many notes of the run before; none, and none from now on, if it had no room for all of them."""
        if len(self.known) < num:
            self.known.clear()
            return []
        return [self.known.popleft() for _ in range(num)]


NOTHING = Notes()
CURRENT: ContextVar[Notes] = ContextVar("notes of this run", default=NOTHING)


@contextmanager
def taking(notes: Notes) -> Iterator[Notes]:
    """What is made inside is noted there, or taken from there."""
    before = CURRENT.set(notes)
    try:
        yield notes
    finally:
        CURRENT.reset(before)


def current_notes() -> Notes:
    """Those of this run; without one, nothing is known and there is no room, nor while compiling."""
    return Notes() if torch.compiler.is_compiling() else CURRENT.get()
