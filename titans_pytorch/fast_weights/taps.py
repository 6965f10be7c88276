"""Surprises without gradient matrices, of any memory model that uses its matrices as `x @ W`.

A chunk's gradient of a matrix is a sum of outer products of what exists anyway: the inputs X of that product when
the model runs on the keys, and the errors D at its outputs, u_j = -sum_{t in j} x_t^T d_t.  It is run once with every
product tapped; the gradient with respect to the taps is D, for all tokens and chunks at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans_pytorch.fast_weights.answering import Answer
from titans_pytorch.fast_weights.inner_gradient import Tap, gradients
from titans_pytorch.fast_weights.interface import Block, Entries, LossFn, Residual, Weights, Writes
from titans_pytorch.fast_weights.surprises import Factors, Surprises


class Use(NamedTuple):
    """One product with a matrix of the memory model, in the order in which the model makes them."""

    name: str
    is_transposed: bool


class TappedModel:
    """A memory model seen from its products.  Several threads may use it at once."""

    def __init__(self, model: nn.Module, uses: tuple[Use, ...], loss_fn: LossFn) -> None:
        self.model, self.uses, self.loss_fn = model, uses, loss_fn

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Asked for anew each time: moving a module may replace its parameters."""
        return dict(self.model.named_parameters())

    def gradients(self, base: Weights, writes: Writes, residual: Residual | None) -> tuple[Surprises, Tensor]:
        """Gradients of each chunk's weighted loss at the base, and the loss of every write (r n c).

        Where every parameter has rates of its own, the model must not mix writes: each has a gradient of its own, which
        the rates weigh afterwards.
        """

        # vectors exist once for each chunk and taps once for each token: every chunk gets a gradient of its own
        vectors = {name: base_vectors(base, writes, residual, name) for name, w in base.items() if w.ndim < 3}
        rates = writes.rates
        if not rates.is_shared:
            vectors = {name: v.expand(-1, -1, writes.keys.shape[2], -1) for name, v in vectors.items()}
        slow = {name: w[:, None, None] for name, w in writes.slow.items()}
        sizes = [base[use.name].shape[1 if use.is_transposed else 2] for use in self.uses]
        zeros = [writes.keys.new_zeros(()).expand(*writes.keys.shape[:-1], size) for size in sizes]

        def objective(values: list[Tensor], tap: Tap) -> tuple[Tensor, list[Tensor]]:
            inputs: list[Tensor] = []

            def tapped(name: str, x: Tensor, is_transposed: bool) -> Tensor:
                inputs.append(x)
                return tap(base_product(base, writes, residual, name, x, is_transposed))

            with Answer(self.parameters, tapped, dict(zip(vectors, values, strict=True)) | slow):
                prediction = self.model(writes.keys)
            loss = writes.held_to(self.loss_fn)(prediction, writes.values)
            return (loss * rates.any if rates.is_shared else loss).sum(), [*inputs, loss]

        of_vectors, errors, (*inputs, loss) = gradients(objective, list(vectors.values()), zeros)
        if not rates.is_shared:
            of_vectors = [(g * rates[name][..., None]).sum(dim=2) for name, g in zip(vectors, of_vectors, strict=True)]
            errors = [g * rates[use.name][..., None] for use, g in zip(self.uses, errors, strict=True)]
        tensors = {
            name: error.reshape(*error.shape[:2], *base[name].shape[1:])
            for name, error in zip(vectors, of_vectors, strict=True)
        }
        return Surprises(self.pair(base, inputs, errors), tensors), loss

    def pair(self, base: Weights, inputs: list[Tensor], errors: list[Tensor]) -> dict[str, Factors]:
        """Inputs and errors of each matrix; of one that is used several times, side by side."""
        found: dict[str, Factors] = {}
        for use, x, error in zip(self.uses, inputs, errors, strict=True):
            new = Factors(error, x) if use.is_transposed else Factors(x, error)
            old = found.get(use.name)
            found[use.name] = (
                new if old is None else Factors(*(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)))
            )
        return {name: found[name] for name, weight in base.items() if weight.ndim == 3 and name in found}

    def read(self, block: Block, queries: Tensor, entries: Entries, slow: Weights) -> Tensor:
        """Each group of queries through the model, with the weights of its entry of the block.

        queries: (r g k d), slow: (r d)
        """
        vectors = {
            name: slow[name][:, None, None] if name in slow else block.vector(name, entries)
            for name, p in self.parameters.items()
            if p.ndim < 2
        }

        def product(name: str, x: Tensor, is_transposed: bool) -> Tensor:
            return block.product(name, x, entries, is_transposed)

        with Answer(self.parameters, product, vectors):
            return self.model(queries)


def base_product(
    base: Weights, writes: Writes, residual: Residual | None, name: str, x: Tensor, is_transposed: bool
) -> Tensor:
    """x @ (base + mix_j * weights of the previous layer before chunk j).  x: (r n c i) -> (r n c j)"""
    weight = base[name].mT if is_transposed else base[name]
    out = (x.flatten(1, 2) @ weight).unflatten(1, x.shape[1:3])
    if residual is None or writes.mix is None:
        return out
    previous = residual.layer.product(name, x, residual.first_chunk, is_transposed)
    return out + writes.mix[..., None, None] * previous


def base_vectors(base: Weights, writes: Writes, residual: Residual | None, name: str) -> Tensor:
    """A base parameter with fewer than two axes, one copy for each chunk.  -> (r n 1 d)"""
    vectors = base[name].reshape(base[name].shape[0], 1, 1, -1).expand(-1, writes.keys.shape[1], -1, -1)
    if residual is None or writes.mix is None:
        return vectors
    previous = residual.layer.materialise(name, residual.first_chunk, writes.num_chunks)
    return vectors + writes.mix[..., None, None] * previous.reshape(*previous.shape[:2], 1, -1)
