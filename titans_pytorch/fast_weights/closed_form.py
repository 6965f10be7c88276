"""Surprises of an MLP memory in closed form: the chain rule written out, without a graph inside the graph.

For M(k) = k + g norm(gelu(k W_1) W_2), or any number of layers, with or without the norm around them, the errors are

    E = dloss / dM(k),   D_last = norm'(g E),   D_{l-1} = (D_l W_l^T) gelu'(z_{l-1}),   dg = sum_t E_t norm_t

and a chunk's surprise of W_l is made of that layer's inputs and D_l. All of these can be differentiated once more,
whatever surrounds them, and they are fewer than what autograd makes of the model's own forward (`taps`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.fast_weights.interface import Block, Entries, LossFn, Residual, Weights, Writes
from titans_pytorch.fast_weights.norms import norm, norm_gradient
from titans_pytorch.fast_weights.surprises import Factors, Surprises
from titans_pytorch.fast_weights.taps import base_product, base_vectors
from titans_pytorch.losses import gradient_of, is_quadratic, known_gradient_of, mean_squared_error
from titans_pytorch.memory_models import NORM_GAIN, MemoryMLP, ResidualNorm


def has_closed_form(model: nn.Module, loss_fn: LossFn) -> bool:
    """Whether this file knows a memory model, every layer of which has a matrix of its own, and its loss."""
    inner = model.model if type(model) is ResidualNorm else model
    is_plain = type(inner) is MemoryMLP and len(list(inner.parameters())) == len(inner.weights)
    return is_plain and gradient_of(loss_fn) is not None


class ClosedMLP:
    """An MLP memory with a known gradient, with or without residual and norm.  Several threads may use it at once."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self.has_norm, self.loss_fn = isinstance(model, ResidualNorm), loss_fn
        self.matrices = [name for name, _ in model.named_parameters() if name != NORM_GAIN]

    def gradients(self, base: Weights, writes: Writes, residual: Residual | None) -> tuple[Surprises, Tensor]:
        """Gradients of each chunk's weighted loss at the base, and the loss of every write (r n c)."""
        keys, rates = writes.keys, writes.rates

        def product(name: str, x: Tensor, is_transposed: bool = False) -> Tensor:
            return base_product(base, writes, residual, name, x, is_transposed)

        inputs, before = [keys], []  # of every matrix, and what every gelu is given
        for name in self.matrices[:-1]:
            before.append(product(name, inputs[-1]))
            inputs.append(F.gelu(before[-1]))
        out = product(self.matrices[-1], inputs[-1]).to(keys.dtype)
        gain = self.gain(writes.slow, lambda: base_vectors(base, writes, residual, NORM_GAIN))
        normed, *moments = (out,) if gain is None else norm(out)
        prediction = out if gain is None else normed * gain + keys
        loss, error = self.loss_and_error(prediction, writes.values, writes.held_to(self.loss_fn))
        error = error * rates.any[..., None] if rates.is_shared else error

        tensors = {}
        if gain is not None:
            if NORM_GAIN in base:
                of_gain = error * normed if rates.is_shared else error * normed * rates[NORM_GAIN][..., None]
                tensors[NORM_GAIN] = of_gain.sum(dim=2)
            mean, scale = moments
            error = norm_gradient(error * gain, out, mean, scale)
        factors = {}
        for layer in reversed(range(len(self.matrices))):
            name = self.matrices[layer]
            own = error if rates.is_shared else error * rates[name][..., None]
            factors[name] = Factors(inputs[layer], own)
            if layer > 0:
                error = torch.ops.aten.gelu_backward(product(name, error, True), before[layer - 1])
        return Surprises({name: factors[name] for name in base if name in factors}, tensors), loss

    def read(self, block: Block, queries: Tensor, entries: Entries, slow: Weights) -> Tensor:
        """Each group of queries through the model, with the weights of its entry of the block.

        queries: (r g k d), slow: (r d)
        """
        inner, x, of_inner, back = block.unrolled(queries, entries)
        for layer, name in enumerate(self.matrices):
            x = inner.product(name, F.gelu(x) if layer > 0 else x, of_inner)
        x = back(x)
        gain = self.gain(slow, lambda: block.vector(NORM_GAIN, entries))
        return x if gain is None else norm(x)[0] * gain + queries

    def gain(self, slow: Weights, fast: Callable[[], Tensor]) -> Tensor | None:
        """The norm's gain, learned outside or part of the memory, for (r n c d); None without a norm."""
        if not self.has_norm:
            return None
        return (slow[NORM_GAIN][:, None, None] if NORM_GAIN in slow else fast()) + 1

    def loss_and_error(self, prediction: Tensor, values: Tensor, loss_fn: LossFn) -> tuple[Tensor, Tensor]:
        """The loss of every write (r n c), and its gradient with respect to the prediction (r n c d)."""
        if not is_quadratic(loss_fn):
            return loss_fn(prediction, values), known_gradient_of(loss_fn)(prediction, values)
        difference = prediction - values  # which both are made of
        return self.loss_of(difference), difference * self.slope(difference.shape[-1])

    def loss_of(self, difference: Tensor) -> Tensor:
        """What a difference costs, by a sum or mean of squares.  (... d) -> (...)"""
        square = difference.square()
        return square.mean(dim=-1) if self.loss_fn is mean_squared_error else square.sum(dim=-1)

    def slope(self, width: int) -> float:
        """What the gradient of the loss is, per difference, where that is all it depends on."""
        return 2 / width if self.loss_fn is mean_squared_error else 2.0
