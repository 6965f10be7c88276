"""What a loop reads: queries through an MLP of their own each, and the gradient of that, written out.

    z_l = x_{l-1} W_l,   x_l = gelu(z_l),   y = norm(z_D),   answer = g y + q

The gradient of a matrix is x_{l-1}^T times that of z_l. It is left as these two: the loop multiplies them block by
block, where a tensor as large as the weights of all blocks would have to be written and read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.norms import norm, norm_gradient

aten = torch.ops.aten


class NormOf(NamedTuple):
    """A norm with what its gradient needs."""

    out: Tensor  # (R c d)  z_D
    mean: Tensor  # (R c 1)
    scale: Tensor  # (R c 1)  1 / deviation


class Reading(NamedTuple):
    """What is kept of reading for a backward pass.  R = N·r·k rows"""

    inputs: list[Tensor]  # (R c h)  x_l
    before: list[Tensor]  # (R c h)  z_l, of all matrices but the last
    norm: NormOf | None  # of z_D


class ReadBars(NamedTuple):
    """Gradients of what reading was given."""

    queries: Tensor  # (N r k c d)
    products: list[tuple[Tensor, Tensor]]  # (N k r c i), (N k r c j)  of every matrix, whose gradient is a^T b
    gain: Tensor | None  # (N k r 1 d)


def read(
    queries: Tensor, matrices: Sequence[Tensor], gain: Tensor | None, out: Tensor, keeps_all: bool = False
) -> Reading | None:
    """queries, out: (N r k c d), matrices: (N r k i j), gain: (... r ... 1 d) or None without a norm

    keeps_all: for a backward pass
    """
    x, inputs, before = queries.flatten(0, -3), [], []
    for layer, weight in enumerate(matrices):
        if layer > 0:
            before += [x] if keeps_all else []
            x = aten.gelu(x)
            inputs += [x] if keeps_all else []
        x = torch.bmm(x, weight.flatten(0, -3))
    if gain is None:
        out.copy_(x.view_as(out))
        return Reading(inputs, before, None) if keeps_all else None
    normed, mean, scale = norm(x)
    torch.addcmul(queries, normed.view_as(queries), gain, out=out)
    return Reading(inputs, before, NormOf(x, mean, scale)) if keeps_all else None


def read_backward(
    bar: Tensor, queries: Tensor, matrices: Sequence[Tensor], gain: Tensor | None, kept: Reading
) -> ReadBars:
    """bar: the gradient of what was read (N r k c d); the rest as `read` was given it"""

    def apart(x: Tensor) -> Tensor:
        return x.view(*queries.shape[:-1], x.shape[-1])

    out_bar, gain_bar = bar.flatten(0, -3), None
    if gain is not None and kept.norm is not None:
        out, mean, scale = kept.norm
        gain_bar = (bar * apart((out - mean) * scale)).sum(dim=-2, keepdim=True).movedim(2, 1)
        out_bar = norm_gradient((bar * gain).flatten(0, -3), out, mean, scale)
    inputs = [queries.flatten(0, -3), *kept.inputs]
    products: list[tuple[Tensor, Tensor]] = []
    for layer in reversed(range(len(matrices))):
        products.insert(0, (apart(inputs[layer]).movedim(2, 1), apart(out_bar).movedim(2, 1)))
        input_bar = torch.bmm(out_bar, matrices[layer].flatten(0, -3).mT)
        if layer > 0:
            out_bar = aten.gelu_backward(input_bar, kept.before[layer - 1])
    query_bar = apart(input_bar)
    return ReadBars(query_bar if gain is None else query_bar.add_(bar), products, gain_bar)
