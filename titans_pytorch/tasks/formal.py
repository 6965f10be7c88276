"""Formal languages: parity, counting modulo a number, and a^n b^n."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from titans_pytorch.tasks.task import NO_ANSWER, Questions, Task, check_range

A, B, END, NO, YES, PAD = range(6)


@dataclass(frozen=True)
class ModularCounting(Task):
    """Digits below `modulus`; after each, the sum of all so far modulo that number is due. With 2 it is parity."""

    tokens: int = 64
    modulus: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("tokens", self.tokens, 1)
        check_range("modulus", self.modulus, 2)

    @property
    def num_tokens(self) -> int:
        return self.modulus

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n) at every token"""
        ids = torch.randint(self.modulus, (rows, self.tokens), generator=generator)
        return Questions(ids, ids.cumsum(dim=1) % self.modulus)


@dataclass(frozen=True)
class Parity(ModularCounting):
    """Bits; after each it is due whether there was an odd number of ones so far."""

    modulus: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("modulus", self.modulus, 2, 2)


@dataclass(frozen=True)
class AnBn(Task):
    """Is it a^n b^n?  Half of the words are; the others are so but for one letter, or have two letters in wrong order.

    Ids are a, b, the end of the word, no, yes, and what stands before a word that is shorter than there is room for.
    """

    tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("tokens", self.tokens, 3)

    @property
    def num_tokens(self) -> int:
        return 6

    @property
    def chance(self) -> float:
        return 0.5

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n), yes or no after the end"""
        room = self.tokens - 1
        half = torch.randint(1, room // 2 + 1, (rows, 1), generator=generator)
        place = torch.arange(room).expand(rows, -1) - room + 2 * half  # in the word, below 0 before it
        word = torch.where(place < half, A, B)
        one = (torch.rand(rows, 1, generator=generator) * 2 * half).long()  # a letter of the word
        other = (torch.rand(rows, 1, generator=generator) * half).long()
        swapped = torch.stack((other, half + (one % half)))  # an a and a b
        is_right = torch.rand(rows, 1, generator=generator) < 0.5
        is_swap = torch.rand(rows, 1, generator=generator) < 0.5
        changed = torch.where(is_swap, (place == swapped).any(dim=0), place == one)
        word = torch.where(changed & ~is_right, A + B - word, word)
        ids = torch.cat((torch.where(place < 0, PAD, word), torch.full((rows, 1), END)), dim=1)
        answers = torch.full_like(ids, NO_ANSWER)
        answers[:, -1:] = torch.where(is_right, YES, NO)
        return Questions(ids, answers)
