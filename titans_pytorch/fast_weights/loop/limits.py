"""What happens in a loop where the base is renewed, in place, over all packs, and back.

How far the base goes to the current weights, a base that has outgrown its limit, a gradient that would overflow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_pytorch.fast_weights.renewal import MAX_CARRIED_GRADIENT


def limit_growth(weights: Sequence[Tensor], limit: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Make a memory smaller whose norm has outgrown a limit.

    weights: of packs (g r p q), limit: (r), norms: room for those of all matrices, as one over packs would be slow
    -> by how much (r), 1 where it was not; the norm before (r)
    """
    for part, weight in zip(norms.split([len(weight) for weight in weights]), weights, strict=True):
        torch.linalg.vector_norm(weight, dim=(2, 3), out=part)
    norm = torch.linalg.vector_norm(norms, dim=0)
    scale = limit / torch.maximum(norm, limit)
    for weight in weights:
        weight.mul_(scale[:, None, None])
    return scale, norm


def approach(bases: Sequence[Tensor], weights: Sequence[Tensor], share: Tensor) -> None:
    """Weights become a mix of the base and themselves.  bases, weights: of packs (g r p q), share: ()"""
    for base, weight in zip(bases, weights, strict=True):
        torch.lerp(base, weight, share, out=weight)


def approach_backward(
    bars: Sequence[Tensor], bases: Sequence[Tensor], weights: Sequence[Tensor], share: Tensor
) -> tuple[list[Tensor], Tensor]:
    """From the gradients of the mix to those of the weights.  weights: the mix  -> those of the base, of the share"""
    of_bases = [bar * (1 - share) for bar in bars]
    moved = sum((bar * (weight - base)).sum() for bar, base, weight in zip(bars, bases, weights, strict=True))
    for bar in bars:
        bar.mul_(share)
    return of_bases, moved / share


FREE_TO_LOOK = {"cpu"}
"""Kinds of device whose numbers can be looked at without waiting for them"""


def may_have_acted(scales: Tensor | None) -> bool:
    """Whether a limit may have made a base smaller.  scales: by how much, of all renewals (N r)"""
    if scales is None:
        return False
    return scales.device.type not in FREE_TO_LOOK or not bool((scales == 1).all())


def growth_backward(
    bars: Sequence[Tensor], weights: Sequence[Tensor], limit: Tensor, scale: Tensor, norm: Tensor
) -> Tensor:
    """From the gradients of limited weights to those of the weights before.  -> that of the limit (r)

    With s = limit / norm and w' = s w:

        w_bar = s w'_bar - <w'_bar, w'> / (limit norm) w',  limit_bar = <w'_bar, w'> / limit
    """
    first, *more = ((bar * weight).sum(dim=(0, 2, 3)) for bar, weight in zip(bars, weights, strict=True))
    of_limit = torch.where(norm > limit, sum(more, first), 0.0) / limit
    by_weight = (of_limit / -norm)[:, None, None]
    for bar, weight in zip(bars, weights, strict=True):
        bar.mul_(scale[:, None, None]).addcmul_(weight, by_weight)
    return of_limit


def limit_gradient(bar: Tensor) -> None:
    """Where the inner loop is chaotic its gradient would overflow, see `renewal.LimitGradient`.

    bar: (a ... p q), whose matrices lie at equal distances, if not all of them those of each of the first axis
    """
    bound = MAX_CARRIED_GRADIENT
    bar.clamp_(-bound, bound)
    for part in [bar] if len(bar) == 1 or bar.stride(0) == bar.stride(1) * bar.shape[1] else bar.unbind(0):
        part.view(-1, bar.shape[-2:].numel()).renorm_(2, 0, bound)
