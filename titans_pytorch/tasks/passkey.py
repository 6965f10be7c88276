"""Passkey retrieval (arXiv 2305.16300): a number of five digits in an endless meadow."""

from __future__ import annotations

import random
from dataclasses import dataclass

from titans_pytorch.tasks import words
from titans_pytorch.tasks.hidden import HiddenInText, Written
from titans_pytorch.tasks.task import check_range


@dataclass(frozen=True)
class Passkey(HiddenInText):
    """The pass key is said twice in a line somewhere, and asked for at the end.

    depth: of that line, from 0 to 1; None: at random
    """

    depth: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None:
            check_range("depth", self.depth, 0, 1)

    def write(self, drawn: random.Random) -> Written:
        key, depth = words.number(drawn, 5), drawn.random()
        before = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
            "I will quiz you about the important information there.\n"
        )
        line = f"The pass key is {key}. Remember it. {key} is the pass key."
        question = "What is the pass key? The pass key is "
        hidden = [(depth if self.depth is None else self.depth, line)]
        return Written(before, hidden, [(question, False), (key, True)])
