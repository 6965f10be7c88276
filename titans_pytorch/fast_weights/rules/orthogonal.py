"""Orthogonal steps: five Newton-Schulz iterations towards the nearest matrix with equal singular values.

Each iteration multiplies t from the left by a polynomial of A = t t^T,  t <- P t with P = a + b A + c A A.  All P
commute with A, so the iterations can run on the small square side alone,  A <- P A P^T = A P^2;  t is touched twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans_pytorch.fast_weights.inner_gradient import plain_autograd_works
from titans_pytorch.fast_weights.norms import safe_norm
from titans_pytorch.fast_weights.rules.gates import ChunkGates, Gates
from titans_pytorch.fast_weights.rules.rule import Coefficients, Rule, Term

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
SMALLEST_NORM = 1e-7


class Orthogonal(Rule):
    """Another rule, whose step of every matrix is made orthogonal before it is added."""

    why_built = "spectral_norm_surprises, which acts on every step"

    def __init__(self, rule: Rule) -> None:
        self.rule, self.gates, self.num_momenta = rule, rule.gates, rule.num_momenta
        self.is_linear, self.uses_start = rule.is_linear, rule.uses_start
        self.transform = orthogonalised

    def move(self, momenta: tuple[Term, ...], surprise: Term, gates: ChunkGates) -> tuple[Term, tuple[Term, ...]]:
        """What the other rule adds, before it is made orthogonal."""
        return self.rule.move(momenta, surprise, gates)

    def retain(self, weights: Term, step: Term, gates: ChunkGates, start: Term) -> Term:
        """What the other rule keeps."""
        return self.rule.retain(weights, step, gates, start)

    def coefficients(self, gates: Gates) -> Coefficients:
        """Those of the other rule: `transform` acts between its step and its weights."""
        return self.rule.coefficients(gates)


def orthogonalised(t: Tensor) -> Tensor:
    """t: (... i j) -> (... i j), every matrix on its own"""
    if t.shape[-2] > t.shape[-1]:
        return orthogonalised(t.mT).mT
    norm = safe_norm(t.square().sum(dim=(-2, -1), keepdim=True)).clamp(min=SMALLEST_NORM)
    t = t / norm
    gram = t @ t.mT
    factor: Tensor = Polynomial.apply(gram) if gram.requires_grad and plain_autograd_works() else polynomial(gram)
    return factor @ t


def polynomial(gram: Tensor) -> Tensor:
    """The product of all iterations' polynomials of the Gram matrix.  (... i i) -> (... i i)"""
    a, b, c = COEFFICIENTS
    shape, gram = gram.shape, gram.flatten(0, -3)
    scaled_identity = a * torch.eye(shape[-1], dtype=gram.dtype, device=gram.device)
    total = None
    for iteration in range(NUM_ITERATIONS):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step = step + scaled_identity.to(step.dtype)
        total = step if total is None else step @ total
        if iteration + 1 < NUM_ITERATIONS:
            gram = gram @ step @ step
    return gram.unflatten(0, shape[:-2]) if total is None else total.unflatten(0, shape[:-2])


class Polynomial(torch.autograd.Function):
    """Keeps the Gram matrix alone for its backward pass: the iterations fill twenty times the memory of what they act
    on, and repeating them costs less than writing and reading all that."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor) -> Tensor:
        ctx.save_for_backward(gram)
        return polynomial(gram)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gram,) = ctx.saved_tensors
        is_differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            gram = gram if is_differentiable else gram.detach().requires_grad_()
            (found,) = torch.autograd.grad(polynomial(gram), gram, gradient, create_graph=is_differentiable)
        return found
