"""Spectral normalisation of steps: five Newton-Schulz iterations towards the nearest matrix with equal singular values.

Each iteration multiplies t from the left by a polynomial of A = t t^T,  t <- P t with P = a + b A + c A A.  All P
commute with A, so the iterations can run on the small square side alone,  A <- P A P^T = A P^2;  t is touched twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.fast_weights.limits import safe_norm

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
SMALLEST_NORM = 1e-7


def orthogonalised(t: Tensor) -> Tensor:
    """t: (... i j) -> (... i j), every matrix on its own"""
    if t.shape[-2] > t.shape[-1]:
        return orthogonalised(t.mT).mT
    norm = safe_norm(t.square().sum(dim=(-2, -1), keepdim=True)).clamp(min=SMALLEST_NORM)
    t = t / norm
    return polynomial(t @ t.mT) @ t


def polynomial(gram: Tensor) -> Tensor:
    """The product of all iterations' polynomials of the Gram matrix.  (... i i) -> (... i i)"""
    a, b, c = COEFFICIENTS
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    total = None
    for iteration in range(NUM_ITERATIONS):
        step = a * identity + b * gram + c * (gram @ gram)
        total = step if total is None else step @ total
        if iteration + 1 < NUM_ITERATIONS:
            gram = gram @ step @ step
    return total if total is not None else identity
