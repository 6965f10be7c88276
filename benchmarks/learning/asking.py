"""What a trained model is asked in a comparison: scores by length, bits by position and distance, a map of needles."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.learning.protocol import Comparison, Evaluation
from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.tasks import Task, TextTask
from titans_pytorch.tasks.text import NEVER, NO_NAME, last_seen
from titans_pytorch.training.answers import PIECE_TOKENS, asked, scored

FEWEST = 8
"""Sequences at least, however long"""


class Tally:
    """Means by name, of values that come in parts."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: Tensor) -> None:
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = total + float(values.double().sum()), count + values.numel()

    def means(self) -> dict[str, Any]:
        """name -> mean and what it is of; a name of which nothing came is not there"""
        return {name: [total / count, count] for name, (total, count) in self.sums.items() if count}


def results(model: CausalLM[Any], comparison: Comparison, window: int) -> dict[str, Any]:
    """Everything that a comparison asks, by length; a length that the task has no text for says why it is missing."""
    asking, task = comparison.asking, comparison.make_task().held_out()
    found: dict[str, Any] = {}
    for times in asking.lengths:
        longer = replace(task, tokens=times * task.tokens)  # type: ignore[type-var, attr-defined]
        rows = max(asking.rows // times, min(asking.rows, FEWEST))
        try:
            found[str(longer.tokens)] = at_length(model, longer, asking, rows, window)
        except ValueError as error:
            if "tokens must" not in str(error):
                raise
            found[str(longer.tokens)] = {"missing": str(error)}
    return found


def of_versions(model: CausalLM[Any], comparison: Comparison) -> dict[str, dict[str, Any]]:
    """What a model makes of other versions of its task (more pairs, say) than the one that it was trained on."""
    asking, found = comparison.asking, {}
    for name, changed in asking.versions.items():
        task = comparison.changed(changed).held_out()
        tokens = task.tokens  # type: ignore[attr-defined]
        rows = max(asking.rows * comparison.make_task().tokens // tokens, min(asking.rows, FEWEST))  # type: ignore[attr-defined]
        rows = changed.get("rows", rows)
        score, count = scored(model, task, rows=rows, batch=batch_of(asking, tokens), seed=asking.seed)
        found[name] = dict(score=score, answers=count, rows=rows, tokens=tokens, chance=task.chance)
    return found


def at_length(model: CausalLM[Any], task: Any, asking: Evaluation, rows: int, window: int) -> dict[str, Any]:
    how = dict(rows=rows, batch=batch_of(asking, task.tokens), seed=asking.seed)
    if isinstance(task, TextTask):
        return bits(model, task, asking, window, how) | shuffled(model, task, how)
    score, count = scored(model, task, **how)
    found: dict[str, Any] = dict(score=score, answers=count, rows=rows, chance=task.chance)
    if asking.depths > 1:
        depths = [step / (asking.depths - 1) for step in range(asking.depths)]
        found["by_depth"] = {f"{depth:.3f}": scored(model, replace(task, depth=depth), **how).score for depth in depths}
    return found


def batch_of(asking: Evaluation, tokens: int) -> int:
    """Sequences at once: as many as at the trained length, as only one piece of them is read at a time."""
    return asking.batch if tokens <= 16 * PIECE_TOKENS else max(asking.batch // 4, 1)


def bits(model: CausalLM[Any], task: TextTask, asking: Evaluation, window: int, how: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte of held-out text: of all, by position, and by how far back an identifier was seen."""
    of_all, by_position, by_distance = Tally(), Tally(), Tally()
    for questions, answers in asked(model, task, **how):
        cost, seen = answers.losses / math.log(2), last_seen(questions)
        of_all.add("all", cost)
        for first, last in ranges(asking.bins, task.tokens):
            by_position.add(f"{first}-{last - 1}", cost[:, first:last])
        for name, is_in in distances(seen, window).items():
            by_distance.add(name, cost[is_in])
    score, count = of_all.means()["all"]
    return dict(score=score, answers=count, by_position=by_position.means(), by_distance=by_distance.means(), **how)


def shuffled(model: CausalLM[Any], task: TextTask, how: dict[str, Any]) -> dict[str, Any]:
    """The control: what is further away than a piece is of another document."""
    return dict(shuffled=scored(model, replace(task, shuffled=True), **how).score)


def ranges(bins: tuple[int, ...], tokens: int) -> list[tuple[int, int]]:
    """Positions from each bin's first one to the next bin's."""
    edges = [*(first for first in bins if first < tokens), tokens]
    return list(itertools.pairwise(edges))


def distances(seen: Tensor, window: int) -> dict[str, Tensor]:
    """Which bytes are of identifiers that were last seen inside the window, further back, or never; of none.  (b n)"""
    edges = [0, window, 4 * window, 16 * window]
    names = [f"inside the window (to {window})", f"{window + 1}-{4 * window}", f"{4 * window + 1}-{16 * window}"]
    found = {name: (seen > low) & (seen <= high) for name, low, high in zip(names, edges, edges[1:], strict=False)}
    found[f"beyond {16 * window}"] = seen > 16 * window
    return found | {"never": seen == NEVER, "no identifier": seen == NO_NAME}


def quick_score(model: CausalLM[Any], task: Task, asking: Evaluation) -> float:
    """The score at the trained length, of a few sequences: a point of a curve."""
    return scored(model, task.held_out(), rows=min(asking.rows, 2 * FEWEST), batch=asking.batch, seed=asking.seed).score


def is_better_lower(task: Task) -> bool:
    return task.metric == "bits per byte"


def generator_of(*numbers: int) -> torch.Generator:
    """Random numbers that depend on these alone."""
    from titans_pytorch.training.loop import mixed

    return torch.Generator().manual_seed(mixed(*numbers))
