"""What a task is: sequences of ids that are drawn, the answers to the questions in them, and a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Generator, Tensor

NO_ANSWER = -100
"""Where nothing is asked; the index that torch's cross-entropy ignores"""


class Questions(NamedTuple):
    """Sequences with questions in them."""

    ids: Tensor  # (b n)
    answers: Tensor  # (b n)  the id that has to come after each token, NO_ANSWER where nothing is asked

    @property
    def is_asked(self) -> Tensor:
        """(b n) bool"""
        return self.answers != NO_ANSWER


class Task(ABC):
    """Sequences drawn at random, the same for the same generator."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Size of the vocabulary."""

    @abstractmethod
    def draw(self, rows: int, generator: Generator) -> Questions:
        """So many sequences with their answers."""

    def num_right(self, guesses: Tensor, questions: Questions) -> int:
        """How many questions are answered rightly.  guesses: (b n), the most probable id after each token"""
        return int((guesses == questions.answers)[questions.is_asked].sum())

    def accuracy(self, guesses: Tensor, questions: Questions) -> float:
        """The share of all questions that are answered rightly."""
        return self.num_right(guesses, questions) / max(int(questions.is_asked.sum()), 1)
