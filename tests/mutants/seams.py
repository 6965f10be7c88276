"""Mutants of what no oracle computes: states over rows, asking in pieces, tasks.  Tests of behaviour have to notice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from tests.mutants.breaking import Patch, wrapped
from tests.test_asking import test_pieces_of_any_length_are_one_call as asked_in_pieces
from tests.test_state import test_beams as beams
from tests.test_tasks import test_a_solver_of_recall_scores_1_and_a_guess_scores_chance as solver
from titans_pytorch.memory import state
from titans_pytorch.memory.rows import map_rows
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.tasks import MQAR


def sequences_are_faster_than_heads(patcher: pytest.MonkeyPatch) -> None:
    def selected(tree: Any, rows: Any, batch: int) -> Any:
        def pick(axis: int, t: Tensor) -> Tensor:
            split = t.unflatten(axis, (-1, batch)).movedim(axis % t.ndim + 1, 0)[rows]
            return split.movedim(0, axis % t.ndim + 1).flatten(axis % t.ndim, axis % t.ndim + 1)

        return map_rows(pick, tree)

    patcher.setattr(state, "selected", selected)


def asking_forgets_its_tail(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: NeuralMemory, seq: Tensor, weights: Any, tail: Any = None) -> Any:
        return original(self, seq, weights)

    wrapped(patcher, NeuralMemory, "ask", change)


def answers_are_due_a_token_late(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, *args: Any) -> Any:
        questions = original(*args)
        return questions._replace(answers=questions.answers.roll(1, dims=1))

    wrapped(patcher, MQAR, "draw", change)


SEAMS: list[tuple[Patch, Callable[[], None]]] = [
    (sequences_are_faster_than_heads, partial(beams, "heads and batches")),
    (asking_forgets_its_tail, partial(asked_in_pieces, "convolution", [2, 3, 5, 3])),
    (asking_forgets_its_tail, partial(asked_in_pieces, "mixing tokens", [2, 3, 5, 3])),
    (answers_are_due_a_token_late, partial(solver, MQAR())),
]
