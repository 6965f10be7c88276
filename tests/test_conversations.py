"""A pool of conversations answers each as if it were alone, whatever the others do; states travel as bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.support.sequence_modules import READERS
from tests.test_ragged import model_of, read, tokens_of
from titans_pytorch import (
    ConversationPool,
    NeuralMemory,
    load_state,
    save_state,
    state_from_bytes,
    state_to_bytes,
)

EXACT = dict(rtol=1e-9, atol=1e-10)
NAMES = ["TitansMAC, plain", "TitansMAG, plain", "TitansLMM, plain", "MemoryAsContextTransformer, everything"]


def next_logits(model: Any, ids: list[int]) -> Tensor:
    return read(model, torch.tensor([ids]))[0][0, -1]


class Script:
    """A pool, and beside it all tokens of every conversation, which are read anew for each answer."""

    def __init__(self, name: str) -> None:
        self.model = model_of(name)
        self.pool = ConversationPool(self.model)  # type: ignore[arg-type]
        self.texts: dict[int, list[int]] = {}
        self.kept: list[tuple[Any, list[int]]] = []
        self.bytes: list[tuple[bytes, list[int]]] = []

    def step(self, data: st.DataObject) -> None:
        what = data.draw(st.sampled_from(("advance", "advance", "advance", "open", "fork", "keep", "roll", "bytes")))
        texts = self.texts
        if what == "open" or not texts:
            texts[self.pool.open()] = []
            return
        chosen = data.draw(st.sampled_from(sorted(texts)))
        if what == "fork":
            texts[self.pool.fork(chosen)] = texts[chosen]
        elif what == "keep":
            self.kept.append((self.pool.keep(chosen), texts[chosen]))
        elif what == "roll" and self.kept:
            point, texts[chosen] = data.draw(st.sampled_from(self.kept))
            self.pool.rollback(chosen, point)
        elif what == "bytes" and texts[chosen]:
            texts[self.pool.restore(self.pool.snapshot(chosen))] = texts[chosen]
            self.pool.close(chosen)
            del texts[chosen]
        elif what == "advance":
            some = data.draw(st.lists(st.sampled_from(sorted(texts)), unique=True, min_size=1))
            ids = {each: data.draw(st.lists(st.integers(0, 10), min_size=1, max_size=4)) for each in some}
            answers = self.pool.advance({each: torch.tensor(more) for each, more in ids.items()})
            for each, more in ids.items():
                texts[each] = texts[each] + more
                assert_close(answers[each], next_logits(self.model, texts[each]), **EXACT)
        assert {each: self.pool.num_tokens(each) for each in texts} == {each: len(text) for each, text in texts.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_script_answers_every_conversation_as_if_alone(name: str, data: st.DataObject) -> None:
    script = Script(name)
    for _ in range(data.draw(st.integers(4, 12))):
        script.step(data)


@torch.no_grad()
def test_going_on_together_forking_and_keeping_copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = model_of("TitansMAG, plain")
    pool = ConversationPool(model)
    each = [pool.open() for _ in range(3)]
    pool.advance({one: torch.tensor([1, 2, 3]) for one in each})

    def refused(*_: Any) -> None:
        raise AssertionError("a state was copied")

    for name in ("select", "join"):
        monkeypatch.setattr(type(pool.keep(each[0]).state), name, refused)
    pool.advance({one: torch.tensor([4]) for one in reversed(each)})
    point, fork = pool.keep(each[0]), pool.fork(each[1])
    pool.rollback(each[0], point)
    assert pool.num_tokens(fork) == 4
    assert len(pool) == 4


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_conversations_that_part_keep_what_is_theirs(name: str) -> None:
    """Some of those that share a state go on, then those that stayed behind, then all of them together."""
    model: Any = model_of(name)
    pool = ConversationPool(model)
    texts = {pool.open(): [first, 1, 2, 3] for first in range(5)}
    pool.advance({each: torch.tensor(ids) for each, ids in texts.items()})
    numbers = list(texts)
    for some in ([numbers[1], numbers[3], numbers[4]], [numbers[2], numbers[0]], numbers[::-1], numbers[1:4:2]):
        answers = pool.advance({each: torch.tensor([4, 5]) for each in some})
        for each in some:
            texts[each] = [*texts[each], 4, 5]
            assert_close(answers[each], next_logits(model, texts[each]), **EXACT)


@torch.no_grad()
def test_a_state_is_not_kept_for_the_sake_of_one_row() -> None:
    model: Any = model_of("TitansMAG, plain")
    pool = ConversationPool(model)
    each = [pool.open() for _ in range(4)]
    pool.advance({one: torch.tensor([1, 2, 3]) for one in each})
    pool.advance({one: torch.tensor([4]) for one in each[1:]})
    assert pool.keep(each[0]).state.batch == 1
    assert pool.keep(each[1]).state.batch == 3


def test_one_sentence_says_what_is_wrong() -> None:
    model: Any = model_of("TitansMAG, plain")
    pool = ConversationPool(model)
    one = pool.open()
    with pytest.raises(TypeError, match="model must be a language model of this library, got NeuralMemory"):
        ConversationPool(NeuralMemory(4))  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="conversation must be open, got 7"):
        pool.advance({7: torch.tensor([1])})
    with pytest.raises(ValueError, match=r"tokens of a conversation must be ids \(n\), at least one, got \(1, 2\)"):
        pool.advance({one: torch.tensor([[1, 2]])})
    with pytest.raises(ValueError, match="tokens must be from 0 to 10, got ids from 1 to 99"):
        pool.advance({one: torch.tensor([1, 99])})
    with pytest.raises(ValueError, match="conversation 1 must have read a token to be kept as bytes, got none"):
        pool.snapshot(one)
    with pytest.raises(TypeError, match="point must be what keep returned, got int"):
        pool.rollback(one, 3)  # type: ignore[arg-type]
    assert pool.advance({}) == {}
    with pytest.raises(TypeError, match="state must be one of the model, got Tensor; tokens are for advance"):
        pool.open(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="state must be of one sequence, got 2"):
        pool.open(model(tokens_of("TitansMAG, plain", 2, 3))[1])
    pool.close(one)
    assert one not in pool


# ---- states as bytes, and whose they are


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "NeuralMemory, heads", "TitansBackbone, mag"])
def test_states_go_through_bytes(name: str) -> None:
    model, x, more = model_of(name), tokens_of(name, 2, 9), tokens_of(name, 2, 5, seed=1)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    for marks in ({}, dict(attention_mask=mask)):
        _, state = read(model, x, **marks)
        again = state_from_bytes(state_to_bytes(state, model), model=model)
        assert torch.equal(read(model, more, again)[0], read(model, more, state)[0])


@pytest.mark.parametrize("name", ["TitansMAG, plain", "NeuralMemory, heads"])
def test_a_state_of_another_model_or_other_weights_is_refused(name: str, tmp_path: Any) -> None:
    one, other = READERS[name].made(0), READERS[name].made(1)
    _, state = read(one, READERS[name].given(2, 9))
    save_state(state, tmp_path / "state", one)
    assert type(load_state(tmp_path / "state", model=one)) is type(state)
    assert type(load_state(tmp_path / "state")) is type(state)
    with pytest.raises(ValueError, match=r"must be a state of this model with these weights, .*, got one of a model"):
        load_state(tmp_path / "state", model=other)
    with torch.no_grad():
        next(one.parameters()).mul_(1.001)
    with pytest.raises(ValueError, match="must be a state of this model with these weights"):
        load_state(tmp_path / "state", model=one)
    with pytest.raises(ValueError, match="got one that was saved without a model"):
        state_from_bytes(state_to_bytes(state), model=one)
