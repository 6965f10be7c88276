"""Mutants of memories that restart, and of queries on keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import mutant, wrapped
from titans_pytorch.memory import key_span, shards
from titans_pytorch.memory.core import MemoryCore

ALL = ("shards", "shards, keys of chunks")


@mutant(*ALL)
def a_shard_goes_on_from_the_one_before(patcher: pytest.MonkeyPatch) -> None:
    """As if a state at a border were any other; whole shards of a call are not tried."""
    patcher.setattr(shards, "restarted_shard", lambda memory, state: state)
    wrapped(patcher, MemoryCore, "begins", lambda original, self, state: state is None)


@mutant(*ALL)
def momenta_go_on_where_a_memory_restarts(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, memory: Any, state: Any) -> Any:
        fresh = original(memory, state)
        return fresh._replace(states=(fresh.current, state.momenta))

    wrapped(patcher, shards, "restarted_shard", change)
    wrapped(patcher, MemoryCore, "begins", lambda original, self, state: state is None)


@mutant(*ALL)
def convolutions_restart_with_the_memory(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(shards, "begun_with", lambda state, tails: state)


@mutant(*ALL)
def shards_that_are_rows_see_the_end_of_the_first_one(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, state: Any, tails: Any) -> Any:
        return original(state, tails._replace(queries=tails.queries.roll(1, 0)))

    wrapped(patcher, shards, "begun_with", change)


@mutant(*ALL)
def shards_trade_places_with_sequences(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, x: Tensor, num: int) -> Tensor:
        rows = original(x, num)
        return rows if num == 1 else rows.unflatten(0, (-1, num)).transpose(0, 1).flatten(0, 1)

    wrapped(patcher, shards, "in_rows", change)


@mutant(*ALL)
def queries_are_on_the_keys_of_the_wrong_span(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: MemoryCore, *args: Any) -> Any:
        told = original(self, *args)
        return told._replace(chunk=self.layout.store_chunk if told.chunk is None else None)

    wrapped(patcher, MemoryCore, "told", change)


@mutant(*ALL)
def queries_are_not_projected(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(key_span, "through", lambda queries, keys, told: (queries, told.before.total))


@mutant(*ALL)
def a_query_does_not_see_the_key_of_its_token(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, Tensor, "tril", lambda original, self, *args: original(self, -1))


@mutant(*ALL)
def keys_are_not_of_length_1(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(key_span, "l2_normalised", lambda keys: keys)


@mutant("shards")
def what_came_before_a_piece_is_not_among_the_keys(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, queries: Tensor, keys: Tensor, told: Any) -> Any:
        nothing = told.before._replace(total=torch.zeros_like(told.before.total))
        return original(queries, keys, told._replace(before=nothing))

    wrapped(patcher, key_span, "through", change)


@mutant(*ALL)
def keys_that_are_not_stored_count(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, layers: Any, told: Any, like: Tensor) -> Any:
        tail = original(layers, told, like)[1]
        everything = told._replace(tokens=told.tokens._replace(is_stored=None))
        return original(layers, everything, like)[0], tail

    wrapped(patcher, key_span, "keys_of", change)


@mutant("shards")
def a_span_of_keys_does_not_end_with_its_shard(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, memory: Any, state: Any) -> Any:
        fresh = original(memory, state)
        return fresh._replace(span=fresh.span._replace(total=state.span.total))

    wrapped(patcher, shards, "restarted_shard", change)
