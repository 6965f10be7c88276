"""Polynomials of queries and keys, with learned coefficients (Atlas, arXiv 2505.23735).

    phi(x) = a_1 x + a_2 x^2 + ... + a_p x^p        feature by feature, a_i of every head, which starts as 1/i!

The paper's powers are outer products, with as many features as there are products; these keep the width, and so any
memory model fits. There is no constant: with features as keys it would be the same for all of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class KeyPowers(nn.Module):
    """What queries and keys of a head are compared by.  x: (b h t d) -> same"""

    def __init__(self, powers: int, heads: int) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.empty(powers, heads, 1, 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in the series of the exponential function."""
        for power, coefficient in enumerate(self.coefficients, start=1):
            coefficient.fill_(1 / math.factorial(power))

    def forward(self, x: Tensor) -> Tensor:
        *lower, found = self.coefficients
        for coefficient in reversed(lower):
            found = coefficient + x * found
        return x * found
