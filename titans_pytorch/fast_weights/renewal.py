"""Limits that are safe at zero and the identity where nothing needs limiting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans_pytorch.fast_weights.interface import Carry, Weights

MAX_CARRIED_GRADIENT = 1e12
"""Largest norm of the gradient of a row's weights that passes from one batch back to the one before it"""


def safe_norm(square: Tensor) -> Tensor:
    """A square root with a finite gradient (zero) at zero."""
    is_positive = square > 0
    return torch.where(is_positive, square, 1.0).sqrt() * is_positive


def smooth_limit(norm: Tensor, limit: float) -> Tensor:
    """Factor that brings a norm under the limit: max * tanh(norm / max) / norm, 1 at zero."""
    is_positive = norm > 0
    safe = torch.where(is_positive, norm, 1.0)
    return torch.where(is_positive, limit * torch.tanh(safe / limit) / safe, 1.0)


def total_norm(weights: Weights) -> Tensor:
    """Of all parameters of a row together; its gradient at zero is zero.  (r ...) -> (r)"""
    norms = [torch.linalg.vector_norm(weight.reshape(len(weight), -1), dim=1) for weight in weights.values()]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def limit_growth(weights: Weights, limit: Tensor) -> Weights:
    """Rescale a memory whose norm has outgrown a limit; the identity below.  (r ...) each, limit: (r)"""
    norm = total_norm(weights)
    scale = torch.where(norm > limit, limit / torch.where(norm > limit, norm, 1.0), 1.0)
    return {name: weight * scale.reshape(-1, *[1] * (weight.ndim - 1)) for name, weight in weights.items()}


class LimitGradient(torch.autograd.Function):
    """The identity, whose gradient is rescaled where a row's norm exceeds a huge limit.

    Where the inner loop is chaotic its outer gradient doubles with every batch and would overflow after a few hundred;
    a gradient this large says nothing but its direction.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        bound = MAX_CARRIED_GRADIENT
        gradient = gradient.clamp(-bound, bound)
        norm = (gradient / bound).reshape(len(gradient), -1).norm(dim=1)
        scale = 1 / norm.clamp(min=1.0)
        return gradient * scale.reshape(-1, *[1] * (gradient.ndim - 1))


def renewed(carry: Carry, gate: Tensor | None, limit: Tensor | None) -> Carry:
    """The memory where a new batch begins: the current weights become the base.

    gate: how far to go from the old base to the current weights (a logit), None: all the way;
    limit: (r) the largest norm that a memory may have, None: any
    """
    weights = carry.weights
    if gate is not None:
        weights = {
            name: torch.lerp(carry.base[name], weight, gate.to(weight).sigmoid()) for name, weight in weights.items()
        }
    if limit is not None:
        weights = limit_growth(weights, limit)
    weights = {name: LimitGradient.apply(weight) for name, weight in weights.items()}
    momenta = {name: tuple(map(LimitGradient.apply, orders)) for name, orders in carry.momenta.items()}
    return Carry(weights, weights, momenta)
