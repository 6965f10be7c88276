"""Sums over the chunks of a block, of what its chunks bring and of what it began with.

    out_m = sum_n share_{m,n} step_n + sum_k share_{m,k} part_k

Their gradients are written by hand: the last sum is carried on alone, and autograd would make a tensor as large as all
of them to say what its gradient adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.blocks.factored import scaled_over_chunks, summed_over_chunks
from titans_pytorch.fast_weights.inner_gradient import by_hand, plus_product
from titans_pytorch.fast_weights.precision import full_precision

Parts = Sequence[tuple[Tensor, Tensor]]
"""(r m) and (r ...) each: shares in every sum, and what they are shares of"""


def sums(share: Tensor, steps: Tensor, parts: Parts = ()) -> Tensor:
    """share: (r m n), or of channels (r j m n); steps: (r n ...) -> (r m ...)"""
    if share.ndim == 4:
        return sum((scaled_over_chunks(*part) for part in parts), summed_over_chunks(share, steps))
    return shaped(products(share, flat(steps), *joined(parts)), steps.shape[2:])


def sums_and_last(share: Tensor, steps: Tensor, parts: Parts = ()) -> tuple[Tensor, Tensor]:
    """`sums`, and the last of them as a tensor of its own.  -> (r m ...), (r ...)"""
    if share.ndim == 3 and by_hand(share, steps, *(tensor for part in parts for tensor in part)):
        found, last = SumsAndLast.apply(share, flat(steps), *joined(parts))
        return shaped(found, steps.shape[2:]), last.reshape(len(last), *steps.shape[2:])
    found = sums(share, steps, parts)
    return found, found[:, -1].clone()


class SumsAndLast(torch.autograd.Function):
    """share: (r m n), steps: (r n p), of parts (r m k) and (r k p) -> (r m p), (r p)"""

    @staticmethod
    def forward(ctx: Any, share: Tensor, steps: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(share, steps, *parts)
        ctx.set_materialize_grads(False)
        found = products(share, steps, *parts)
        return found, found[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, of_last: Tensor | None) -> Any:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
        found: list[Tensor | None] = []
        with full_precision(tensors[0]):
            for i in range(0, len(tensors), 2):  # shares, and what they are shares of
                share, steps = tensors[i : i + 2]
                found.append(gradient_of_share(share, steps, gradient, of_last) if needed[i] else None)
                found.append(gradient_of_steps(share, gradient, of_last) if needed[i + 1] else None)
        return tuple(found)


def gradient_of_share(share: Tensor, steps: Tensor, gradient: Tensor | None, of_last: Tensor | None) -> Tensor | None:
    """-> (r m n)"""
    found = None if gradient is None else torch.bmm(gradient, steps.mT)
    if of_last is None:
        return found
    row = F.pad(torch.bmm(of_last.unsqueeze(1), steps.mT), (0, 0, share.shape[1] - 1, 0))
    return row if found is None else found + row


def gradient_of_steps(share: Tensor, gradient: Tensor | None, of_last: Tensor | None) -> Tensor | None:
    """-> (r n p)"""
    found = None if gradient is None else torch.bmm(share.mT, gradient)
    if of_last is None:
        return found
    last, of_last = share[:, -1:].mT, of_last.unsqueeze(1)
    return torch.bmm(last, of_last) if found is None else plus_product(found, last, of_last)


def products(share: Tensor, steps: Tensor, part_shares: Tensor | None = None, parts: Tensor | None = None) -> Tensor:
    """(r m n) and (r n p), (r m k) and (r k p) -> (r m p)"""
    found = torch.bmm(share, steps)
    return found if part_shares is None or parts is None else plus_product(found, part_shares, parts)


def flat(steps: Tensor) -> Tensor:
    """(r n ...) -> (r n p)"""
    return steps.flatten(2) if steps.ndim > 2 else steps.unsqueeze(-1)


def shaped(found: Tensor, shape: torch.Size) -> Tensor:
    """(r m p) -> (r m ...)"""
    return found.unflatten(2, shape) if shape else found.squeeze(2)


def joined(parts: Parts) -> tuple[Tensor, ...]:
    """All parts as one.  -> (r m k) and (r k p), nothing if there are none"""
    if not parts:
        return ()
    shares, tensors = zip(*parts, strict=True)
    return together(shares, dim=-1), together([tensor.reshape(len(tensor), -1) for tensor in tensors], dim=1)


def together(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """As `torch.stack`; a single one is not copied."""
    return tensors[0].unsqueeze(dim) if len(tensors) == 1 else torch.stack(list(tensors), dim)
