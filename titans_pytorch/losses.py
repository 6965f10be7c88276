"""What a memory's answer to a key is held to: its value."""

from __future__ import annotations

from torch import Tensor


def mean_squared_error(prediction: Tensor, value: Tensor) -> Tensor:
    """The default key-value loss of each token.  (... d), (... d) -> (...)"""
    return (prediction - value).square().mean(dim=-1)


def summed_squared_error(prediction: Tensor, value: Tensor) -> Tensor:
    """The loss of each token as the paper has it (eq. 12).  (... d), (... d) -> (...)"""
    return (prediction - value).square().sum(dim=-1)
