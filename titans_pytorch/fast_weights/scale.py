"""`gate * weights + step`, with one gate for each row or for each of its channels, as cheap backwards as forwards.

The gradient of a gate is a dot product over a whole weight; autograd would write that product out before summing it.
So `Scale * tensor` waits for what is added to it, and the sum is worked out in one operation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Zero:
    """Something that is not there yet, as the momentum before the first chunk: it adds nothing."""

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


ZERO = Zero()


class Scale:
    """A number for each row (r), or for each channel of it (r j), that multiplies tensors (r ... j)."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __mul__(self, x: Tensor | Sum | Zero) -> Any:
        if isinstance(x, Zero):
            return x
        return Scaled((self.value,), (summed(x),))

    def __rsub__(self, one: float) -> Scale:
        return Scale(one - self.value)


class Sum(ABC):
    """A sum that waits for what is added to it."""

    @abstractmethod
    def plus(self, term: Tensor | Sum) -> Tensor | Sum:
        """This and another term."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """What it is, if nothing more comes."""

    def __add__(self, other: Any) -> Any:
        return self if isinstance(other, Zero) else self.plus(other)

    __radd__ = __add__


class Scaled(Sum):
    """A sum of tensors, each with a scale."""

    def __init__(self, scales: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
        self.scales, self.tensors = scales, tensors

    def plus(self, term: Tensor | Sum) -> Tensor | Sum:
        if isinstance(term, Scaled):
            return Scaled(self.scales + term.scales, self.tensors + term.tensors)
        return scaled_sum(self.scales, self.tensors, summed(term))

    def tensor(self) -> Tensor:
        return scaled_sum(self.scales, self.tensors)


def summed(term: Tensor | Sum | Zero, like: Tensor | None = None) -> Tensor:
    """The tensor that a sum is.  like: the shape of nothing at all"""
    if isinstance(term, Sum):
        return term.tensor()
    if isinstance(term, Zero):
        return torch.zeros(()) if like is None else torch.zeros_like(like)
    return term


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
        saved = ctx.saved_tensors  # once: checkpointing refuses to unpack a second time
        scales, weights = saved[:num], saved[num:]
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
