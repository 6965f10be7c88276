"""A task of one's own is one small class, known by name once it is registered."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Generator

from titans_pytorch.tasks import MQAR, NO_ANSWER, Questions, Task, register_task


@dataclass(frozen=True)
class Echo(Task):
    """The last token has to be what the first one was."""

    num_tokens: int = 7  # type: ignore[assignment]

    def draw(self, rows: int, generator: Generator) -> Questions:
        ids = torch.randint(self.num_tokens, (rows, 5), generator=generator)
        answers = torch.full_like(ids, NO_ANSWER)
        answers[:, -1] = ids[:, 0]
        return Questions(ids, answers)


def test_a_toy_task_is_one_small_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titans_pytorch.tasks.TASKS", {"mqar": MQAR})
    register_task("echo", Echo)
    task = Echo()
    questions = task.draw(20, Generator().manual_seed(0))
    assert task.accuracy(questions.ids[:, :1].expand(-1, 5), questions) == 1.0
    with pytest.raises(ValueError, match="must be new, got 'mqar'"):
        register_task("mqar", Echo)
