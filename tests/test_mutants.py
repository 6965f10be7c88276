"""The suite objects: each rule of the library is broken on purpose, and a few comparisons with the oracle notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.mutants import (  # noqa: F401  (each registers its own)
    capacities,
    loops,
    miras,
    norms,
    papers,
    recurrences,
    shards,
    solved,
    streams,
    surprises,
    windows,
)
from tests.mutants.breaking import MUTANTS, Patch
from tests.mutants.cases import CASES
from tests.mutants.seams import SEAMS
from tests.mutants.studies import STUDIES
from tests.test_exactness import check
from titans_pytorch import NeuralMemory


@pytest.mark.parametrize("name", CASES)
def test_the_library_as_it_is_passes(name: str) -> None:
    check(CASES[name])


def survived(cases: tuple[str, ...]) -> list[str]:
    """Cases that a mutant lives through. One that crashes is broken itself: only a comparison that fails notices it."""
    living = []
    for name in cases:
        try:
            check(CASES[name])
        except AssertionError:
            continue
        living.append(name)
    return living


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, cases = MUTANTS[name]
    patch(monkeypatch)
    assert not survived(cases), "a mutant lives"


@pytest.mark.parametrize("patch, behaviour", [*SEAMS, *STUDIES])
def test_a_broken_seam_is_noticed(patch: Patch, behaviour: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    behaviour()
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        behaviour()


@pytest.mark.parametrize("crash", [RuntimeError, ValueError, IndexError])
def test_a_mutant_that_crashes_is_not_caught(crash: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes(*args: object, **kwargs: object) -> None:
        raise crash("not an answer")

    monkeypatch.setattr(NeuralMemory, "forward", crashes)
    with pytest.raises(crash, match="not an answer"):
        survived(("plain",))


def test_a_mutant_that_changes_nothing_lives() -> None:
    assert survived(("plain",)) == ["plain"]
