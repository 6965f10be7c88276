"""The suite objects: each rule of the library is broken on purpose, and a few comparisons with the oracle notice."""

from __future__ import annotations

import pytest

from tests.mutants import papers, recurrences, streams, surprises  # noqa: F401  (each registers its own)
from tests.mutants.breaking import MUTANTS
from tests.mutants.cases import CASES
from tests.test_exactness import check


@pytest.mark.parametrize("name", CASES)
def test_the_library_as_it_is_passes(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that crashes is broken itself, and says nothing about the tests: only a comparison that fails counts."""
    patch, cases = MUTANTS[name]
    patch(monkeypatch)
    survived = []
    for case_name in cases:
        try:
            check(CASES[case_name])
        except AssertionError:
            continue
        survived.append(case_name)
    assert not survived, f"lives through {survived}"
