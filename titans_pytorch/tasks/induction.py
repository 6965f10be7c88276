"""Induction heads: what came after the special token, when it comes for the second time (arXiv 2312.00752, E.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from titans_pytorch.tasks.task import NO_ANSWER, Questions, Task, check_range


@dataclass(frozen=True)
class InductionHeads(Task):
    """Random tokens with a special one somewhere and at the end: due is what followed it the first time.

    Trained at 256 tokens, asked at 2^6 to 2^17 and beyond. Ids are the ordinary tokens, then the special one.

    vocabulary: ids in all, the special one included
    """

    tokens: int = 256
    vocabulary: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("tokens", self.tokens, 4)
        check_range("vocabulary", self.vocabulary, 3)

    @property
    def num_tokens(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 1)

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n), due after the last token alone"""
        special = self.vocabulary - 1
        ids = torch.randint(special, (rows, self.tokens), generator=generator)
        place = torch.randint(self.tokens - 2, (rows, 1), generator=generator)
        answers = torch.full_like(ids, NO_ANSWER)
        answers[:, -1:] = ids.gather(1, place + 1)
        ids = ids.scatter(1, place, special)
        ids[:, -1] = special
        return Questions(ids, answers)
