"""MAD's memorisation: a map that is the same in all sequences, and has to be learned in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from titans_pytorch.tasks.task import NO_ANSWER, Questions, Task, check_range


@dataclass(frozen=True)
class Memorization(Task):
    """Keys, each followed by a sign after which its value is due; values are never shown.

    After arXiv 2403.17844. Ids are the keys, as many values, then the sign.

    tokens: an even number; map_seed: decides the map
    """

    tokens: int = 32
    vocabulary: int = 256
    map_seed: int = 12345

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("vocabulary", self.vocabulary, 3)
        if self.tokens < 2 or self.tokens % 2:
            raise ValueError(f"tokens must be an even number, at least 2, got {self.tokens}")

    @property
    def num_keys(self) -> int:
        return (self.vocabulary - 1) // 2

    @property
    def num_tokens(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / self.num_keys

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n): the value of each key, after the sign behind it"""
        values = self.num_keys + torch.randperm(self.num_keys, generator=Generator().manual_seed(self.map_seed))
        keys = torch.randint(self.num_keys, (rows, self.tokens // 2), generator=generator)
        ids = torch.full((rows, self.tokens), self.vocabulary - 1)
        answers = torch.full_like(ids, NO_ANSWER)
        ids[:, 0::2], answers[:, 1::2] = keys, values[keys]
        return Questions(ids, answers)
