"""Training that keeps what does best on validation: the loop of forecasting and of DNA classification."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from benchmarks.learning.loop import training
from titans_pytorch.training.optimizers import adamw, rate
from titans_pytorch.training.settings import Training


class Fitted(NamedTuple):
    """How a training went; the model has the weights of its best validation."""

    best: float  # of validation, lower is better
    best_step: int
    seconds: float  # of training alone
    skipped: int
    curve: list[list[float]]  # step, validation


def fitted(
    model: nn.Module, loss_of: Callable[[int], Tensor], validate: Callable[[], float], settings: Training
) -> Fitted:
    """Train for `settings.steps`, validate `settings.validate_every` steps and at the end, keep the best weights."""
    steps = training(
        model,
        adamw(model.named_parameters(), settings),
        loss_of,
        lambda step, _: rate(settings, step, step / settings.steps) / settings.lr,
        settings.clip,
    )
    curve: list[list[float]] = []
    kept, skipped = model.state_dict(), 0
    for step in steps:
        skipped += not step.is_taken
        if step.number % settings.validate_every == 0 or step.number == settings.steps:
            now = validate()
            if all(now < before for _, before in curve):
                kept = copy.deepcopy(model.state_dict())
            curve.append([step.number, round(now, 5)])
        if step.number == settings.steps:
            break
    model.load_state_dict(kept)
    best_step, best = min(curve, key=lambda each: each[1])
    return Fitted(best, int(best_step), round(step.seconds, 1), skipped, curve)
