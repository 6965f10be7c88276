"""Multi-query associative recall: pairs of key and value, then keys whose values are asked for, beyond the window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from titans_pytorch.tasks.task import NO_ANSWER, Questions, Task

BLANK = 0


@dataclass(frozen=True)
class MQAR(Task):
    """`pairs` times (key, value), a gap, and the keys once more at random places; after each its value is due.

    Ids are 0 for a blank, then `keys` keys, then as many values.

    Args:
        pairs: how many
        keys: of which they are drawn, and as many values
        tokens: of a sequence
        gap: blanks at least between the pairs and the first question, so that no attention over fewer tokens reaches
            across
    """

    pairs: int = 8
    keys: int = 64
    tokens: int = 96
    gap: int = 16

    def __post_init__(self) -> None:
        needed = 3 * self.pairs + self.gap
        if self.pairs > self.keys or self.tokens < needed:
            raise ValueError(f"a task needs pairs <= keys and tokens >= {needed}, got {self}")

    @property
    def num_tokens(self) -> int:
        return 1 + 2 * self.keys

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n): the value where a key is asked for"""

        def choose(count: int, among: int) -> torch.Tensor:
            return torch.rand(rows, among, generator=generator).argsort(dim=1)[:, :count]

        keys, values = 1 + choose(self.pairs, self.keys), 1 + self.keys + choose(self.pairs, self.keys)
        first = 2 * self.pairs + self.gap
        places = first + choose(self.pairs, self.tokens - first)
        ids = torch.full((rows, self.tokens), BLANK)
        answers = torch.full((rows, self.tokens), NO_ANSWER)
        ids[:, 0 : 2 * self.pairs : 2], ids[:, 1 : 2 * self.pairs : 2] = keys, values
        return Questions(ids.scatter(1, places, keys), answers.scatter(1, places, values))
