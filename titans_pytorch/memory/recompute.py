"""Activation checkpointing of a function that takes gradients itself.

`torch.utils.checkpoint` cannot hold a function whose forward differentiates: its hooks meet the inner graph as well.
Here the forward keeps no graph at all; the backward pass runs the function again, with one. What takes long to make
can be noted in the first run (`fast_weights.noted`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from titans_pytorch.fast_weights.noted import Notes, taking
from titans_pytorch.fast_weights.precision import same_autocast

Result = TypeVar("Result")
Run = Callable[[Sequence[Tensor]], list[Tensor]]


def recomputed(fn: Callable[..., Result], *args: Any, parameters: Sequence[Tensor], room: int = 0) -> Result:
    """fn(*args), of which only arguments and results are kept for the backward pass, and what fn notes.

    args: any nesting of containers and tensors; parameters: tensors that fn uses besides; room: numbers it may note
    """
    leaves, structure = tree_flatten(args)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[place] for place in places]
    found: list[Any] = []

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        results, form = tree_flatten(fn(*tree_unflatten(filled, structure)))
        if not torch.is_grad_enabled():  # the first run; what the second one finds would keep its graph alive
            found[:] = [results, form]
        return [result for result in results if isinstance(result, Tensor)]

    outputs = iter(Recompute.apply(run, room, len(tensors), *tensors, *parameters))
    results, form = found
    found.clear()
    filled = [next(outputs) if isinstance(result, Tensor) else result for result in results]
    return tree_unflatten(filled, form)


class Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, room: int, num: int, *tensors: Tensor) -> Any:
        ctx.run, ctx.num, ctx.num_tensors = run, num, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.autocast = same_autocast(tensors[0])
        with taking(Notes(room)) as notes:
            results = run([tensor.detach() for tensor in tensors[:num]])
        ctx.save_for_backward(*tensors, *notes.made)
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        needed = ctx.needs_input_grad[3:]
        saved = ctx.saved_tensors
        tensors, known = list(saved[: ctx.num_tensors]), saved[ctx.num_tensors :]
        for place in range(ctx.num):
            tensors[place] = tensors[place].detach().requires_grad_(needed[place])
        with torch.enable_grad(), ctx.autocast(), taking(Notes(known=known)):
            results = ctx.run(tensors[: ctx.num])
        reached = [
            (result, g) for result, g in zip(results, gradients, strict=True) if result.requires_grad and g is not None
        ]
        if not reached:
            return (None,) * (len(needed) + 3)
        outputs, of_outputs = zip(*reached, strict=True)
        wanted = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
        found = iter(torch.autograd.grad(outputs, wanted, of_outputs, allow_unused=True))
        return None, None, None, *(next(found) if is_needed else None for is_needed in needed)
