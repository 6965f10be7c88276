"""bAbI's stories between the lines of any text, after BABILong (arXiv 2406.10149)."""

from __future__ import annotations

import random
from collections.abc import Sequence
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

    task: number of bAbI's task, 1 to 5 (1 to 20 with the original files); several: every text is of one of them
    babi: archive or folder of the original files; None: stories by our own simulator; part: train or test, of them
    """

    haystack: str | Sequence[str] = "text"
    task: int | Sequence[int] = 1
    babi: str | None = None
    part: Literal["train", "test"] = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError("task must name at least one of bAbI's tasks, got none")
        for task in self.tasks:
            check_range("task", task, 1, 5 if self.babi is None else 20)

    @property
    def tasks(self) -> tuple[int, ...]:
        """Numbers of bAbI's tasks."""
        return (self.task,) if isinstance(self.task, int) else tuple(self.task)

    @property
    def chance(self) -> float:
        each = [1 / len(babi.LABELS[task]) if task in babi.LABELS else 0.0 for task in self.tasks]
        return sum(each) / len(each)

    def write(self, drawn: random.Random) -> Written:
        task = self.tasks[0] if len(self.tasks) == 1 else drawn.choice(self.tasks)
        if self.babi is None:
            facts, question, answer = babi.simulate(task, drawn)
        else:
            facts, question, answer = drawn.choice(babi.stories(self.babi, task, self.part))
        depths = sorted(drawn.random() for _ in facts)
        hidden = list(zip(depths, facts, strict=True))
        told = [(f"</context>\n\nQuestion: {question}\nAnswer: ", False), (answer, True)]
        return Written("<context>\n", hidden, told)
