"""bAbI's stories between the lines of any text, after BABILong (arXiv 2406.10149)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from titans_pytorch.tasks import babi
from titans_pytorch.tasks.hidden import HiddenInText, Written
from titans_pytorch.tasks.task import check_range


@dataclass(frozen=True)
class BABILong(HiddenInText):
    """A story's facts, in their order, at random places of a long text; the question comes after it.

    The published one has stories of bAbI between sentences of PG19; with other texts name it BABILong-style. Stories
    that do not fit the length are drawn again.

    task: number of bAbI's task, 1 to 5 (1 to 20 with the original files)
    babi: archive or folder of the original files; None: stories by our own simulator; part: train or test, of them
    """

    haystack: Literal["noise", "text", "needles"] = "text"
    task: int = 1
    babi: str | None = None
    part: Literal["train", "test"] = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("task", self.task, 1, 5 if self.babi is None else 20)
        if self.part not in ("train", "test"):
            raise ValueError(f"part must be train or test, got {self.part!r}")

    @property
    def chance(self) -> float:
        return 1 / len(babi.LABELS[self.task]) if self.task in babi.LABELS else 0.0

    def write(self, drawn: random.Random) -> Written:
        if self.babi is None:
            facts, question, answer = babi.simulate(self.task, drawn)
        else:
            facts, question, answer = drawn.choice(babi.stories(self.babi, self.task, self.part))
        depths = sorted(drawn.random() for _ in facts)
        hidden = list(zip(depths, facts, strict=True))
        told = [(f"</context>\n\nQuestion: {question}\nAnswer: ", False), (answer, True)]
        return Written("<context>\n", hidden, told)
