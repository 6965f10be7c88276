"""Configurations that no run before has seen: the drawn tests again, many cases each, from a fresh seed.

    pytest -m nightly                                  # TITANS_CASES=200 for fewer cases of each law
    TITANS_SEED=123 pytest -m nightly                  # the run that failed, once more

What failed is printed with its seed and with the smallest case that fails alike.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests import (
    test_capacity,
    test_exactness,
    test_lact,
    test_loop,
    test_mac_decoding,
    test_omega,
    test_ragged,
    test_shards,
    test_solved,
    test_titans,
)
from tests.support.configurations import cases

LAWS: dict[str, tuple[Callable[[Any], None], st.SearchStrategy[Any]]] = {
    "the memory equals the oracle": (test_exactness.check, cases()),
    "loops over renewals equal the oracle": (test_exactness.check, test_loop.looped()),
    "memories that are solved for equal the oracle": (test_exactness.check, test_solved.linear()),
    "windows of surprises equal the oracle": (test_exactness.check, cases().map(test_omega.looking_back)),
    "shards equal the equations": (test_exactness.check, test_shards.in_shards()),
    "memories that grow equal the equations": (test_exactness.check, test_capacity.growing()),
    "LaCT equals the equations": (test_exactness.check, test_lact.of_lact()),
    "padded rows are the rows alone": (test_ragged.check_padding, st.data()),
    "documents in a row are the documents alone": (test_ragged.check_documents, st.data()),
    "losses are those of the sequences alone": (test_ragged.check_loss, st.data()),
    "MemoryAsContextTransformer in any pieces": (test_mac_decoding.check, st.data()),
    "the family in any pieces": (test_titans.check_pieces, st.data()),
}


def hold(law: Callable[[Any], None], drawn: st.SearchStrategy[Any], start: int, count: int) -> None:
    """Try a law on `count` cases; the same ones from the same seed, whatever failed or was drawn before."""

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=False,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=drawn)
    def holds(case: Any) -> None:
        law(case)

    holds()


def seed_of_this_run() -> int:
    given_seed = os.environ.get("TITANS_SEED")
    return int(given_seed) if given_seed else random.SystemRandom().randrange(2**32)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", LAWS)
def test_fresh_cases(name: str) -> None:
    start = seed_of_this_run()
    print(f"again: TITANS_SEED={start} pytest -m nightly 'tests/test_nightly.py::test_fresh_cases[{name}]'")
    hold(*LAWS[name], start, int(os.environ.get("TITANS_CASES", "1000")))


def test_a_seed_draws_the_same_cases_again_and_another_one_others() -> None:
    def drawn(start: int) -> list[int]:
        seen: list[int] = []
        hold(seen.append, st.integers(0, 10**9), start, 20)
        return seen

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_the_case_that_fails_is_named() -> None:
    def law(number: int) -> None:
        assert number < 1000

    with pytest.raises(AssertionError) as failure:
        hold(law, st.integers(0, 10**9), 0, 200)
    assert any("case=1000" in note for note in failure.value.__notes__)
