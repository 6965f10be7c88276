"""Mutants of the rule that keeps norms."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mutants.breaking import mutant, wrapped
from titans_pytorch.fast_weights.rules import lact
from titans_pytorch.fast_weights.rules.lact import LaCT

ALL = ("lact", "lact, orthogonal")


@mutant(*ALL)
def norms_do_not_stay(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(lact, "as_long_as", lambda weights, start: weights)


@mutant(*ALL)
def norms_are_those_of_what_a_matrix_takes_in(patcher: pytest.MonkeyPatch) -> None:
    """Rows in place of columns."""

    def change(original: Any, weights: Any, start: Any) -> Any:
        return weights if weights.ndim < 3 else original(weights.mT, start.mT).mT

    wrapped(patcher, lact, "as_long_as", change)


@mutant(*ALL)
def norms_are_all_1(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, weights: Any, start: Any) -> Any:
        return original(weights, start / start.norm(dim=-2, keepdim=True))

    wrapped(patcher, lact, "as_long_as", change)


@mutant(*ALL)
def a_step_that_keeps_norms_climbs(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Any, weights: Any, step: Any, *rest: Any) -> Any:
        return original(self, weights, -step, *rest)

    wrapped(patcher, LaCT, "retain", change)


@mutant(*ALL)
def momentum_is_that_of_the_chunk_alone(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(LaCT, "move", lambda self, momenta, surprise, gates: (surprise, (surprise,)))
