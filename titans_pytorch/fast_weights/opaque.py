"""Memory models of which nothing is known but their forward: one chunk at a time, under `vmap`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import vmap

from titans_pytorch.fast_weights.answering import Substitute
from titans_pytorch.fast_weights.inner_gradient import Tap, gradients
from titans_pytorch.fast_weights.interface import Block, Entries, LossFn, Residual, Weights, Writes
from titans_pytorch.fast_weights.surprises import Surprises


class OpaqueModel:
    """A memory model of which nothing is known but its forward."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self.model, self.loss_fn = model, loss_fn

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Asked for anew each time: moving a module may replace its parameters."""
        return dict(self.model.named_parameters())

    def call(self, weights: Weights, x: Tensor, slow: Weights) -> Tensor:
        with Substitute(self.parameters, weights | slow):
            return self.model(x)

    def call_each(self, weights: Weights, x: Tensor, slow: Weights) -> Tensor:
        """weights: (r n ...), x: (r n c d), slow: (r d) -> (r n c d)"""
        return vmap(vmap(self.call, in_dims=(0, 0, None)))(weights, x, slow)

    def gradients(self, base: Weights, writes: Writes, residual: Residual | None) -> tuple[Surprises, Tensor]:
        """Gradient tensors of each chunk's weighted loss at the base, and the loss of every write (r n c)."""
        names, num_chunks = list(base), writes.keys.shape[1]

        def objective(weights: list[Tensor], _: Tap) -> tuple[Tensor, list[Tensor]]:
            prediction = self.call_each(dict(zip(names, weights, strict=True)), writes.keys, writes.slow)
            loss = writes.held_to(self.loss_fn)(prediction, writes.values)
            return (loss * writes.rates.any).sum(), [loss]

        # one copy of the weights for each chunk gives each chunk a gradient of its own
        copies = [weight.unsqueeze(1).expand(-1, num_chunks, *weight.shape[1:]) for weight in base.values()]
        if residual is not None and writes.mix is not None:
            copies = [with_previous(name, base[name], writes.mix, residual) for name in names]
        found, _, (loss,) = gradients(objective, copies, [])
        return Surprises({}, dict(zip(names, found, strict=True))), loss

    def read(self, block: Block, queries: Tensor, entries: Entries, slow: Weights) -> Tensor:
        """Each group of queries through the model, with the weights of its entry of the block.

        queries: (r g k d), slow: (r d)
        """
        weights = {name: block.materialise(name) for name in self.parameters if name not in slow}
        if block.num_chunks == 0:
            weights = {name: w.expand(-1, queries.shape[1], *w.shape[2:]) for name, w in weights.items()}
        else:
            weights = {name: w[:, entries] for name, w in weights.items()}
        return self.call_each(weights, queries, slow)


def with_previous(name: str, weight: Tensor, mix: Tensor, residual: Residual) -> Tensor:
    """base + mix_j * weights of the previous layer before chunk j.  weight: (r ...), mix: (r n) -> (r n ...)"""
    previous = residual.layer.materialise(name, residual.first_chunk, mix.shape[1])
    return weight.unsqueeze(1) + mix.reshape(*mix.shape, *[1] * (weight.ndim - 1)) * previous
