"""Retentions of Miras (arXiv 2504.13173): what a memory is kept near to, and how.

A memory goes down from where it is, and is held near to it. Where it is held by something else than the square of the
distance, it moves in another place: weights W are seen through a map as A, A is moved, and W is what A maps back to.

    A_t = (1 - alpha_t) D(W_{t-1}) + S_t,   W_t = P(A_t)        (24)-(27);  D and P are inverse to each other

    lq    P(A) = A / |A|_q^(q-2)            (25)  Moneta, whose q is 4; q = 2 is the rule of Titans
    kl    P(A) = s softmax(A), D = log      (27)  Memora: every column is a share of s, the root of its length

S_t is the step of the rule of Titans, which Miras has without momentum. Matrices are retained so; vectors as by Titans.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.fast_weights.rules.gates import ChunkGates
from titans_pytorch.fast_weights.rules.rule import Term
from titans_pytorch.fast_weights.rules.titans import Titans
from titans_pytorch.fast_weights.scale import summed

SMALL = 1e-30
"""What keeps the norm of nothing from being 0"""


class Retention(ABC):
    """Where weights are moved, and back.  (... i j) -> same, every matrix by itself"""

    zeros_stay = True  # whether a weight that is zero and is not moved stays zero

    @abstractmethod
    def moved_from(self, weights: Tensor) -> Tensor:
        """D, where steps are added."""

    @abstractmethod
    def weights_of(self, moved: Tensor) -> Tensor:
        """P, what is read."""

    def begun(self, weights: Tensor) -> Tensor:
        """What a learned start stands for."""
        return weights


class QNorm(Retention):
    """Weights that are divided by a power of the q-norm of all of them."""

    def __init__(self, q: float) -> None:
        self.q = q

    def norm(self, x: Tensor) -> Tensor:
        """(... i j) -> (... 1 1)"""
        power = x.abs().pow(self.q).sum(dim=(-2, -1), keepdim=True)
        return (power + SMALL).pow(1 / self.q)

    def moved_from(self, weights: Tensor) -> Tensor:
        """A = W |A|^(q-2), where |A| = |W|^(1 / (3-q))."""
        return weights * self.norm(weights).pow((self.q - 2) / (3 - self.q))

    def weights_of(self, moved: Tensor) -> Tensor:
        """W = A / |A|^(q-2)."""
        return moved / self.norm(moved).pow(self.q - 2)


class KullbackLeibler(Retention):
    """Columns of shares, all above zero, of the root of their length each."""

    zeros_stay = False

    def moved_from(self, weights: Tensor) -> Tensor:
        """Logarithms; a common number in a column means nothing."""
        return weights.clamp(min=torch.finfo(weights.dtype).tiny).log()

    def weights_of(self, moved: Tensor) -> Tensor:
        """Shares of a column, which is as long as one that is usual."""
        return moved.softmax(dim=-2) * moved.shape[-2] ** 0.5

    def begun(self, weights: Tensor) -> Tensor:
        """A start of usual weights is as uneven as normal numbers of deviation 1 or less."""
        return self.weights_of(weights * weights.shape[-2] ** 0.5)


class Retained(Titans):
    """The rule of Titans, with another retention."""

    is_linear = False
    why_built = "a retention that is not linear in weights"

    def __init__(self, retention: Retention, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.retention, self.zeros_stay = retention, retention.zeros_stay

    def retain(self, weights: Term, step: Term, gates: ChunkGates, start: Term) -> Term:
        """The weights after a chunk: moved where the retention says, and what that stands for."""
        weights = summed(weights)
        if weights.ndim < 3:  # a vector of every row
            return super().retain(weights, step, gates, start)
        return self.retention.weights_of(summed(gates.keep * self.retention.moved_from(weights) + step))

    def begun(self, weights: Tensor) -> Tensor:
        """What a learned start stands for.  (r ...)"""
        return self.retention.begun(weights) if weights.ndim >= 3 else weights
