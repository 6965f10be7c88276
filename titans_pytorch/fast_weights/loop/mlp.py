"""The surprise of an MLP memory at one base, and the gradient of that, both written out.

For the tokens of one renewal, layers l = 1..D; `s` is minus the step size times the derivative of the loss:

    z_l = x_{l-1} W_l,   x_l = gelu(z_l),   y = norm(z_D),   E = g y + k - v,   P = s E            errors
    d_D = N(g P),        b_l = d_{l+1} W_{l+1}^T,   d_l = b_l gelu'(z_l),   d_g = sum_t P y        minus the gradients

N is the Jacobian of the norm at z_D, N(p) = (p - mean(p) - y mean(p y)) / deviation, and is symmetric.  Without a norm
E = z_D - v and d_D = P.  A chunk's surprise of W_l is sum_t x_{l-1}^T d_l.  A `bar` is the gradient of what it is
named for; that of N(p) with respect to z_D takes two sums over features and N itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.norms import norm, norm_gradient

aten = torch.ops.aten

AddProduct = Callable[[int, Tensor, Tensor], None]
"""(number of a matrix, a, b): add a^T b to its gradient"""


class Tokens(NamedTuple):
    """What is stored in N renewals of L tokens."""

    keys: Tensor  # (N r L d)
    offset: Tensor  # (N r L d)  of the error: k - v with a norm, else -v
    step: Tensor  # (N r L 1)  s


class Products(NamedTuple):
    """What is kept of the products with each matrix but the last, and of the first way."""

    before: Tensor  # (N r L h)  z_l
    behind: Tensor  # (N r L h)  b_l


class Normed(NamedTuple):
    """What a norm made of the output of the last product."""

    out: Tensor  # (... r L d)  z_D
    normed: Tensor  # (... r L d)  y
    mean: Tensor  # (... r L 1)
    scale: Tensor  # (... r L 1)  1 / deviation
    weighted: Tensor  # (... r L d)  P


class Base(NamedTuple):
    """Weights at which a renewal is surprised."""

    matrices: list[Tensor]  # (r i j) each
    gain: Tensor | None  # (r 1 d)  g = 1 + gamma; None without a norm


class MLPSurprise:
    """All renewals of a loop.

    inputs, errors: of each matrix x_{l-1} and d_l (N r L .), views of where the factors of surprises lie; the first
    input are the keys; of_gain: P y, the same of a gain that storing changes
    """

    def __init__(
        self,
        tokens: Tokens,
        products: Sequence[Products],
        inputs: Sequence[Tensor],
        errors: Sequence[Tensor],
        of_gain: Tensor | None,
    ) -> None:
        self.tokens, self.products, self.of_gain = tokens, products, of_gain
        self.keys, self.offset, self.step = (part.unbind(0) for part in tokens)
        self.inputs, self.errors = ([part.unbind(0) for part in each] for each in (inputs, errors))
        self.before = [part.before.unbind(0) for part in products]
        self.behind = [part.behind.unbind(0) for part in products]
        self.last_error = errors[-1]

    def forward(self, n: int, base: Base) -> Normed | Tensor:
        """The factors of renewal n, written where they belong.  -> what the norm left, or the output without a norm"""
        x, last = self.keys[n], len(base.matrices) - 1
        for layer, weight in enumerate(base.matrices[:-1]):
            z = torch.bmm(x, weight, out=self.before[layer][n])
            x = aten.gelu.out(z, out=self.inputs[layer + 1][n])
        out = torch.bmm(x, base.matrices[last])
        error, left = self.error(n, out, base.gain)
        self.errors[last][n].copy_(error)
        for layer in reversed(range(last)):
            b = torch.bmm(error, base.matrices[layer + 1].mT, out=self.behind[layer][n])
            error = aten.gelu_backward.grad_input(b, self.before[layer][n], grad_input=self.errors[layer][n])
        return left

    def error(self, n: int, out: Tensor, gain: Tensor | None) -> tuple[Tensor, Normed | Tensor]:
        """Minus the gradient at the output of the last product.  out: (r L d) -> same"""
        if gain is None:
            return torch.add(out, self.offset[n]).mul_(self.step[n]), out
        normed, mean, scale = norm(out)
        weighted = torch.addcmul(self.offset[n], normed, gain).mul_(self.step[n])
        if self.of_gain is not None:
            torch.mul(weighted, normed, out=self.of_gain[n])
        return norm_gradient(weighted * gain, out, mean, scale), Normed(out, normed, mean, scale, weighted)

    # ---- backwards

    def begin_backward(self, left: Normed | None, gains: Tensor | None, error_bar: Tensor | None) -> None:
        """left: what the norm left, of all renewals; gains: (N|1 r 1 d); error_bar: (N r L d), from whoever reads E"""
        derivatives = [gelu_derivatives(part.before) for part in self.products]
        self.slopes = [first.unbind(0) for first, _ in derivatives]
        self.curves = [
            second.mul_(part.behind).unbind(0) for (_, second), part in zip(derivatives, self.products, strict=True)
        ]
        self.error_bar = None if error_bar is None else error_bar.unbind(0)
        self.left = None
        if left is not None and gains is not None:
            self.left = [Normed(*each) for each in zip(*(part.unbind(0) for part in left), strict=True)]
            self.bends = bends(left, gains, self.last_error)
        self.key_bars: list[Tensor] = []
        self.weighted_bars: list[Tensor] = []  # of P

    def backward(
        self,
        n: int,
        base: Base,
        input_bars: list[Tensor],
        error_bars: list[Tensor],
        of_gain_bar: Tensor | None,
        add: AddProduct,
    ) -> Tensor | None:
        """Gradients of the base of renewal n: of matrices by `add`, of the gain (r 1 d); those of tokens are kept.

        input_bars, error_bars: of each matrix (r L .)
        """
        last = len(base.matrices) - 1
        for layer in range(last):
            behind_bar = error_bars[layer] * self.slopes[layer][n]
            above, error = layer + 1, self.errors[layer + 1][n]
            error_bars[above] = torch.baddbmm(error_bars[above], behind_bar, base.matrices[above])
            add(above, behind_bar, error)
        z_bar, gain_bar = self.out_bar(n, error_bars[last], base.gain, of_gain_bar)
        for layer in reversed(range(last + 1)):
            add(layer, self.inputs[layer][n] if layer > 0 else self.keys[n], z_bar)
            x_bar = torch.baddbmm(input_bars[layer], z_bar, base.matrices[layer].mT)
            if layer > 0:
                below = layer - 1
                z_bar = (x_bar * self.slopes[below][n]).addcmul_(error_bars[below], self.curves[below][n])
        self.key_bars.append(x_bar)
        return gain_bar

    def out_bar(
        self, n: int, q: Tensor, gain: Tensor | None, of_gain_bar: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of z_D and of the gain.  q: (r L d), that of d_D; of_gain_bar: (r L d), that of P y"""
        if gain is None or self.left is None:
            self.weighted_bars.append(q)
            return self.plus_error_bar(n, q * self.step[n]), None
        out, normed, mean, scale, weighted = self.left[n]
        p_bar = norm_gradient(q, out, mean, scale)  # of g P
        weighted_bar = p_bar * gain
        if of_gain_bar is not None:
            weighted_bar.addcmul_(of_gain_bar, normed)
        self.weighted_bars.append(weighted_bar)
        error_bar = self.plus_error_bar(n, weighted_bar * self.step[n])
        normed_bar = error_bar * gain
        if of_gain_bar is not None:
            normed_bar.addcmul_(of_gain_bar, weighted)
        minus_mean, pair = self.bends[n]
        z_bar = norm_gradient(normed_bar.addcmul_(minus_mean, q), out, mean, scale)
        along_normed, along_error = (pair * q.unsqueeze(2)).sum(dim=3, keepdim=True).unbind(2)
        z_bar = z_bar.addcmul_(along_error, normed).addcmul_(along_normed, self.errors[-1][n])
        return z_bar, (p_bar * weighted).addcmul_(error_bar, normed).sum(dim=1, keepdim=True)

    def plus_error_bar(self, n: int, bar: Tensor) -> Tensor:
        return bar if self.error_bar is None else bar.add_(self.error_bar[n])

    def token_bars(self, predicted: Tensor) -> Tokens:
        """Gradients of the tokens, after all renewals.  predicted: E without its offset  (N r L d)"""
        weighted_bar = torch.stack(self.weighted_bars[::-1])
        step_bar = (weighted_bar * (predicted + self.tokens.offset)).sum(dim=-1, keepdim=True)
        offset_bar = weighted_bar * self.tokens.step
        if self.error_bar is not None:
            offset_bar = offset_bar + torch.stack(self.error_bar)
        return Tokens(torch.stack(self.key_bars[::-1]), offset_bar, step_bar)


def bends(left: Normed, gains: Tensor, error: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the derivative of N with respect to z_D needs: -mean(p y) / deviation, and -(y, d_D) / (width deviation)."""
    minus_mean = (left.weighted * gains * left.normed).mean(dim=-1, keepdim=True).mul_(left.scale).neg_()
    pair = torch.stack((left.normed, error), dim=3) * (left.scale.unsqueeze(3) / -error.shape[-1])
    return list(zip(minus_mean.unbind(0), pair.unbind(0), strict=True))


def gelu_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    """gelu'(z) and gelu''(z)"""
    square = z * z
    density = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    first = torch.special.ndtr(z).addcmul_(z, density)
    return first, density.mul_(2 - square)
