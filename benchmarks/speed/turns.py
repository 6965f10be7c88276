"""Steps that take turns on one core, and the least CPU time of each: what every table of small steps is made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from benchmarks.machine import describe_machine

Key = TypeVar("Key")


def least(steps: Mapping[Key, Callable[[], Any]], turns: int) -> dict[Key, float]:
    """Seconds of each step; a turn before the first one warms up."""
    found = dict.fromkeys(steps, float("inf"))
    for turn in range(1 + turns):
        for key, step in steps.items():
            start = time.process_time()
            step()
            if turn:
                found[key] = min(found[key], time.process_time() - start)
    return found


def training_step(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Forward and backward of the mean square of what a module makes of x, with the gradient of x."""

    def step() -> None:
        module.zero_grad(set_to_none=True)
        run(x.detach().requires_grad_()).square().mean().backward()

    return step


def told(turns: int) -> str:
    """Where, when and how such a table was measured."""
    where = describe_machine()
    machine = f"{where['cpu']}, 1 thread of a machine that others used too, {where['date']}, commit {where['commit']}"
    return f"{machine}, least of {turns} turns, seed 0."
