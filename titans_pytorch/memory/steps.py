"""Step sizes: how much of a token's surprise is taken, from what a gate makes of the token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from titans_pytorch.checks import value_checks

SPARSE_BELOW = 0.1 / 1.1
"""A sparse step is 0 where the sigmoid of its gate is below"""

Step = Callable[[Tensor], Tensor]
"""From gates of any sign to step sizes, elementwise"""


def max_lr_sigmoid(raw: Tensor, max_lr: float) -> Tensor:
    """Between 0 and max_lr."""
    return raw.sigmoid() * max_lr


def sparse_sigmoid(raw: Tensor, max_lr: float) -> Tensor:
    """Up to max_lr, and 0 where the sigmoid is below SPARSE_BELOW: such tokens are not stored."""
    return torch.relu((raw.sigmoid() - SPARSE_BELOW) / (1 - SPARSE_BELOW)) * max_lr


STEPS: dict[str | None, Callable[..., Tensor]] = {None: max_lr_sigmoid, "sparse": sparse_sigmoid}
"""By name; None is the default"""


def step_of(given: Step | str | None, max_lr: float) -> Step:
    """A step size by its name, or the user's own, once it is sure that it works."""
    if given is None or isinstance(given, str):
        value_checks.check_choice("adaptive_step_transform", given, tuple(STEPS))
        return partial(STEPS[given], max_lr=max_lr)
    value_checks.check_callable(adaptive_step_transform=given)
    got = given(torch.zeros(2, 3))
    if not isinstance(got, Tensor) or got.shape != (2, 3):
        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"adaptive_step_transform must be elementwise: gave the shape (2, 3), got {shape}")
    return given
