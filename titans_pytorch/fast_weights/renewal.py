"""Where the base is renewed: the memory becomes its own base, within limits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.interface import Carry, Weights
from titans_pytorch.fast_weights.norms import total_norm, with_length

MAX_CARRIED_GRADIENT = 1e12
"""Largest norm of the gradient of a row's weights that passes from one batch back to the one before it"""


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


class Renewal(NamedTuple):
    """What happens where a new batch begins: a memory's current weights become its base, within limits."""

    gate: Tensor | None = None  # how far to go from the old base to the current weights (a logit); None: all the way
    limit: Tensor | None = None  # (r)  the largest norm that a memory may have; None: any
    lengths: Weights | None = None  # (r 1 j)  of the weights of every output of a matrix; None: any

    def __call__(self, carry: Carry) -> Carry:
        weights = carry.weights
        if self.gate is not None:
            share = self.share(next(iter(weights.values())))
            weights = {name: torch.lerp(carry.base[name], weight, share) for name, weight in weights.items()}
        if self.limit is not None:
            weights = limit_growth(weights, self.limit)
        if self.lengths is not None:
            weights = {name: with_length(weight, self.lengths.get(name)) for name, weight in weights.items()}
        weights = {name: LimitGradient.apply(weight) for name, weight in weights.items()}
        momenta = {name: tuple(map(LimitGradient.apply, orders)) for name, orders in carry.momenta.items()}
        return carry._replace(base=weights, weights=weights, momenta=momenta)

    def share(self, like: Tensor) -> Tensor:
        """How far to go, between nothing and all the way."""
        if self.gate is None:
            return like.new_ones(())
        return self.gate.to(like).sigmoid()
