"""Selective copying: a few tokens among many blanks, to be said again in their order (arXiv 2312.00752, 2403.17844)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from titans_pytorch.tasks.task import NO_ANSWER, Questions, Task, check_range, distinct


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """`copied` tokens at random places among blanks, a sign, and blanks at which the tokens are due one by one.

    Ids are the ordinary tokens, then the blank, then the sign. The defaults are those of MAD; Mamba's are
    `SelectiveCopying(tokens=4096 + 17)`.

    tokens: of the whole sequence, sign and answers included; vocabulary: ids in all, blank and sign included
    """

    tokens: int = 256
    vocabulary: int = 16
    copied: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("copied", self.copied, 1)
        check_range("vocabulary", self.vocabulary, 3)
        check_range("tokens", self.tokens, 2 * self.copied + 1)

    @property
    def num_tokens(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 2)

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n): the tokens in order, after the last `copied` blanks"""
        blank, sign, room = self.vocabulary - 2, self.vocabulary - 1, self.tokens - self.copied - 1
        copied = torch.randint(blank, (rows, self.copied), generator=generator)
        places = distinct(rows, self.copied, room, generator).sort(dim=1).values
        ids = torch.full((rows, self.tokens), blank).scatter(1, places, copied)
        ids[:, room] = sign
        answers = torch.full_like(ids, NO_ANSWER)
        answers[:, room + 1 :] = copied
        return Questions(ids, answers)
