"""MAD's in-context recall, plain and noisy: pairs come again and again, and every key that was seen is a question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator
from torch.nn import functional as F

from titans_pytorch.tasks.task import NO_ANSWER, Questions, Task, check_range, distinct


@dataclass(frozen=True)
class InContextRecall(Task):
    """Pairs of key and value by a map that each sequence draws for itself; a key seen before asks for its value.

    Tasks "in-context recall" and, with noise, "noisy recall" of MAD (arXiv 2403.17844). Ids are the keys, as many
    values, then the noise.

    vocabulary: keys and values together; noise: share of tokens that are noise, between pairs; noise_vocabulary: of it
    """

    tokens: int = 128
    vocabulary: int = 16
    noise: float = 0.0
    noise_vocabulary: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("vocabulary", self.vocabulary, 4)
        check_range("noise", self.noise, 0, 0.95)
        check_range("noise_vocabulary", self.noise_vocabulary, 1)
        if self.num_pairs < 2:
            raise ValueError(
                f"tokens must hold at least 2 pairs beside a share of {self.noise} of noise, got {self.tokens}"
            )

    @property
    def num_pairs(self) -> int:
        return (self.tokens - round(self.noise * self.tokens)) // 2

    @property
    def num_noise(self) -> int:
        """Tokens of noise: a token that would be left alone is noise, or a pair's if there is none."""
        return self.tokens - 2 * self.num_pairs

    @property
    def num_tokens(self) -> int:
        return self.vocabulary + (self.noise_vocabulary if self.num_noise else 0)

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n): the value, after each key that was seen before"""
        count, noise, num_keys = self.num_pairs, self.num_noise, self.vocabulary // 2
        values = torch.randint(num_keys, self.vocabulary, (rows, num_keys), generator=generator)
        keys = torch.randint(num_keys, (rows, count), generator=generator)
        times = F.one_hot(keys, num_keys).cumsum(dim=1).gather(2, keys.unsqueeze(-1)).squeeze(-1)
        due = values.gather(1, keys)
        # Items in a random order: pairs are two tokens wide, noise is one.
        order = distinct(rows, count + noise, count + noise, generator)
        width = torch.where(order < count, 2, 1)
        begins = width.cumsum(dim=1) - width
        places = begins[order < count].view(rows, count)
        ids = torch.randint(
            self.vocabulary, self.vocabulary + self.noise_vocabulary, (rows, self.tokens), generator=generator
        )
        ids = ids.scatter(1, places, keys).scatter(1, places + 1, due)
        answers = torch.full((rows, self.tokens), NO_ANSWER)
        return Questions(ids, answers.scatter(1, places, torch.where(times > 1, due, NO_ANSWER)))
