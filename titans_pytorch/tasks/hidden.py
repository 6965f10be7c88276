"""Texts in which something is hidden, with a question at their end: bytes, of exactly the length that is asked for."""

from __future__ import annotations

import random
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Generator

from titans_pytorch.tasks import words
from titans_pytorch.tasks.task import NO_ANSWER, Metric, Questions, Task, check_range
from titans_pytorch.tasks.texts import documentation, haystack, piece

NOISE = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
SAID = (
    "{} {}s are {} and {}.",
    "The {} {} is {}, not {}.",
    "{} {}: {}, {}",
    "# {} {} = [{}, {}]",
    "For the {} {} it is: {} of {}.",
    "{} {} {{{}}} ({})",
)
"""What is told of numbers: of an adjective and a noun, two of them"""
TRIES = 100
"""Draws until one fits the length"""


class Written(NamedTuple):
    """What a task wants to say, but for the haystack."""

    before: str
    hidden: list[tuple[float, str]]  # depth in the haystack (0: its beginning, 1: its end), and a line
    after: list[tuple[str, bool]]  # pieces of text, and whether each is an answer


@dataclass(frozen=True)
class HiddenInText(Task):
    """Lines hidden in a haystack; answers at the end are given byte by byte, each after the right ones before it.

    An answer counts if all of its bytes are right, which is what greedy decoding would write.

    tokens: bytes of the whole, exactly
    haystack: noise, one sentence again and again; text; docs, Python's documentation, prose with few numbers; or
        numbers, sentences with many; several: every text has one of them
    data: the text, a file or a folder; None: the source of Python's own library
    """

    metric: ClassVar[Metric] = "exact match"
    haystacks_known: ClassVar[tuple[str, ...]] = ("noise", "text", "docs", "numbers")

    tokens: int = 1024
    haystack: str | Sequence[str] = "noise"
    data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("tokens", self.tokens, 1)
        if not self.haystacks or not set(self.haystacks) <= set(self.haystacks_known):
            known = ", ".join(self.haystacks_known)
            raise ValueError(f"haystack must be one or several of {known}, got {self.haystack!r}")

    @property
    def haystacks(self) -> tuple[str, ...]:
        """What a line may be hidden in."""
        return (self.haystack,) if isinstance(self.haystack, str) else tuple(self.haystack)

    @property
    def reads_data(self) -> bool:
        """Whether `data` decides anything."""
        return "text" in self.haystacks

    @property
    def num_tokens(self) -> int:
        return 256

    @abstractmethod
    def write(self, drawn: random.Random) -> Written:
        """What is hidden, and what is asked."""

    def hay(self, kind: str, length: int, drawn: random.Random) -> bytes:
        """So many bytes to hide something in, in lines."""
        if kind == "text":
            return piece(haystack(self.data), length, drawn)
        if kind == "numbers":
            return numbers(length, drawn)
        if kind == "docs":
            return piece(documentation(), length, drawn)
        return (NOISE * (length // len(NOISE) + 1))[:length]

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n): the bytes of each answer"""
        drawn = [self.draw_row(random.Random(int(torch.randint(2**62, (), generator=generator)))) for _ in range(rows)]
        both = np.array(drawn, dtype=np.int64).reshape(rows, 2, self.tokens + 1)
        text, is_answer = torch.from_numpy(both[:, 0]), torch.from_numpy(both[:, 1] == 1)
        return Questions(text[:, :-1], torch.where(is_answer, text, NO_ANSWER)[:, 1:])

    def draw_row(self, drawn: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """One text with a byte more than `tokens`, and which of its bytes are answers."""
        for _ in range(TRIES):
            before, hidden, after = self.write(drawn)
            written = len(before.encode()) + sum(len(line.encode()) + 1 for _, line in hidden)
            written += sum(len(text.encode()) for text, _ in after)
            if written <= self.tokens + 1:
                break
        else:
            raise ValueError(f"tokens must be at least {written - 1} for {type(self).__name__}, got {self.tokens}")
        kind = self.haystacks[0] if len(self.haystacks) == 1 else drawn.choice(self.haystacks)
        context = hide(self.hay(kind, self.tokens + 1 - written, drawn), hidden)
        pieces = [(before.encode() + context, False), *((text.encode(), is_answer) for text, is_answer in after)]
        text = np.frombuffer(b"".join(each for each, _ in pieces), dtype=np.uint8).astype(np.int64)
        return text, np.concatenate([np.full(len(each), is_answer) for each, is_answer in pieces])


def numbers(length: int, drawn: random.Random) -> bytes:
    """Sentences with numbers that nobody asks for."""
    lines, size = [], 0
    while size < length:
        told = (str(drawn.randrange(10 ** drawn.randint(1, 7))) for _ in range(2))
        line = drawn.choice(SAID).format(drawn.choice(words.ADJECTIVES), drawn.choice(words.NOUNS), *told)
        lines.append(line.encode() + b"\n")
        size += len(lines[-1])
    return b"".join(lines)[:length]


def hide(hay: bytes, hidden: list[tuple[float, str]]) -> bytes:
    """Put lines between those of a haystack, each at its depth or a little before."""
    hay = hay[:-1] + b"\n" if hay else hay
    ends = [0, *(place + 1 for place, byte in enumerate(hay) if byte == 10)]
    found, done = [], 0
    for depth, line in sorted(hidden, key=lambda each: each[0]):
        place = ends[bisect_right(ends, depth * len(hay)) - 1]
        found += [hay[done:place], line.encode(), b"\n"]
        done = place
    return b"".join([*found, hay[done:]])
