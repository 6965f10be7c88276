"""Mutants of memories that grow."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mutants.breaking import mutant, wrapped
from titans_pytorch.fast_weights.interface import Weights
from titans_pytorch.memory import capacity, growing
from titans_pytorch.memory.capacity import Capacity

CASE = "capacity"


@mutant(CASE)
def all_units_are_open_from_the_start(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(Capacity, "of", lambda self, weights, form, num_seen: weights)


@mutant(CASE)
def nothing_is_ever_opened(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(growing, "grown", lambda memory, state: state)


@mutant(CASE)
def a_block_opens_a_token_too_late(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, Capacity, "num_open", lambda original, self, num_seen: original(self, max(num_seen - 1, 0)))


@mutant(CASE)
def a_block_is_never_the_last(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher, Capacity, "num_open", lambda original, self, num_seen: min(original(self, num_seen), self.blocks - 1)
    )


@mutant(CASE)
def only_what_is_read_grows(patcher: pytest.MonkeyPatch) -> None:
    """Surprises of the rest of a batch are still those of a closed block."""
    wrapped(
        patcher, growing, "grown", lambda original, memory, state: original(memory, state)._replace(weights=state.base)
    )


@mutant(CASE)
def what_is_open_begins_anew_at_a_border(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, memory: Any, state: Any) -> Any:
        weights: Weights = memory.init_weights(state.batch, state.num_seen)
        return original(memory, state)._replace(weights=weights, states=(weights, state.momenta))

    wrapped(patcher, growing, "grown", change)


@mutant(CASE)
def units_are_closed_behind_them_only(patcher: pytest.MonkeyPatch) -> None:
    """Their own weights are there from the start, and a border adds them again."""

    def change(original: Any, form: Any) -> Any:
        return {name: tuple(axis for axis in axes if axis == 0) for name, axes in original(form).items()}

    wrapped(patcher, capacity, "axes_of", change)
