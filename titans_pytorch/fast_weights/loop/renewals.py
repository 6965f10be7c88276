"""The loop over renewals as one differentiable operation.

What is sequential is in it, and what is read, for all blocks at once. Its backward pass is written out as well, so a
renewal is a few dozen operations on tensors that stay where they are. What is kept for it are the weights at the start
of every block, the momenta at the start of every renewal and a few numbers of every token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from titans_pytorch.fast_weights.loop.loop import Loop, run
from titans_pytorch.fast_weights.loop.parts import Inputs, Results, Shape
from titans_pytorch.fast_weights.precision import full_precision


class LoopOperation(torch.autograd.Function):
    """`run`, differentiable once."""

    @staticmethod
    def forward(ctx: Any, shape: Shape, structure: TreeSpec, forms: list[TreeSpec], *leaves: Any) -> Any:
        inputs, has_backward = tree_unflatten(list(leaves), structure), any(ctx.needs_input_grad)
        if has_backward:  # it needs what every block begins with
            shape = shape._replace(num_places=None)
        with full_precision(inputs.tokens.keys):
            results, kept = run(shape, inputs, has_backward)
        found, form = tree_flatten(results)
        forms.append(form)
        ctx.set_materialize_grads(False)
        if has_backward:
            # what a loop begins with lies in its first places as well
            saved, ctx.saved_form = tree_flatten((inputs._replace(states=[]), kept.for_backward(shape)))
            ctx.is_tensor = [isinstance(part, Tensor) for part in saved]
            ctx.save_for_backward(*(part for part in saved if isinstance(part, Tensor)))
            ctx.shape, ctx.form, ctx.structure = shape, form, structure
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a memory that runs in loops can be differentiated once, got create_graph=True; where "
                "titans_pytorch.memory.costs.COSTS has series_elements=0 it runs block by block and can be again"
            )
        tensors = iter(ctx.saved_tensors)
        saved = [next(tensors) if is_tensor else None for is_tensor in ctx.is_tensor]
        inputs, kept = tree_unflatten(saved, ctx.saved_form)
        with full_precision(inputs.tokens.keys):
            found = Loop(ctx.shape, inputs, kept).backward(tree_unflatten(list(bars), ctx.form))
        if inputs.base is None:
            found = found._replace(base=None)
        leaves = tree_flatten(found)[0]
        return None, None, None, *leaves


def renewals(shape: Shape, inputs: Inputs) -> Results:
    """All renewals of a loop; reading is left to others where nothing else is to be trained."""
    if inputs.queries is not None and inputs.queries.requires_grad and not needs_grad(inputs._replace(queries=None)):
        inputs = inputs._replace(queries=None)
    leaves, structure = tree_flatten(inputs)
    forms: list[TreeSpec] = []
    found = LoopOperation.apply(shape, structure, forms, *leaves)
    results: Results = tree_unflatten(list(found), forms[0])
    return results


def needs_grad(inputs: Inputs) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_flatten(inputs)[0])
