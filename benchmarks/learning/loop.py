"""The training loop of every comparison; imports torch alone, so that it runs in any environment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Step(NamedTuple):
    number: int  # from 1 on
    seconds: float  # of training, this step included
    loss: float
    norm: float  # of the gradient before it was clipped
    is_taken: bool  # whether the gradient was finite; otherwise the step is skipped


def training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    rate: Callable[[int, float], float],
    clip: float,
    number: int = 0,
    seconds: float = 0.0,
) -> Iterator[Step]:
    """Steps without end, from step `number` on; what the caller does between them does not count as time.

    `loss_of(step)` is the loss of a step, `rate(step, seconds)` the share of the optimizer's learning rates that it
    takes; both count steps from 0.
    """
    highest = [group["lr"] for group in optimizer.param_groups]
    while True:
        began = time.perf_counter()
        for group, lr in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = lr * rate(number, seconds)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(number)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        is_taken = bool(norm.isfinite())
        if is_taken:
            optimizer.step()
        number, seconds = number + 1, seconds + time.perf_counter() - began
        yield Step(number, seconds, loss.item(), norm.item(), is_taken)
