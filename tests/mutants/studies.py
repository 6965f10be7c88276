"""Mutants of what forecasting and DNA are measured with, and of what a run says writing is worth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from benchmarks.learning import dna, fitting, forecasting, series
from tests import test_continuous_studies as studies
from tests import test_training_worth as worths
from tests.mutants.breaking import Patch, wrapped
from titans_pytorch.training import surprise, worth


def what_is_tested_on_decides_the_scale(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, name: str, values: Any, borders: Any) -> Any:
        found = original(name, values, (len(values),) * 3)
        return series.Series(name, found.values, borders)

    wrapped(patcher, series, "scaled", change)


def futures_reach_into_the_next_part(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Any, part: str, lookback: int, horizon: int, **more: Any) -> Any:
        return original(self, part, lookback, horizon // 2, **more)

    wrapped(patcher, series.Series, "windows", change)


def every_horizon_is_the_longest(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, *args: Any) -> Any:
        return tuple(each[-1:].expand_as(each) for each in original(*args))

    wrapped(patcher, forecasting, "errors", change)


def trends_lie_behind(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(forecasting.DLinear, "kernel", 23)


def labels_are_of_other_rows(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, name: str, bases: Tensor, labels: Tensor) -> Any:
        return original(name, bases, labels.roll(1))

    wrapped(patcher, dna, "split", change)


def the_last_weights_are_kept(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(fitting.copy, "deepcopy", lambda state: state)


def writing_costs_what_it_saves(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, *args: Any) -> Any:
        found = original(*args)
        return found._replace(saved=-found.saved)

    wrapped(patcher, surprise, "text_surprise", change)


def the_whole_sequence_is_its_last_quarter(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, records: list[dict[str, Any]]) -> Any:
        return original([{name: mean_of(value) for name, value in record.items()} for record in records])

    def mean_of(value: Any) -> Any:
        return [sum(value) / len(value)] if isinstance(value, list) else value

    wrapped(patcher, worth, "worth", change)


STUDIES: list[tuple[Patch, Callable[[], None]]] = [
    (what_is_tested_on_decides_the_scale, studies.test_series_are_scaled_by_what_is_trained_on),
    (
        futures_reach_into_the_next_part,
        partial(studies.test_all_futures_of_a_part_lie_in_it_and_only_they, "test", 8000, 10_000),
    ),
    (every_horizon_is_the_longest, studies.test_errors_are_means_up_to_each_horizon),
    (trends_lie_behind, studies.test_dlinear_by_the_book),
    (labels_are_of_other_rows, studies.test_synthetic_dna_is_solved_by_looking_for_what_occurs_twice),
    (the_last_weights_are_kept, studies.test_the_best_of_a_training_is_kept),
    (writing_costs_what_it_saves, worths.test_what_writing_saves_on_each_byte),
    (the_whole_sequence_is_its_last_quarter, worths.test_the_sentence_says_what_the_last_validation_found),
]
