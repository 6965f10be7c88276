"""What memories were surprised by, and how eagerly they stored it, while a model runs as ever."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titans_pytorch.checks import value_checks
from titans_pytorch.memory.core import MemoryCore


class Recorded(NamedTuple):
    """What one call of one memory says of every write.  (b h writes) each"""

    loss: Tensor  # unweighted
    steps: Tensor  # step sizes, 0 for what is not stored


@contextmanager
def recorded_surprises(model: nn.Module) -> Iterator[list[Recorded]]:
    """Inside, collects what every memory of a model would return with `return_surprises=True`, call by call.

        with recorded_surprises(model) as found:
            loss = model.loss(ids)
        share = torch.stack([(each.steps > 0).float().mean() for each in found])  # of what is stored, by call

    Gradients pass, as they do through what is returned; none do where the call stands in reentrant checkpointing, which
    runs it without a graph. Nothing else changes: who asks for surprises himself gets them.
    """
    found: list[Recorded] = []
    returns: dict[nn.Module, bool] = {}

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        returns[module] = bool(kwargs.get("return_surprises", False))
        return args, kwargs | {"return_surprises": True}

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """-> what was asked for"""
        *answer, surprises = output
        found.append(Recorded(*surprises))
        return output if returns.pop(module) else tuple(answer)

    handles = []
    for module in model.modules():
        if isinstance(module, MemoryCore):
            handles += [module.register_forward_pre_hook(ask, with_kwargs=True)]
            handles += [module.register_forward_hook(keep, with_kwargs=True)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def mean_step(found: list[Recorded]) -> Tensor | float:
    """The mean step size of all writes of all calls; 0 where there are none."""
    num_writes = sum(each.steps.numel() for each in found)
    return torch.stack([each.steps.sum() for each in found]).sum() / num_writes if num_writes else 0.0


@contextmanager
def storing_costs(model: nn.Module, cost: float) -> Iterator[Callable[[], Tensor | float]]:
    """Gives what the calls inside have cost so far: `cost` for a mean step of 1.

        with storing_costs(model, 0.1) as cost:
            loss = model.loss(ids)
        (loss + cost()).backward()

    With a cost of 0 nothing is asked of the model.
    """
    value_checks.check_number(cost=cost)
    if not 0 <= cost < math.inf:
        raise ValueError(f"cost must be at least 0, got {cost}")
    if cost == 0:
        yield lambda: 0.0
        return
    with recorded_surprises(model) as found:
        yield lambda: cost * mean_step(found)
