"""Surprises of chunks, without gradient matrices: u_j = left_j^T right_j for what is used in products."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from titans_pytorch.fast_weights.interface import Weights, Writes
from titans_pytorch.fast_weights.norms import safe_norm, smooth_limit


class Factors(NamedTuple):
    """A chunk's surprise as a product, u_j = left_j^T right_j, oriented like the parameter."""

    left: Tensor  # (r n c i)
    right: Tensor  # (r n c j)

    def matrices(self) -> Tensor:
        """-> (r n i j)"""
        return self.left.to(self.right.dtype).mT @ self.right

    def square(self) -> Tensor:
        """Squared Frobenius norm of each chunk's matrix, from the Gram matrices of its tokens.  -> (r n)"""
        return ((self.left @ self.left.mT) * (self.right @ self.right.mT)).sum(dim=(-2, -1))

    def scaled(self, scale: Tensor) -> Factors:
        return Factors(self.left, self.right * scale[..., None, None])


class Surprises(NamedTuple):
    """What each chunk of a block adds to the momentum; nothing of a parameter that the model never uses."""

    factors: dict[str, Factors]
    tensors: Weights  # (r n ...)  of what is not used in products

    def steps(self, name: str) -> Tensor | None:
        """The surprises of a parameter as tensors.  -> (r n ...)"""
        return self.factors[name].matrices() if name in self.factors else self.tensors.get(name)


def surprises_of(gradients: Surprises, writes: Writes, max_grad_norm: float | None) -> Surprises:
    """Gradients to surprises: u = -gradient, limited in norm, times the parameter's modulation."""
    rates = writes.rates.any
    descends = rates.new_full(rates.shape[:2], -1.0)

    def scale(name: str, square: Tensor | None) -> Tensor:
        limit = smooth_limit(safe_norm(square), max_grad_norm) if square is not None and max_grad_norm else None
        scale = descends if limit is None else -limit
        share = writes.modulation.get(name)
        return scale if share is None else scale * share

    factors = {
        name: f.scaled(scale(name, f.square() if max_grad_norm else None)) for name, f in gradients.factors.items()
    }
    tensors = {}
    for name, t in gradients.tensors.items():
        square = t.reshape(*t.shape[:2], -1).square().sum(dim=2) if max_grad_norm else None
        tensors[name] = t * scale(name, square).reshape(*t.shape[:2], *[1] * (t.ndim - 2))
    return Surprises(factors, tensors)
