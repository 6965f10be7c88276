"""MAD's fuzzy recall: keys and values are motifs of one to three tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Generator

from titans_pytorch.tasks.task import NO_ANSWER, Questions, Task, check_range

Motif = tuple[int, ...]


@dataclass(frozen=True)
class FuzzyRecall(Task):
    """Motifs and what follows them, by a map that each sequence draws for itself; a motif seen before is a question.

    After arXiv 2403.17844. Ids are those of keys, then those of values, then the pad at the end of a sequence. Every
    token of a value is asked for.

    vocabulary: ids of keys and values together; motif: tokens of one at most; pairs: different ones in a sequence
    """

    tokens: int = 128
    vocabulary: int = 16
    motif: int = 3
    pairs: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("vocabulary", self.vocabulary, 4)
        check_range("motif", self.motif, 1)
        check_range("pairs", self.pairs, 1, (self.vocabulary // 2) ** self.motif)
        check_range("tokens", self.tokens, 4 * self.motif * self.pairs)

    @property
    def num_tokens(self) -> int:
        return self.vocabulary + 1

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n): each token of a value whose key was seen before"""
        ids = torch.full((rows, self.tokens), self.vocabulary)
        answers = torch.full((rows, self.tokens), NO_ANSWER)
        for row in range(rows):
            drawn = random.Random(int(torch.randint(2**62, (), generator=generator)))
            pairs = list(self.draw_map(drawn).items())
            place, seen = 0, set()
            while True:
                key, value = pairs[drawn.randrange(len(pairs))]
                end = place + len(key) + len(value)
                if end > self.tokens:
                    break
                ids[row, place:end] = torch.tensor(key + value)
                if key in seen:
                    answers[row, place + len(key) - 1 : end - 1] = torch.tensor(value)
                seen.add(key)
                place = end
        return Questions(ids, answers)

    def draw_map(self, drawn: random.Random) -> dict[Motif, Motif]:
        """Different keys, each with a value of its own."""
        half, found = self.vocabulary // 2, dict[Motif, Motif]()
        while len(found) < self.pairs:
            key = tuple(drawn.randrange(half) for _ in range(drawn.randint(1, self.motif)))
            value = tuple(drawn.randrange(half, self.vocabulary) for _ in range(drawn.randint(1, self.motif)))
            found.setdefault(key, value)
        return found
