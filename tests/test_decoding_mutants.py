"""Decoding by rows, broken on purpose: each way is noticed by rows that are not what they are alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import wrapped
from tests.support.titans_configurations import build
from tests.test_decoding import EXACT, LENGTHS, alone, batch_of, texts_of
from titans_pytorch.decoding import Due, RowBatch
from titans_pytorch.decoding import batch as batch_file
from titans_pytorch.decoding import due as due_file
from titans_pytorch.decoding.memory import MemoryByRows
from titans_pytorch.decoding.window import WindowRows
from titans_pytorch.titans.mixers.by_rows import ContextByRows

Patch = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, tuple[Patch, str]] = {}


def mutant(variant: str) -> Callable[[Patch], Patch]:
    """A way to break decoding by rows, and the model that has to notice."""

    def register(patch: Patch) -> Patch:
        MUTANTS[patch.__name__.replace("_", " ")] = (patch, variant)
        return patch

    return register


def due_becomes(patcher: pytest.MonkeyPatch, change: Callable[[Due, Any], Due]) -> None:
    original = Due.of
    patcher.setattr(due_file.Due, "of", staticmethod(lambda *args: change(original(*args), args[1])))


def step_becomes(patcher: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    original = due_file.TokenStep.of
    patcher.setattr(due_file.TokenStep, "of", staticmethod(lambda *args: change(original(*args))))


@mutant("mag")
def the_position_of_a_row_is_ignored(patcher: pytest.MonkeyPatch) -> None:
    original = due_file.turns_of_rows
    patcher.setattr(due_file, "turns_of_rows", lambda r, p, like: original(r, p[:1].expand_as(p), like))


@mutant("mac")
def a_place_in_a_segment_is_ignored(patcher: pytest.MonkeyPatch) -> None:
    step_becomes(patcher, lambda step: step._replace(read_turns=step.turns))


@mutant("lmm")
def the_end_of_a_chunk_is_shared(patcher: pytest.MonkeyPatch) -> None:
    def change(due: Due, positions: list[int]) -> Due:
        everyone = list(range(len(positions))) if due.chunks else []
        return due._replace(chunks=everyone, renewals=[False] * len(everyone))

    due_becomes(patcher, change)


@mutant("lmm")
def a_renewal_is_shared(patcher: pytest.MonkeyPatch) -> None:
    due_becomes(patcher, lambda due, _: due._replace(renewals=[any(due.renewals)] * len(due.chunks)))


@mutant("lmm")
def no_base_is_renewed(patcher: pytest.MonkeyPatch) -> None:
    step_becomes(patcher, lambda step: step._replace(renewals=None))


@mutant("lmm")
def a_token_waits_in_the_wrong_place(patcher: pytest.MonkeyPatch) -> None:
    step_becomes(patcher, lambda step: step._replace(waiting=1 - step.waiting))


@mutant("mal")
def a_window_is_written_at_the_wrong_slot(patcher: pytest.MonkeyPatch) -> None:
    step_becomes(patcher, lambda step: step._replace(slots=(step.slots + 1) % 4))


@mutant("mag")
def a_window_shows_what_is_not_there(patcher: pytest.MonkeyPatch) -> None:
    step_becomes(patcher, lambda step: step._replace(hidden=torch.zeros_like(step.hidden)))


@mutant("mac")
def a_segment_shows_the_one_before(patcher: pytest.MonkeyPatch) -> None:
    due_becomes(patcher, lambda due, positions: due._replace(newest=list(positions)))


@mutant("mac")
def the_memory_before_a_segment_stays(patcher: pytest.MonkeyPatch) -> None:
    step_becomes(patcher, lambda step: step._replace(segments=None))


@mutant("mac")
def the_end_of_a_segment_is_shared(patcher: pytest.MonkeyPatch) -> None:
    step_becomes(patcher, lambda step: step._replace(segments=None if step.segments is None else step.rows))


@mutant("mac")
def what_was_read_and_the_segment_trade_places(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(ContextByRows, "first", 0)


@mutant("lmm")
def momentum_is_that_of_another_row(patcher: pytest.MonkeyPatch) -> None:
    def store(original: Any, self: Any, rows: Any, *args: Any) -> None:
        turned = tuple({name: m.roll(1, 0) for name, m in order.items()} for order in rows.momenta)
        original(self, rows._replace(momenta=turned), *args)
        for own, order in zip(rows.momenta, turned, strict=True):
            for name, m in own.items():
                m.copy_(order[name].roll(-1, 0))

    wrapped(patcher, MemoryByRows, "store", store)


@mutant("lmm")
def weights_go_to_another_row(patcher: pytest.MonkeyPatch) -> None:
    def put(original: Any, self: Any, kept: Any, new: Any, chunks: Tensor) -> None:
        original(self, kept, new, (chunks + 1) % len(LENGTHS))

    wrapped(patcher, MemoryByRows, "put", put)


@mutant("lmm")
def convolutions_of_writes_stand_still(patcher: pytest.MonkeyPatch) -> None:
    def store(original: Any, self: Any, rows: Any, *args: Any) -> None:
        copies = type(rows.tails)(*(tail.clone() for tail in rows.tails))
        original(self, rows._replace(tails=copies), *args)

    wrapped(patcher, MemoryByRows, "store", store)


@mutant("lmm")
def the_convolution_of_queries_stands_still(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, MemoryByRows, "ask", lambda original, self, x, w, tail: original(self, x, w, tail.clone()))


@mutant("mag")
def keys_go_to_another_row(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        WindowRows,
        "write",
        lambda original, self, tokens, step, first: original(self, tokens.map(lambda x: x.roll(1, 0)), step, first),
    )


@mutant("mag")
def rows_do_not_move_on(patcher: pytest.MonkeyPatch) -> None:
    def run(original: Any, self: RowBatch, ids: Tensor) -> Tensor:
        before = self.positions
        logits: Tensor = original(self, ids)
        self.positions = before
        return logits

    wrapped(patcher, batch_file.RowBatch, "run", run)


@torch.no_grad()
def rows_are_as_alone(variant: str) -> bool:
    model, texts = build(variant), texts_of(12)
    rows = batch_of(model, [text[:, :length] for text, length in zip(texts, LENGTHS, strict=True)])
    steps = [torch.cat([text[0, n + i : n + i + 1] for text, n in zip(texts, LENGTHS, strict=True)]) for i in range(12)]
    found = torch.stack([rows.run(ids) for ids in steps], dim=1)
    return torch.allclose(found, alone(model, texts), **EXACT)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, variant = MUTANTS[name]
    patch(monkeypatch)
    assert not rows_are_as_alone(variant)
