"""Sums of weights with one scale for each row, as cheap backwards as forwards.

The gradient of a scale is a dot product over a whole weight; autograd would write the product out before summing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def scaled_sum(scales: Sequence[Tensor], weights: Sequence[Tensor], plus: Tensor | None = None) -> Tensor:
    """plus + sum_k scale_k weight_k.  scales: (r) each, weights and plus: (r ...) each -> (r ...)"""
    if torch.compiler.is_compiling():  # the compiler fuses for itself
        for scale, weight in zip(scales, weights, strict=True):
            term = weight * along(scale, weight)
            plus = term if plus is None else plus + term
        return plus if plus is not None else torch.zeros(())
    return ScaledSum.apply(plus, len(scales), *scales, *weights)


def along(scale: Tensor, weights: Tensor) -> Tensor:
    """(r) -> (r 1 ...)"""
    return scale.reshape(-1, *[1] * (weights.ndim - 1))


class ScaledSum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(plus: Tensor | None, num: int, *scales_and_weights: Tensor) -> Tensor:
        scales, weights = scales_and_weights[:num], scales_and_weights[num:]
        first = along(scales[0], weights[0])
        out = weights[0] * first if plus is None else torch.addcmul(plus, weights[0], first)
        for scale, weight in zip(scales[1:], weights[1:], strict=True):
            out.addcmul_(weight, along(scale, weight))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.num = inputs[1]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        num, needed = ctx.num, ctx.needs_input_grad[2:]
        scales, weights = ctx.saved_tensors[:num], ctx.saved_tensors[num:]
        flat = gradient.reshape(len(gradient), 1, -1)
        of_scales = [
            (flat @ weight.reshape(len(weight), -1, 1)).reshape(-1) if is_needed else None
            for weight, is_needed in zip(weights, needed[:num], strict=True)
        ]
        of_weights = [
            gradient * along(scale, gradient) if is_needed else None
            for scale, is_needed in zip(scales, needed[num:], strict=True)
        ]
        of_plus = gradient if ctx.needs_input_grad[0] else None
        return of_plus, None, *of_scales, *of_weights
