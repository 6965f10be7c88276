"""Sums over the chunks of a block, of what its chunks bring and of what it began with.

    out_m = sum_n share_{m,n} step_n + sum_k share_{m,k} part_k

Their gradients are written by hand: the last sum is carried on alone, and autograd would make a tensor as large as all
of them to say what its gradient adds. Steps that are products of factors are multiplied again on the way back, as
they are as large as the weights of all chunks, and their factors are small.
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
from titans_pytorch.fast_weights.surprises import Factors

Parts = Sequence[tuple[Tensor, Tensor]]
"""(r m) and (r ...) each: shares in every sum, and what they are shares of"""

Steps = Tensor | Factors
"""(r n ...), or what is multiplied for it"""


def sums(share: Tensor, steps: Steps, parts: Parts = ()) -> Tensor:
    """share: (r m n), or of channels (r j m n); steps: (r n ...) -> (r m ...)"""
    steps = built(steps, share.dtype)
    if share.ndim == 4:
        return sum((scaled_over_chunks(*part) for part in parts), summed_over_chunks(share, steps))
    return shaped(products(share, flat(steps), *joined(parts)), steps.shape[2:])


def sums_and_last(share: Tensor, steps: Steps, parts: Parts = ()) -> tuple[Tensor, Tensor]:
    """`sums`, and the last of them as a tensor of its own.  -> (r m ...), (r ...)"""
    factors = tuple(steps) if isinstance(steps, Factors) else (steps,)
    tensors = (share, *factors, *(tensor for part in parts for tensor in part))
    if share.ndim == 3 and by_hand(*tensors, compiled=True):
        found: tuple[Tensor, Tensor] = SumsAndLast.apply(share, len(factors), *factors, *joined(parts))
        return found
    all_sums = sums(share, steps, parts)
    return all_sums, all_sums[:, -1].clone()


class SumsAndLast(torch.autograd.Function):
    """share: (r m n); tensors: steps or the factors of them, so many, and of parts (r m k) and (r k p)

    -> (r m ...), (r ...)
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor, num_factors: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(share, *tensors)
        ctx.num_factors = num_factors
        ctx.set_materialize_grads(False)
        steps = built(from_factors(tensors[:num_factors]), share.dtype)
        found = shaped(products(share, flat(steps), *tensors[num_factors:]), steps.shape[2:])
        return found, found[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, of_last: Tensor | None) -> Any:
        if gradient is None and of_last is None:
            return (None,) * len(ctx.needs_input_grad)
        share, *tensors = ctx.saved_tensors
        factors, parts = tensors[: ctx.num_factors], tensors[ctx.num_factors :]
        gradient = None if gradient is None else flat(gradient)
        of_last = None if of_last is None else of_last.reshape(len(of_last), -1)
        of_share, _, *needed = ctx.needs_input_grad
        found: list[Tensor | None] = [None, None]
        with full_precision(share):
            if of_share:
                steps = flat(built(from_factors(factors), share.dtype))
                found[0] = gradient_of_share(share, steps, gradient, of_last)
            if any(needed[: len(factors)]):
                found += gradients_of_factors(factors, gradient_of_steps(share, gradient, of_last))
            else:
                found += [None] * len(factors)
            if parts:
                shares, tensor = parts
                of_shares, of_tensor = needed[len(factors) :]
                found.append(gradient_of_share(shares, tensor, gradient, of_last) if of_shares else None)
                found.append(gradient_of_steps(shares, gradient, of_last) if of_tensor else None)
        return tuple(found)


def built(steps: Steps, dtype: torch.dtype) -> Tensor:
    """-> (r n ...)"""
    return (steps.matrices() if isinstance(steps, Factors) else steps).to(dtype)


def from_factors(factors: Sequence[Tensor]) -> Steps:
    """Steps of which there is one tensor, or two to be multiplied."""
    return factors[0] if len(factors) == 1 else Factors(*factors)


def gradients_of_factors(factors: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """One for steps that are given as they are, one for each of two factors.  gradient: (r n p)"""
    if len(factors) == 1:
        (steps,) = factors
        return [gradient.reshape(steps.shape).to(steps.dtype)]
    left, right = factors
    of_matrices = gradient.reshape(*gradient.shape[:2], left.shape[-1], right.shape[-1]).to(right.dtype)
    return [(right @ of_matrices.mT).to(left.dtype), left.to(right.dtype) @ of_matrices]


def gradient_of_share(share: Tensor, steps: Tensor, gradient: Tensor | None, of_last: Tensor | None) -> Tensor:
    """From the gradients of all sums (r m p) and of the last (r p), one of them at least.  -> (r m n)"""
    found = torch.zeros_like(share) if gradient is None else torch.bmm(gradient, steps.mT)
    if of_last is None:
        return found
    return found + F.pad(torch.bmm(of_last.unsqueeze(1), steps.mT), (0, 0, share.shape[1] - 1, 0))


def gradient_of_steps(share: Tensor, gradient: Tensor | None, of_last: Tensor | None) -> Tensor:
    """From the same.  -> (r n p)"""
    tables, gradients = [], []
    if gradient is not None:
        tables, gradients = [share], [gradient]
    if of_last is not None:
        tables.append(share[:, -1:])
        gradients.append(of_last.unsqueeze(1))
    found = torch.bmm(tables[0].mT, gradients[0])
    return found if len(tables) == 1 else plus_product(found, tables[1].mT, gradients[1])


def products(share: Tensor, steps: Tensor, part_shares: Tensor | None = None, parts: Tensor | None = None) -> Tensor:
    """(r m n) and (r n p), (r m k) and (r k p) -> (r m p)"""
    found = torch.bmm(share, steps)
    return found if part_shares is None or parts is None else plus_product(found, part_shares, parts)


def flat(steps: Tensor) -> Tensor:
    """(r n ...) -> (r n p)"""
    return steps.reshape(
        *steps.shape[:2], steps.shape[2:].numel()
    )  # which knows of batched gradients, as flatten does not


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
