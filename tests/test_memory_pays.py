"""Memory pays where it paid before: three comparisons small enough to be trained here, with margins that are wide.

    pytest -m slow tests/test_memory_pays.py

They are those of benchmarks/learning/comparisons/small, one seed each: no claim, but a change of the library that costs
the memory its worth is noticed. What was found when the margins were set stands beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.learning import compare
from benchmarks.learning.protocol import Entry
from titans_pytorch import writes_off
from titans_pytorch.training.answers import asked, scored

SMALL = Path(compare.__file__).parent / "comparisons" / "small"


class Found(NamedTuple):
    """What a model answers: by the task's metric, and the share of tokens that are right."""

    score: float
    accuracy: float


def found(trained: compare.Training) -> Found:
    asking, task = trained.comparison.asking, trained.task.held_out()
    how = dict(rows=asking.rows, batch=asking.batch, seed=asking.seed)
    marks = [(a.guesses == q.answers)[q.is_asked] for q, a in asked(trained.model, task, **how)]
    return Found(scored(trained.model, task, **how).score, float(torch.cat(marks).float().mean()))


def results(name: str, folder: Path) -> dict[str, Found]:
    """With memory, the same with writes off, and the floor."""
    comparison = compare.loaded(SMALL / f"{name}.json")
    answers = {}
    for entry in comparison.entries:
        trained = trained_one(comparison, entry, folder)
        answers[entry.name] = found(trained)
        if entry.role == "memory":
            with writes_off(trained.model):
                answers["writes off"] = found(trained)
    print(name, answers)
    return answers


def trained_one(comparison: compare.Comparison, entry: Entry, folder: Path) -> compare.Training:
    trained = compare.Training(comparison, entry, 0, comparison.budgets[0], folder / entry.name)
    trained.train(entry.name)
    return trained


@pytest.mark.slow
def test_values_are_recalled_from_beyond_the_window(tmp_path: Path) -> None:
    answers = results("mqar", tmp_path)
    assert answers["memory"].accuracy >= 0.9  # 1.00
    assert answers["floor"].accuracy <= 0.1  # 0.01
    assert answers["writes off"].accuracy <= 0.1  # 0.02


@pytest.mark.slow
def test_digits_of_a_needle_are_found_beyond_the_window(tmp_path: Path) -> None:
    answers = results("needle", tmp_path)
    assert answers["memory"].accuracy >= 0.5  # 0.83
    assert answers["floor"].accuracy <= 0.25  # 0.1
    assert answers["writes off"].accuracy <= 0.25  # 0.1


@pytest.mark.slow
def test_text_costs_less_with_what_was_written_while_reading_it(tmp_path: Path) -> None:
    answers = results("text", tmp_path)
    assert answers["floor"].score - answers["memory"].score >= 0.05  # 0.10 bits per byte
    assert answers["writes off"].score - answers["memory"].score >= 0.01  # 0.027


@pytest.mark.slow
def test_a_memory_added_to_a_trained_model_recalls_from_beyond_its_window() -> None:
    pytest.importorskip("transformers", reason="titans_pytorch.hf needs transformers, the extra hf")
    from benchmarks.learning import added_memory

    found = added_memory.run(seed=0, budget=added_memory.Budget(model=300, memory=100, rows=32))
    accuracy = found["accuracy"]
    assert found["is_frozen"]
    assert accuracy["at first"] == accuracy["alone"]
    assert accuracy["alone"]["near"] >= 0.95  # 1.0
    assert accuracy["alone"]["far"] <= 0.12  # 0.06
    assert accuracy["with memory"]["far"] >= 0.9  # 1.0
    assert accuracy["writes off"]["far"] <= 0.15
