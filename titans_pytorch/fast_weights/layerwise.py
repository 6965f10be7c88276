"""Surprises of a memory whose layers are taught one by one: every matrix is held to the value itself.

For M(k) = act(k W_1) W_2, or any number of layers, with the keys of a layer made by the one before it,

    x_1 = k,   E_l = dloss(x_l W_l, v),   x_{l+1} = act(x_l W_l)         a chunk's surprise of W_l: sum_t x_l^T E_l

so no error passes from layer to layer, and each is linear in its own matrix: where it is surprised at every token, its
renewals are solved for (`solved.blocks`), layer by layer. Without momentum and forgetting this is DeltaTTT
(arXiv 2610.08553). Gradients outside of the memory pass through keys of later layers as through anything else.
"""

from __future__ import annotations

from torch import Tensor, nn

from titans_pytorch.fast_weights.closed_form import ClosedMLP
from titans_pytorch.fast_weights.interface import Block, Entries, LossFn, Residual, Weights, Writes
from titans_pytorch.fast_weights.surprises import Factors, Surprises
from titans_pytorch.fast_weights.taps import base_product
from titans_pytorch.losses import gradient_of, known_gradient_of
from titans_pytorch.memory_models import hidden_keys


def check_layerwise(loss_fn: LossFn) -> None:
    """A loss whose gradient is known, as no other way of taking it knows of layers."""
    if gradient_of(loss_fn) is None:
        raise ValueError(f"a layerwise memory needs a loss of the library by name, got {loss_fn!r}")


class LayerwiseMLP(ClosedMLP):
    """A `LayerwiseMemory` with what it is surprised at.  Several threads may use it at once."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        check_layerwise(loss_fn)
        super().__init__(model, loss_fn)

    def gradients(self, base: Weights, writes: Writes, residual: Residual | None) -> tuple[Surprises, Tensor]:
        """Gradients of each layer's own loss in every chunk, and the last layer's loss of every write (r n c)."""
        keys, values, loss_fn = writes.keys, writes.values, writes.held_to(self.loss_fn)
        error = known_gradient_of(loss_fn)
        factors: dict[str, Factors] = {}
        for name in self.matrices:
            answers = base_product(base, writes, residual, name, keys, False).to(keys.dtype)
            factors[name] = Factors(keys, error(answers, values) * writes.rates[name][..., None])
            if name != self.matrices[-1]:
                keys = hidden_keys(answers)
        return Surprises(factors, {}), loss_fn(answers, values)

    def read(self, block: Block, queries: Tensor, entries: Entries, slow: Weights) -> Tensor:
        """Each group of queries through the model, with the weights of its entry of the block.  (r g k d)"""
        x = queries
        for layer, name in enumerate(self.matrices):
            x = block.product(name, hidden_keys(x) if layer else x, entries)
        return x
