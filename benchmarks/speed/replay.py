"""What part of a call's time its products take, and its passes over large tensors: both run again, alone.

A call is run once and everything that it asks torch for is written down. Then the products (or the other operations on
large tensors) are run again, one after the other, on random numbers of the same sizes and strides. So their time is the
least that the call could take without fewer or smaller ones: what it takes beside is calling them, and small things.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from benchmarks.operations import Counting

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "baddbmm_", "addmm_", "mv", "dot"}


class Like(NamedTuple):
    """A tensor, but for its numbers."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Asked(NamedTuple):
    """An operation that torch was asked for; instead of tensors there is what they are like."""

    operation: Callable[..., Any]
    args: Any
    kwargs: Any
    elements: int  # of its largest tensor

    @property
    def has_numbers(self) -> bool:
        """Whether all its tensors are of numbers, not of places in others, which cannot be random."""
        tensors = [x for x in tree_flatten((self.args, self.kwargs), is_leaf=is_like)[0] if is_like(x)]
        return all(x.dtype.is_floating_point for x in tensors)

    @property
    def is_product(self) -> bool:
        return self.operation.overloadpacket.__name__ in PRODUCTS  # type: ignore[attr-defined]


class Recording(Counting):
    """Writes down what others count."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Asked] = []

    def note(self, func: Any, args: Any, kwargs: Any) -> None:
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        told_args, told_kwargs = tree_map(like, (args, kwargs))
        self.asked.append(Asked(func, told_args, told_kwargs, max((x.numel() for x in tensors), default=0)))


def is_like(x: Any) -> bool:
    return isinstance(x, Like)


def like(x: Any) -> Any:
    return Like(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x


def recorded(run: Callable[[], Any]) -> list[Asked]:
    """What a call asks for, after a first one by which what is made once has been made."""
    run()
    with Recording() as recording:
        run()
    return recording.asked


def seconds_alone(asked: Sequence[Asked], turns: int, clock: Callable[[], float] = time.process_time) -> float:
    """The least time of these operations, one after the other; tensors that are alike are used again.

    clock: by default CPU time, which is for one thread
    """
    made: dict[tuple[int, Like], Tensor] = {}

    def tensors_for(each: Asked) -> Any:
        place = 0

        def tensor(x: Any) -> Any:
            nonlocal place
            if not is_like(x):
                return x
            place += 1
            key = place, x
            if key not in made:
                length = 1 + sum((size - 1) * step for size, step in zip(x.size, x.stride, strict=True))
                numbers = torch.randn(max(length, 1)).to(x.dtype)
                made[key] = numbers.as_strided(x.size, x.stride)
            return made[key]

        return tree_map(tensor, (each.args, each.kwargs), is_leaf=is_like)

    calls = [(each.operation, *tensors_for(each)) for each in asked]
    found = float("inf")
    with torch.no_grad():
        for _ in range(1 + turns):
            start = clock()
            for operation, args, kwargs in calls:
                operation(*args, **kwargs)
            found = min(found, clock() - start)
    return found


def shares(run: Callable[[], Any], large: int, turns: int = 5) -> tuple[float, float]:
    """Seconds of a call's products alone, and of its other operations on tensors of at least `large` elements."""
    products, passes = parts(recorded(run), large)
    return seconds_alone(products, turns), seconds_alone(passes, turns)


def parts(asked: Sequence[Asked], large: int) -> tuple[list[Asked], list[Asked]]:
    """Products, and other operations on tensors of at least so many elements."""
    products = [each for each in asked if each.is_product]
    return products, [each for each in asked if not each.is_product and each.has_numbers and each.elements >= large]
