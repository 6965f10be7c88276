"""The gradient inside the forward pass: differentiable again, and alive whatever surrounds it.

Plain autograd is the fastest and works under activation checkpointing; `torch.func` works where plain autograd cannot:
under `inference_mode`, in a graph that is being compiled, and inside somebody's own function transforms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Tap = Callable[[Tensor], Tensor]
Objective = Callable[[list[Tensor], Tap], tuple[Tensor, list[Tensor]]]
"""(inputs, tap) -> (a scalar, whatever else); `tap` is called once on each tensor whose gradient is wanted as well"""


class Gradients(NamedTuple):
    inputs: list[Tensor]
    taps: list[Tensor]
    aux: list[Tensor]


def gradients(objective: Objective, inputs: list[Tensor], taps: list[Tensor]) -> Gradients:
    """Gradients of an objective, of its inputs and of what it taps.  taps: zeros, shaped as what is tapped"""
    return by_autograd(objective, inputs) if plain_autograd_works() else by_transform(objective, inputs, taps)


def plain_autograd_works() -> bool:
    is_traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not is_traced and not torch.is_inference_mode_enabled()


def written_gradients_work() -> bool:
    """Whether operations whose gradient is written out are to be used: a compiler makes its own."""
    return not (torch.compiler.is_compiling() or is_transformed())


def by_hand(*tensors: Tensor, compiled: bool = False) -> bool:
    """Whether a gradient is to be written by hand: one may be asked for, by autograd alone.

    compiled: also in a compiler, so that it rounds there as it does without one
    """
    is_asked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return is_asked and (not is_transformed() if compiled else written_gradients_work())


def plus_product(x: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """x + alpha left @ right, into x, which nobody else may need; no transform knows how to do that in place."""
    return (x.baddbmm_ if written_gradients_work() else partial(torch.baddbmm, x))(left, right, alpha=alpha)


def is_transformed() -> bool:
    """Whether a gradient that is written for the way back alone would not do: in transforms, or carried forward."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def by_autograd(objective: Objective, inputs: list[Tensor]) -> Gradients:
    is_differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        tapped: list[Tensor] = []

        def tap(x: Tensor) -> Tensor:
            tapped.append(needs_grad(x))
            return tapped[-1]

        inputs = [needs_grad(x) for x in inputs]
        total, aux = objective(inputs, tap)
        wanted = (*inputs, *tapped)
        found = torch.autograd.grad(total, wanted, create_graph=is_differentiable, materialize_grads=True)
    aux = aux if is_differentiable else [x.detach() for x in aux]
    return Gradients(list(found[: len(inputs)]), list(found[len(inputs) :]), aux)


def by_transform(objective: Objective, inputs: list[Tensor], taps: list[Tensor]) -> Gradients:
    def with_zeros(inputs: list[Tensor], taps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        rest = iter(taps)
        return objective(inputs, lambda x: x + next(rest))

    (of_inputs, of_taps), aux = torch.func.grad(with_zeros, argnums=(0, 1), has_aux=True)(inputs, taps)
    return Gradients(of_inputs, of_taps, aux)


def needs_grad(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()
