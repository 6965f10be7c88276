"""Norms that are safe at zero, and limits that are the identity where nothing needs limiting."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def safe_norm(square: Tensor) -> Tensor:
    """A square root with a finite gradient (zero) at zero."""
    is_positive = square > 0
    return torch.where(is_positive, square, 1.0).sqrt() * is_positive


def smooth_limit(norm: Tensor, limit: float) -> Tensor:
    """Factor that brings a norm under the limit: max * tanh(norm / max) / norm, 1 at zero."""
    is_positive = norm > 0
    safe = torch.where(is_positive, norm, 1.0)
    return torch.where(is_positive, limit * torch.tanh(safe / limit) / safe, 1.0)


def total_norm(weights: Mapping[str, Tensor]) -> Tensor:
    """The norm of all parameters of a row together; its gradient at zero is zero.  (r ...) -> (r)"""
    norms = [torch.linalg.vector_norm(weight.reshape(len(weight), -1), dim=1) for weight in weights.values()]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)
