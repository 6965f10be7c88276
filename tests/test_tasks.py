"""Tasks: a solver that does what is asked scores 1, a guess scores chance."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from titans_pytorch.tasks import MQAR


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def solved(ids: Tensor, num_keys: int) -> Tensor:
    """What came after the first appearance of each key."""
    guesses = torch.zeros_like(ids)
    for row, sequence in enumerate(ids.tolist()):
        seen: dict[int, int] = {}
        for place, token in enumerate(sequence):
            if token in seen:
                guesses[row, place] = seen[token]
            elif 1 <= token <= num_keys:
                seen[token] = sequence[place + 1]
    return guesses


@pytest.mark.parametrize(
    "task", [MQAR(), MQAR(pairs=3, keys=5, tokens=30, gap=2), MQAR(pairs=5, keys=5, tokens=20, gap=0)]
)
def test_a_solver_of_recall_scores_1_and_a_guess_scores_chance(task: MQAR) -> None:
    questions = task.draw(64, generator())
    assert questions.ids.shape == questions.answers.shape == (64, task.tokens)
    assert (questions.is_asked.sum(dim=1) == task.pairs).all()
    assert int(questions.ids.max()) < task.num_tokens
    assert task.accuracy(solved(questions.ids, task.keys), questions) == 1.0
    guesses = 1 + task.keys + torch.randint(task.keys, questions.ids.shape, generator=generator(1))
    asked = 64 * task.pairs
    chance = 1 / task.keys
    assert abs(task.accuracy(guesses, questions) - chance) < 5 * (chance * (1 - chance) / asked) ** 0.5


def test_questions_come_after_the_gap_and_the_same_for_the_same_seed() -> None:
    task = MQAR(pairs=4, keys=9, tokens=40, gap=10)
    questions = task.draw(16, generator(3))
    assert not questions.is_asked[:, : 2 * 4 + 10].any()
    again = task.draw(16, generator(3))
    assert torch.equal(questions.ids, again.ids)
    assert torch.equal(questions.answers, again.answers)
    assert not torch.equal(questions.ids, task.draw(16, generator(4)).ids)


def test_a_task_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="a task needs pairs <= keys and tokens >= 40, got MQAR"):
        MQAR(pairs=8, keys=64, tokens=39, gap=16)
