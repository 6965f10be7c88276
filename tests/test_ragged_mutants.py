"""The tests of padding and documents object: each rule is broken on purpose, and a comparison notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_ragged import loss_alone, model_of, poisoned, read, tokens_of
from titans_pytorch import causal_lm
from titans_pytorch.ragged import reading, state
from titans_pytorch.ragged.packing import RealFirst

NAME = "TitansMAC, plain"
MASK = torch.tensor([[True] * 9, [False, False, True, True, False, True, True, True, False]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 6, 6, 6]])


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-9, atol=1e-9)


def padding_leaves_no_trace() -> bool:
    model, ids, more = model_of(NAME), tokens_of(NAME, 2, 9), tokens_of(NAME, 2, 4, seed=1)
    outputs, after = read(model, poisoned(ids, MASK), attention_mask=MASK)
    answers, _ = read(model, more, after)
    found = not outputs[~MASK].any()
    for row in range(2):
        alone, own = read(model, ids[row, MASK[row]][None])
        found &= close(outputs[row, MASK[row]], alone[0])
        found &= close(answers[row], read(model, more[row : row + 1], own)[0][0])
    return bool(found)


def documents_are_alone() -> bool:
    model, ids, more = model_of(NAME), tokens_of(NAME, 2, 9), tokens_of(NAME, 2, 4, seed=1)
    outputs, after = read(model, ids[:, :5], document_ids=DOCUMENTS[:, :5])
    later, after = read(model, ids[:, 5:], after, document_ids=DOCUMENTS[:, 5:])
    outputs = torch.cat((outputs, later), dim=1)
    answers, _ = read(model, more, after)
    found = True
    for row in range(2):
        for number in DOCUMENTS[row].unique():
            own = DOCUMENTS[row] == number
            alone, last = read(model, ids[row, own][None])
            found &= close(outputs[row, own], alone[0])
        found &= close(answers[row], read(model, more[row : row + 1], last)[0][0])
    return found


def losses_are_those_of_rows() -> bool:
    model: Any = model_of(NAME)
    ids = tokens_of(NAME, 2, 9)
    rows = [(ids[row, MASK[row] & (DOCUMENTS[row] == n)],) * 2 for row in range(2) for n in DOCUMENTS[row].unique()]
    loss = model.loss(poisoned(ids, MASK), attention_mask=MASK, document_ids=DOCUMENTS)
    return close(loss, loss_alone(model, rows))


Patch = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, tuple[Patch, Callable[[], bool]]] = {}


def mutant(notices: Callable[[], bool]) -> Callable[[Patch], Patch]:
    def register(patch: Patch) -> Patch:
        MUTANTS[patch.__name__.replace("_", " ")] = (patch, notices)
        return patch

    return register


@mutant(padding_leaves_no_trace)
def padding_stays_where_it_is(patcher: pytest.MonkeyPatch) -> None:
    def of(mask: Tensor) -> RealFirst:
        order = torch.arange(mask.shape[1]).expand_as(mask)
        return RealFirst(order, torch.arange(mask.shape[1]) < mask.sum(dim=1, keepdim=True))

    patcher.setattr(RealFirst, "of", staticmethod(of))


@mutant(padding_leaves_no_trace)
def outputs_at_padding_stay(patcher: pytest.MonkeyPatch) -> None:
    def unpack(self: RealFirst, packed: Tensor, fill: float = 0.0) -> Tensor:
        return torch.ones_like(packed).scatter(1, self.order[..., None].expand_as(packed), packed + 1.0)

    patcher.setattr(RealFirst, "unpack", unpack)


@mutant(padding_leaves_no_trace)
def states_are_those_of_the_longest_row(patcher: pytest.MonkeyPatch) -> None:
    original = reading.with_ends

    def with_ends(read: Any, x: Tensor, lengths: Any, groups: Any) -> Any:
        return original(read, x, [max(lengths)] * len(lengths), groups)

    patcher.setattr(reading, "with_ends", with_ends)


@mutant(padding_leaves_no_trace)
def rows_of_a_group_change_places(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(reading, "at_rows", lambda x, rows: x[torch.tensor(list(rows))].flip(0))


@mutant(padding_leaves_no_trace)
def groups_lose_their_rows(patcher: pytest.MonkeyPatch) -> None:
    original = reading.ragged

    def ragged(groups: Any, documents: Any = None) -> Any:
        found = original(groups, documents)
        return found._replace(rows=found.rows[::-1]) if len(found.rows) > 1 else found

    patcher.setattr(reading, "ragged", ragged)


@mutant(documents_are_alone)
def a_document_goes_on_with_the_one_before(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(reading, "documents_of", lambda given: None)


@mutant(documents_are_alone)
def no_document_goes_on(patcher: pytest.MonkeyPatch) -> None:
    original = reading.stretches

    def stretches(*args: Any) -> Any:
        return [document._replace(state=None) for document in original(*args)]

    patcher.setattr(reading, "stretches", stretches)


@mutant(documents_are_alone)
def the_state_is_that_of_the_first_document(patcher: pytest.MonkeyPatch) -> None:
    original = reading.after_documents

    def after(groups: Any, ends: Any, given: Any, batch: int) -> Any:
        fresh = [state.Group(rows, None) for rows, _ in groups]
        return original(fresh, ends, given, batch)

    patcher.setattr(reading, "after_documents", after)


@mutant(documents_are_alone)
def what_is_behind_an_end_is_written(patcher: pytest.MonkeyPatch) -> None:
    original = reading.places

    def places(documents: Any, device: Any) -> Any:
        rows, columns, is_own = original(documents, device)
        return rows, columns, torch.ones_like(is_own)

    patcher.setattr(reading, "places", places)


def targets_forget(patcher: pytest.MonkeyPatch, **forgotten: None) -> None:
    original = causal_lm.targets_of

    def targets(labels: Tensor, marks: Any) -> Tensor:
        return original(labels, None if marks is None else marks._replace(**forgotten))

    patcher.setattr(causal_lm, "targets_of", targets)


@mutant(losses_are_those_of_rows)
def padding_predicts(patcher: pytest.MonkeyPatch) -> None:
    targets_forget(patcher, mask=None)


@mutant(losses_are_those_of_rows)
def a_document_predicts_the_next(patcher: pytest.MonkeyPatch) -> None:
    targets_forget(patcher, documents=None)


@mutant(losses_are_those_of_rows)
def every_row_counts_alike(patcher: pytest.MonkeyPatch) -> None:
    original = causal_lm.loss_of_targets

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([original(*(x[None] for x in row)) for row in zip(logits, targets, strict=True)]).mean()

    patcher.setattr(causal_lm, "loss_of_targets", loss)


@pytest.mark.parametrize("notices", [padding_leaves_no_trace, documents_are_alone, losses_are_those_of_rows])
@torch.no_grad()
def test_nothing_is_noticed_where_nothing_is_broken(notices: Callable[[], bool]) -> None:
    assert notices()


@pytest.mark.parametrize("name", MUTANTS)
@torch.no_grad()
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, notices = MUTANTS[name]
    patch(monkeypatch)
    assert not notices()
