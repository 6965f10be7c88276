"""MAD's compression: one token has to hold a whole sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from titans_pytorch.tasks.task import NO_ANSWER, Questions, Task, check_range


@dataclass(frozen=True)
class Compression(Task):
    """Random tokens and a sign: from what a model makes of the sign alone, every token has to be told again.

    After arXiv 2403.17844: a small network that is trained with the model maps the last token's features and a
    position to the token there, so `reads_last` is on and `answers` says what is due for each position. Ids are the
    ordinary tokens, then the sign.
    """

    reads_last: ClassVar[bool] = True

    tokens: int = 32
    vocabulary: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("tokens", self.tokens, 2)
        check_range("vocabulary", self.vocabulary, 3)

    @property
    def num_tokens(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 1)

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n): each token at its own place, nothing at the sign"""
        ids = torch.randint(self.vocabulary - 1, (rows, self.tokens), generator=generator)
        ids[:, -1] = self.vocabulary - 1
        answers = ids.clone()
        answers[:, -1] = NO_ANSWER
        return Questions(ids, answers)
