"""Mutants of what no oracle computes: states, asking, memories that are off, tasks.  Tests have to notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import Patch, wrapped
from tests.test_asking import test_pieces_of_any_length_are_one_call as asked_in_pieces
from tests.test_state import test_beams as beams
from tests.test_tasks import test_a_solver_scores_1_and_a_guess_scores_chance as solver
from tests.test_tasks import test_all_bytes_of_an_answer_have_to_be_right as whole_answers
from tests.test_tasks import test_identifiers_know_when_they_were_seen_the_last_time as identifiers
from tests.test_training_carry import test_segments_of_a_group_go_on_and_stay_in_their_document as in_one_document
from tests.test_training_carry import test_segments_with_a_carried_state_are_the_whole_sequence as carried
from tests.test_writes_off import MEMORIES
from tests.test_writes_off import test_pieces_are_the_whole_and_a_state_on_the_way_stays_what_it_was as goes_on_still
from titans_pytorch.memory import call, state
from titans_pytorch.memory.rows import map_rows
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.tasks import MQAR, BABILong, Questions, Task, babi, make_task
from titans_pytorch.tasks.hidden import HiddenInText
from titans_pytorch.training.carrying import Carrying, Stretches


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
    wrapped(patcher, HiddenInText, "draw", change)


def what_was_written_first_counts(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: MQAR, *args: Any) -> Any:
        ids, answers = original(self, *args)
        known = {(row, tuple(keys)): value for row, keys, value in reversed(list(self_pairs(self, ids)))}
        for row, place in (answers >= 0).nonzero().tolist():
            key = tuple(ids[row, place - self.key_tokens + 1 : place + 1].tolist())
            answers[row, place] = known[row, key]
        return Questions(ids, answers)

    wrapped(patcher, MQAR, "draw", change)


def self_pairs(task: MQAR, ids: Tensor) -> Iterator[tuple[int, list[int], int]]:
    """Every pair that is written: row, key, value."""
    width = task.key_tokens + 1
    for row, line in enumerate(ids.tolist()):
        for first in range(0, width * (task.pairs + task.overwritten), width):
            yield row, line[first : first + width - 1], line[first + width - 1]


def objects_stay_where_they_were_taken(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: babi.World) -> None:
        held, self.holder = self.holder, {}
        original(self)
        self.holder = held

    wrapped(patcher, babi.World, "move", change)


def every_byte_is_an_answer(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Task, guesses: Tensor, questions: Any) -> Tensor:
        return (guesses == questions.answers)[questions.is_asked]

    wrapped(patcher, Task, "marks", change)


def keywords_are_identifiers(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr("titans_pytorch.tasks.text.KEYWORDS", set())


def a_memory_that_is_off_begins_anew(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, memory: Any, seq: Tensor, state: Any, num_chunks: int, told: Any) -> Any:
        fresh = memory.init_state(state.batch)
        return original(memory, seq, state._replace(weights=fresh.weights, states=fresh.states), num_chunks, told)

    wrapped(patcher, call, "only_read", change)


def a_memory_that_is_off_forgets_its_tail(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, memory: Any, seq: Tensor, state: Any, num_chunks: int, told: Any) -> Any:
        fresh = memory.fresh_tails(state.batch)
        return original(memory, seq, state._replace(tails=fresh), num_chunks, told)

    wrapped(patcher, call, "only_read", change)


def states_are_not_carried(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Carrying, model: Any, ids: Tensor, step: int, micro: int) -> Tensor:
        self.states[micro] = None
        return original(self, model, ids, step, micro)

    wrapped(patcher, Carrying, "loss", change)


def stretches_reach_into_other_documents(patcher: pytest.MonkeyPatch) -> None:
    original = Stretches.of
    patcher.setattr(Stretches, "of", staticmethod(lambda text, starts, length: original(text, None, length)))


def off(name: str) -> None:
    torch.manual_seed(0)
    goes_on_still(MEMORIES[name]().double())


SEAMS: list[tuple[Patch, Callable[[], None]]] = [
    (sequences_are_faster_than_heads, partial(beams, "heads and batches")),
    (asking_forgets_its_tail, partial(asked_in_pieces, "convolution", [2, 3, 5, 3])),
    (asking_forgets_its_tail, partial(asked_in_pieces, "mixing tokens", [2, 3, 5, 3])),
    (answers_are_due_a_token_late, partial(solver, "mqar", MQAR())),
    (answers_are_due_a_token_late, partial(solver, "passkey", make_task("passkey"))),
    (what_was_written_first_counts, partial(solver, "mqar", MQAR(overwritten=8))),
    (objects_stay_where_they_were_taken, partial(solver, "babilong_qa2", BABILong(task=2, tokens=6000))),
    (every_byte_is_an_answer, whole_answers),
    (keywords_are_identifiers, identifiers),
    (states_are_not_carried, partial(carried, "mag")),
    (stretches_reach_into_other_documents, in_one_document),
    (a_memory_that_is_off_begins_anew, partial(off, "plain")),
    (a_memory_that_is_off_forgets_its_tail, partial(off, "paper")),
]
