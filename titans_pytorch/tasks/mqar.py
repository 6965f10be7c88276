"""Multi-query associative recall: pairs of key and value, then keys whose values are asked for, beyond the window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from titans_pytorch.tasks.task import NO_ANSWER, Questions, Task, check_range, distinct

BLANK = 0


@dataclass(frozen=True)
class MQAR(Task):
    """`pairs` times (key, value), a gap, and the keys once more at random places; after each its value is due.

    Ids are 0 for a blank, then `keys` of which keys consist, then the values. `MQAR.zoology` has the parameters of
    arXiv 2312.04927.

    Args:
        pairs: how many
        keys: of which they are drawn
        tokens: of a sequence
        gap: blanks at least between the pairs and the first question, so that no attention over fewer tokens reaches
            across
        values: how many there are; None: as many as keys
        key_tokens: tokens of a key, which keys share among each other
        overwritten: so many pairs are written a second time, with another value, after all others; the last one counts
        filler: what stands where nothing is asked: a blank, or any token at random
        power: questions follow soon on the pairs: at the gap g with a probability as g^(power-1); None: anywhere
    """

    pairs: int = 8
    keys: int = 64
    tokens: int = 96
    gap: int = 16
    values: int | None = None
    key_tokens: int = 1
    overwritten: int = 0
    filler: Literal["blank", "random"] = "blank"
    power: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("pairs", self.pairs, 1)
        check_range("keys", self.keys, 1)
        check_range("key_tokens", self.key_tokens, 1)
        check_range("gap", self.gap, 0)
        needed = self.first_place + self.pairs * self.width
        if self.pairs > self.keys**self.key_tokens or self.tokens < needed:
            raise ValueError(f"a task needs pairs <= keys and tokens >= {needed}, got {self}")
        check_range("overwritten", self.overwritten, 0, self.pairs)
        check_range("values", self.num_values, self.pairs + self.overwritten)
        if self.power is not None and not 0 < self.power <= 1:
            raise ValueError(f"power must be None or above 0 and at most 1, got {self.power}")

    @classmethod
    def zoology(cls, tokens: int = 512, pairs: int = 64, vocabulary: int = 8192) -> MQAR:
        """As arXiv 2312.04927 draws it: half of the vocabulary keys, questions soon after the pairs (power 0.01)."""
        keys = vocabulary // 2 - 1
        return cls(pairs=pairs, keys=keys, values=vocabulary - 1 - keys, tokens=tokens, gap=0, power=0.01)

    @property
    def num_values(self) -> int:
        return self.keys if self.values is None else self.values

    @property
    def num_tokens(self) -> int:
        return 1 + self.keys + self.num_values

    @property
    def chance(self) -> float:
        return 1 / self.num_values

    @property
    def first_place(self) -> int:
        """Where questions may begin."""
        return (self.key_tokens + 1) * (self.pairs + self.overwritten) + self.gap

    @property
    def width(self) -> int:
        """Tokens from the place of one question to the next."""
        return self.key_tokens if self.power is None else self.key_tokens + 1

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n): the value where a key is asked for"""
        keys = self.draw_keys(rows, generator)  # (b pairs key_tokens)
        values = 1 + self.keys + distinct(rows, self.pairs + self.overwritten, self.num_values, generator)
        places = self.draw_places(rows, generator)
        due, again = values[:, : self.pairs], keys[:, :0]
        if self.overwritten:
            which = distinct(rows, self.overwritten, self.pairs, generator)
            due = due.scatter(1, which, values[:, self.pairs :])
            again = keys.gather(1, which.unsqueeze(-1).expand(-1, -1, self.key_tokens))
        written = torch.cat((torch.cat((keys, again), dim=1), values.unsqueeze(-1)), dim=2).flatten(1)
        ids = torch.full((rows, self.tokens), BLANK)
        if self.filler == "random":
            ids = torch.randint(self.num_tokens, ids.shape, generator=generator)
        ids[:, : written.shape[1]] = written
        for token in range(self.key_tokens):
            ids.scatter_(1, places + token, keys[..., token])
        answers = torch.full((rows, self.tokens), NO_ANSWER)
        return Questions(ids, answers.scatter(1, places + self.key_tokens - 1, due))

    def draw_keys(self, rows: int, generator: Generator) -> Tensor:
        """Different keys in each row.  -> ids (b pairs key_tokens)"""
        if self.key_tokens == 1:
            return 1 + distinct(rows, self.pairs, self.keys, generator).unsqueeze(-1)
        # Numbers in order, then one more from each to the next: different, however many there are to choose from.
        among = self.keys**self.key_tokens - self.pairs + 1
        numbers = torch.randint(among, (rows, self.pairs), generator=generator).sort(dim=1).values
        numbers = numbers + torch.arange(self.pairs)
        numbers = numbers.gather(1, distinct(rows, self.pairs, self.pairs, generator))
        digits = [numbers // self.keys**place % self.keys for place in range(self.key_tokens)]
        return 1 + torch.stack(digits, dim=-1)

    def draw_places(self, rows: int, generator: Generator) -> Tensor:
        """Where the key of each question begins.  -> (b pairs)"""
        slots = (self.tokens - self.first_place) // self.width
        if self.power is None:
            return self.first_place + self.width * distinct(rows, self.pairs, slots, generator)
        weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.power - 1)
        # The smallest of exponential times, each at its own rate, are a draw without replacement by these weights.
        times = -torch.rand(rows, slots, dtype=torch.float64, generator=generator).log() / weights
        return self.first_place + self.width * times.argsort(dim=1)[:, : self.pairs]
