"""Sums over residual streams, and over what layers saw, whose gradients are written by hand.

Autograd would make several tensors as large as all streams for each, or keep all that is summed once more. Writing such
tensors takes longer than computing: on a CPU, memory that was not touched before costs most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.inner_gradient import by_hand
from titans_pytorch.fast_weights.precision import full_precision, is_autocasting

SMALLEST_LENGTH = 1e-12
TOGETHER = 6 * 2**20
"""Numbers of candidates that a CPU mixes at once (24 MB in float32): allocators keep tensors of up to 32 MB"""


def coefficients(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A map of every vector at the length of sqrt(d), and constants.  x: (b n s d), (c d), (s c) -> (b n s c)"""
    if by_hand(x, weight, bias):
        return MapOfDirections.apply(x, weight, bias)
    return with_lengths(x, weight, bias)[0]


def with_lengths(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> coefficients, what the map gives of the vectors as they are (b n s c), their lengths (b n s 1)"""
    length = F.threshold(torch.linalg.vector_norm(x, dim=-1, keepdim=True), SMALLEST_LENGTH, SMALLEST_LENGTH)
    raw = F.linear(x, weight)
    return torch.addcdiv(bias, raw, length, value=x.shape[-1] ** 0.5), raw, length


def added(streams: Tensor, answer: Tensor, shares: Tensor) -> Tensor:
    """streams + 2 shares * answer.  (b n s d), (b n 1 d), (b n s 1) -> (b n s d)"""
    if by_hand(streams, answer, shares):
        return Added.apply(streams, answer, shares)
    return streams.addcmul(answer, shares, value=2)


def mixed(weights: Tensor, candidates: list[Tensor]) -> Tensor:
    """Sums of candidates, weighted for every token.  (b n v k), k times (b n d) -> (b n v d)"""
    if by_hand(weights, *candidates):
        return Mixed.apply(weights, *candidates)
    return weights @ torch.stack(candidates, dim=2).to(weights.dtype)


class MapOfDirections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out, raw, length = with_lengths(x, weight, bias)
        ctx.save_for_backward(x, weight, raw, length)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, raw, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # it will be differentiated itself
            _, raw, length = with_lengths(x, weight, gradient)
        of_raw = gradient * (x.shape[-1] ** 0.5 / length)
        along = torch.where(length > SMALLEST_LENGTH, (of_raw * raw).sum(dim=-1, keepdim=True) / length.square(), 0.0)
        of_x = (of_raw.to(weight.dtype) @ weight).to(x.dtype).addcmul_(x, along, value=-1)
        rows = of_raw.reshape(-1, of_raw.shape[-1]).to(x.dtype)
        of_weight = (rows.mT @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, gradient.sum(dim=(0, 1))


class Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, answer: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(answer, shares)
        ctx.dtype = streams.dtype
        return streams.addcmul(answer, shares, value=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        answer, shares = ctx.saved_tensors
        with full_precision(gradient):
            of_answer = (2 * shares).to(gradient.dtype).mT @ gradient
            of_shares = gradient @ (2 * answer).to(gradient.dtype).mT
        return gradient.to(ctx.dtype), of_answer.to(answer.dtype), of_shares.to(shares.dtype)


class Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, *candidates: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *candidates)
        ctx.dtype = dtype_of_products(weights)
        with full_precision(weights):
            return sum_of_products(groups(weights, candidates, ctx.dtype)).unflatten(0, weights.shape[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weights, *candidates = ctx.saved_tensors
        rows = gradient.reshape(-1, *gradient.shape[2:]).to(ctx.dtype)
        of_weights: list[Tensor] = []
        of_candidates: list[Tensor] = []
        with full_precision(weights):
            for shares, group in groups(weights, candidates, ctx.dtype):
                of_weights.append(torch.bmm(rows, group.mT))
                of_candidates += torch.bmm(shares.mT, rows).unflatten(0, weights.shape[:2]).unbind(dim=2)
        found = zip(of_candidates, candidates, strict=True)
        of_all = torch.cat(of_weights, dim=-1).unflatten(0, weights.shape[:2]).to(weights.dtype)
        return of_all, *(of_one.to(one.dtype) for of_one, one in found)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype of a product with x, under autocast or not."""
    if is_autocasting(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def sum_of_products(pairs: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """(m i k), (m k j) each -> (m i j)"""
    total = torch.bmm(*next(pairs))
    for pair in pairs:
        total.baddbmm_(*pair)
    return total


def groups(weights: Tensor, candidates: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Some candidates after the others, and their weights.  (b n v k), (b n d) each -> (b·n v g), (b·n g d) each"""
    weights = weights.to(dtype)
    size = len(candidates)
    if weights.device.type == "cpu":
        size = max(1, TOGETHER // max(1, candidates[0].numel()))
    for start in range(0, len(candidates), size):
        group = torch.stack(list(candidates[start : start + size]), dim=2).to(dtype)
        yield weights[..., start : start + size].flatten(0, 1), group.flatten(0, 1)
