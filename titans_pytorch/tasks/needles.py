"""Needles in a haystack, as RULER defines them (arXiv 2404.06654): one or many keys, values and questions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from titans_pytorch.tasks import words
from titans_pytorch.tasks.hidden import HiddenInText, Written
from titans_pytorch.tasks.task import check_range

STEPS = 40
"""Depths that needles are put at"""


@dataclass(frozen=True)
class Needles(HiddenInText):
    """Special magic numbers for words, somewhere in a text; at its end some of them are asked for.

    With several values or questions answers stand in the order of the text. Of an answer the digits alone are asked.

    haystack: noise, text, docs, numbers, or needles, of which one is asked for; several: every text has one of them
    num_keys: different keys that are hidden; num_values: values of each; num_queries: keys that are asked for
    key: words or uuids; value: numbers of 7 digits or uuids
    depth: of the first needle that is asked for, from 0 to 1; None: at random
    brief: `key: value` and `key:` instead of sentences, for short contexts (then it is not RULER's any more)
    """

    haystacks_known: ClassVar[tuple[str, ...]] = (*HiddenInText.haystacks_known, "needles")

    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    depth: float | None = None
    brief: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("num_keys", self.num_keys, 1, len(words.ADJECTIVES) * len(words.NOUNS) // 2)
        check_range("num_values", self.num_values, 1, words.MOST)
        check_range("num_queries", self.num_queries, 1, self.num_keys)
        if self.depth is not None:
            check_range("depth", self.depth, 0, 1)

    def write(self, drawn: random.Random) -> Written:
        keys = words.different(self.num_keys, self.draw_key, drawn)
        values = [words.different(self.num_values, self.draw_value, drawn) for _ in keys]
        needles = [(key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
        depths = self.draw_depths(len(needles), drawn)
        asked, answers = keys[: self.num_queries], [value for of_key in values[: self.num_queries] for value in of_key]
        hidden = [(depth, self.needle(*each)) for depth, each in zip(depths, needles, strict=True)]
        before, after = self.frame(asked, len(answers) > 1)
        told: list[tuple[str, bool]] = [(after, False)]
        for number, answer in enumerate(answers):
            told += [(", " if number else " ", False), (answer, True)]
        return Written(before, hidden, told)

    def draw_depths(self, count: int, drawn: random.Random) -> list[float]:
        """Where each needle lies, those of one key in the order of the text."""
        depths = [drawn.randrange(STEPS) / (STEPS - 1) for _ in range(count)]
        for first in range(0, count, self.num_values):
            depths[first : first + self.num_values] = sorted(depths[first : first + self.num_values])
        if self.depth is not None:
            depths[0] = self.depth
            depths[1 : self.num_values] = [max(self.depth, each) for each in depths[1 : self.num_values]]
        return depths

    def draw_key(self, drawn: random.Random) -> str:
        return words.key(drawn) if self.key == "words" else words.uuid(drawn)

    def draw_value(self, drawn: random.Random) -> str:
        return words.number(drawn, 7) if self.value == "numbers" else words.uuid(drawn)

    @property
    def kind(self) -> str:
        """What a value is called."""
        return self.value.removesuffix("s")

    def needle(self, key: str, value: str) -> str:
        """The line that is hidden."""
        return f"{key}: {value}" if self.brief else f"One of the special magic {self.kind}s for {key} is: {value}."

    def frame(self, asked: list[str], is_many: bool) -> tuple[str, str]:
        """What stands before the haystack and between it and the answers."""
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        if self.brief:
            return "", f"{query}:"
        kind, verb = (f"{self.kind}s", "are") if is_many else (self.kind, "is")
        begin = f"Some special magic {kind} are" if is_many else f"A special magic {kind} is"
        which = "are all the" if is_many else "is the"
        return (
            f"{begin} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n",
            f"What {which} special magic {kind} for {query} mentioned in the provided text? "
            f"The special magic {kind} for {query} mentioned in the provided text {verb}",
        )

    def hay(self, kind: str, length: int, drawn: random.Random) -> bytes:
        if kind != "needles":
            return super().hay(kind, length, drawn)
        lines, size = [], 0
        while size < length:
            lines.append(self.needle(self.draw_key(drawn), self.draw_value(drawn)).encode() + b"\n")
            size += len(lines[-1])
        return b"".join(lines)[:length]
