"""Norms that are safe at zero, limits that are the identity where nothing needs limiting, and layer norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.inner_gradient import by_hand, is_transformed
from titans_pytorch.fast_weights.precision import at_least_float32, is_autocasting
from titans_pytorch.memory_models import NORM_EPS


def safe_norm(square: Tensor) -> Tensor:
    """A square root with a finite gradient (zero) at zero."""
    is_positive = square > 0
    return torch.where(is_positive, square, 1.0).sqrt() * is_positive


def smooth_limit(norm: Tensor, limit: float) -> Tensor:
    """Factor that brings a norm under the limit: max * tanh(norm / max) / norm, 1 at zero."""
    is_positive = norm > 0
    safe = torch.where(is_positive, norm, 1.0)
    return torch.where(is_positive, limit * torch.tanh(safe / limit) / safe, 1.0)


def total_norm(weights: Mapping[str, Tensor]) -> Tensor:
    """The norm of all parameters of a row together; its gradient at zero is zero.  (r ...) -> (r)"""
    norms = [torch.linalg.vector_norm(weight.reshape(len(weight), -1), dim=1) for weight in weights.values()]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def length_of(weight: Tensor) -> Tensor | None:
    """How long the weights of every output of a matrix are.  (r i j) -> (r 1 j); None: it is no matrix"""
    return safe_norm(weight.square().sum(dim=-2, keepdim=True)) if weight.ndim > 2 else None


def lengths_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """That of every matrix."""
    return {name: length for name, weight in weights.items() if (length := length_of(weight)) is not None}


def with_length(weight: Tensor, length: Tensor | None) -> Tensor:
    """A matrix with the weights of every output as long as they are to be; those of nothing stay nothing.  (r i j)"""
    own = length_of(weight)
    if length is None or own is None:
        return weight
    return weight * (length / torch.where(own > 0, own, 1.0))


def norm(x: Tensor, eps: float = NORM_EPS) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x) over the last axis, with the mean and the inverse deviation that its gradient needs."""
    return torch.native_layer_norm(x, x.shape[-1:], None, None, eps)


def layer_norm(x: Tensor, num_axes: int = 1, eps: float = NORM_EPS) -> Tensor:
    """norm(x) over so many last axes, whose gradient is right however often it is differentiated; torch's is not."""
    if torch.compiler.is_compiling():  # which makes gradients of its own
        return F.layer_norm(x, x.shape[-num_axes:], eps=eps)
    if is_autocasting(x) and x.device.type != "cpu":  # as autocast has it there
        x = x.to(at_least_float32(x.dtype))
    flat = x.flatten(-num_axes)
    if is_transformed():
        mean, scale = moments(flat, eps)
        return ((flat - mean) * scale).view(x.shape)
    found: Tensor = Norm.apply(flat, eps)
    return found.view(x.shape)


def norm_gradient(of_normed: Tensor, x: Tensor, mean: Tensor, scale: Tensor, eps: float = NORM_EPS) -> Tensor:
    """From the gradient with respect to norm(x) to that with respect to x, differentiable again.  (... d) each"""
    if is_transformed():
        return projected_plainly(of_normed, x, *moments(x, eps))
    if by_hand(of_normed, x, compiled=True):
        found: Tensor = NormGradient.apply(of_normed, x, mean, scale, eps)
        return found
    return projected(of_normed, x, mean, scale)


class Norm(torch.autograd.Function):
    """`norm` by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        found, mean, scale = norm(x, eps)
        ctx.save_for_backward(x, mean, scale)
        ctx.eps = eps
        return found

    @staticmethod
    def backward(ctx: Any, of_normed: Tensor) -> Any:
        x, mean, scale = ctx.saved_tensors
        return norm_gradient(of_normed, x, mean, scale, ctx.eps), None


class NormGradient(torch.autograd.Function):
    """N(p) = (p - mean(p) - y mean(p y)) / deviation, for the norm y of x: symmetric, and with a derivative at x

        -N((p mean(q y) + q mean(p y)) / deviation) - y mean(q N(p)) / deviation

    in the direction q. torch's own takes more operations, and is wrong if it is differentiated once more, as mean and
    deviation are constants to it (pytorch issue 175754).
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, x: Tensor, mean: Tensor, scale: Tensor, eps: float) -> Tensor:
        found = projected(p, x, mean, scale)
        ctx.save_for_backward(p, x, mean, scale, found)
        ctx.eps = eps
        return found

    @staticmethod
    def backward(ctx: Any, q: Tensor) -> Any:
        p, x, mean, scale, found = ctx.saved_tensors
        project = projected
        if torch.is_grad_enabled():  # it will be differentiated itself, so all is made of x again
            project = projected_plainly
            mean, scale = moments(x, ctx.eps)
            found = project(p, x, mean, scale)
        y = (x - mean) * scale
        bent = p * (q * y).mean(dim=-1, keepdim=True) + q * (p * y).mean(dim=-1, keepdim=True)
        along = (q * found).mean(dim=-1, keepdim=True)
        of_x = -project((bent * scale).to(x.dtype), x, mean, scale) - y * (along * scale)
        return project(q, x, mean, scale), of_x.to(x.dtype), None, None, None


def moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The mean and the inverse deviation of x, differentiable as often as one likes.  (... d) -> (... 1) each"""
    mean = x.mean(dim=-1, keepdim=True)
    return mean, ((x - mean).square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def projected(p: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """N(p), in one operation."""
    only_x = [True, False, False]
    args = (p, x, x.shape[-1:], mean, scale, None, None, only_x)
    return cast(Tensor, torch.ops.aten.native_layer_norm_backward(*args)[0])


def projected_plainly(p: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """N(p), differentiable as often as one likes."""
    y = (x - mean) * scale
    return scale * (p - p.mean(dim=-1, keepdim=True) - y * (p * y).mean(dim=-1, keepdim=True))
