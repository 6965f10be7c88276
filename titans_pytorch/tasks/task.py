"""What a task is: sequences of ids that are drawn, the answers to the questions in them, and a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from titans_pytorch.checks.field_checks import check_fields

NO_ANSWER = -100
"""Where nothing is asked; the index that torch's cross-entropy ignores"""

Metric = Literal["accuracy", "exact match", "bits per byte"]


class Questions(NamedTuple):
    """Sequences with questions in them."""

    ids: Tensor  # (b n)
    answers: Tensor  # (b n)  the id that has to come after each token, NO_ANSWER where nothing is asked

    @property
    def is_asked(self) -> Tensor:
        """(b n) bool"""
        return self.answers != NO_ANSWER


class Task(ABC):
    """Sequences drawn at random, the same for the same generator.

    metric: accuracy is the share of answer tokens that are right, exact match the share of whole answers (an answer is
        a run of tokens that are asked for one after the other), bits per byte what the right answers cost
    reads_last: all answers are read off what the model made of the last token (`compression`), not of each token
    """

    metric: ClassVar[Metric] = "accuracy"
    reads_last: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Size of the vocabulary."""

    @abstractmethod
    def draw(self, rows: int, generator: Generator) -> Questions:
        """So many sequences with their answers."""

    @property
    def chance(self) -> float:
        """The score of somebody who knows what answers look like, and nothing else."""
        return 0.0

    def held_out(self) -> Task:
        """What a model that was trained on this task is asked: by default fresh draws of it."""
        return self

    def marks(self, guesses: Tensor, questions: Questions) -> Tensor:
        """Which answers are right, by the task's metric.  guesses: (b n), the most probable id after each token

        -> (answers) bool, row by row
        """
        is_asked = questions.is_asked
        is_wrong = guesses != questions.answers
        if self.metric != "exact match":
            return ~is_wrong[is_asked]
        begins = is_asked & ~F.pad(is_asked[:, :-1], (1, 0))
        number = (begins.flatten().cumsum(0).view_as(begins) - 1)[is_asked]
        mistakes = torch.zeros(int(begins.sum()), dtype=torch.long, device=number.device)
        return mistakes.index_add(0, number, is_wrong[is_asked].long()) == 0

    def score(self, guesses: Tensor, questions: Questions) -> float:
        """The share of answers that are right, by the task's metric."""
        marks = self.marks(guesses, questions)
        return float(marks.double().mean()) if len(marks) else 0.0

    def num_right(self, guesses: Tensor, questions: Questions) -> int:
        """How many tokens that are asked for are right.  guesses: (b n), the most probable id after each token"""
        return int((guesses == questions.answers)[questions.is_asked].sum())

    def accuracy(self, guesses: Tensor, questions: Questions) -> float:
        """The share of all tokens that are asked for that are right."""
        return self.num_right(guesses, questions) / max(int(questions.is_asked.sum()), 1)


def distinct(rows: int, count: int, among: int, generator: Generator) -> Tensor:
    """Different whole numbers below `among`, in each row others.  -> (rows count)"""
    return torch.rand(rows, among, generator=generator).argsort(dim=1)[:, :count]


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Refuse a size of a task that is out of range."""
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
