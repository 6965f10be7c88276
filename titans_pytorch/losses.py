"""What a memory's answer to a key is held to: its value.  `NeuralMemory(loss=...)` takes them by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from titans_pytorch.public_names import register_named


def mean_squared_error(prediction: Tensor, value: Tensor) -> Tensor:
    """The default key-value loss of each token.  (... d), (... d) -> (...)"""
    return (prediction - value).square().mean(dim=-1)


def summed_squared_error(prediction: Tensor, value: Tensor) -> Tensor:
    """The loss of each token as the paper has it (eq. 12).  (... d), (... d) -> (...)"""
    return (prediction - value).square().sum(dim=-1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}


def register_loss(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Make a loss known by name, so that it can be chosen and saved.  loss: (... d), (... d) -> (...)"""
    if name in LOSSES:
        raise ValueError(f"a loss's name must be new, got {name!r}, which is taken; taken are {sorted(LOSSES)}")
    LOSSES[name] = register_named(name, loss)


register_loss("mse", mean_squared_error)
register_loss("sse", summed_squared_error)
