"""Sums of weights with one scale for each row, or each of its channels, as cheap backwards as forwards.

The gradient of a scale is a dot product over a whole weight; autograd would write the product out before summing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def scaled_sum(scales: Sequence[Tensor], weights: Sequence[Tensor], plus: Tensor | None = None) -> Tensor:
    """plus + sum_k scale_k weight_k.  scales: (r) or (r j) each, weights and plus: (r ... j) each -> (r ... j)"""
    if torch.compiler.is_compiling():  # the compiler fuses for itself
        for scale, weight in zip(scales, weights, strict=True):
            term = weight * along(scale, weight)
            plus = term if plus is None else plus + term
        return plus if plus is not None else torch.zeros(())
    return ScaledSum.apply(plus, len(scales), *scales, *weights)


def along(scale: Tensor, weights: Tensor) -> Tensor:
    """(r) -> (r 1 ...), or of channels (r j) -> (r 1 ... j)"""
    if scale.ndim == 1:
        return scale.reshape(-1, *[1] * (weights.ndim - 1))
    return scale.reshape(len(scale), *[1] * (weights.ndim - 2), *weights.shape[1:][-1:])


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
        of_scales = [
            gradient_of_scale(gradient, weight, scale) if is_needed else None
            for weight, scale, is_needed in zip(weights, scales, needed[:num], strict=True)
        ]
        of_weights = [
            gradient * along(scale, gradient) if is_needed else None
            for scale, is_needed in zip(scales, needed[num:], strict=True)
        ]
        of_plus = gradient if ctx.needs_input_grad[0] else None
        return of_plus, None, *of_scales, *of_weights


def gradient_of_scale(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if scale.ndim == 1:
        return (gradient.reshape(len(gradient), 1, -1) @ weight.reshape(len(weight), -1, 1)).reshape(-1)
    return (gradient * weight).reshape(len(weight), -1, scale.shape[1]).sum(dim=1)
