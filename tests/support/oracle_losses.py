"""Key-value losses as they are written in papers, for the oracle; of predictions and targets (n d), a number each."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """(... d), (... d) -> (...)"""
    return (pred - target).square().mean(dim=-1)


def sum_of_squares(pred: Tensor, target: Tensor) -> Tensor:
    """(... d), (... d) -> (...)"""
    return (pred - target).square().sum(dim=-1)


def huber(pred: Tensor, target: Tensor, threshold: float) -> Tensor:
    """x² up to the threshold, and its tangent from there on; the mean over features.  (... d), (... d) -> (...)"""
    x = pred - target
    tangent = threshold**2 + 2 * threshold * (x.abs() - threshold)
    return torch.where(x.abs() <= threshold, x**2, tangent).mean(dim=-1)


def power(pred: Tensor, target: Tensor, p: float) -> Tensor:
    """|x|^p, with |x| = sqrt(x² + 1e-6); the mean over features.  (... d), (... d) -> (...)"""
    size = ((pred - target) ** 2 + 1e-6).sqrt()
    return (size**p - 1e-6 ** (p / 2)).mean(dim=-1)


def hebbian(pred: Tensor, target: Tensor) -> Tensor:
    """-<pred, target>"""
    return -torch.einsum("...d,...d->...", pred, target)


def cosine(pred: Tensor, target: Tensor) -> Tensor:
    """1 - cos(pred, target), with lengths sqrt(|x|² + 1e-6)"""
    lengths = [((x**2).sum(dim=-1) + 1e-6).sqrt() for x in (pred, target)]
    return 1 - torch.einsum("...d,...d->...", pred, target) / (lengths[0] * lengths[1])


def huber_of_tokens(pred: Tensor, target: Tensor, thresholds: Tensor) -> Tensor:
    """|E|²/d where the root of that is within the token's threshold, its tangent beyond.  (n d), (n d), (n) -> (n)"""
    found = []
    for x, threshold in zip(pred - target, thresholds, strict=True):
        size = ((x**2).sum() / len(x) + 1e-6).sqrt()
        found.append((x**2).sum() / len(x) if size <= threshold else threshold**2 + 2 * threshold * (size - threshold))
    return torch.stack(found) if found else pred.new_zeros(0)


NAMED = {"mse": mean_squared_error, "sse": sum_of_squares, "dot": hebbian, "cosine": cosine}
WITH_NUMBER = {"huber": huber, "lp": power}
