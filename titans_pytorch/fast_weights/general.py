"""Weights that are built, chunk by chunk, block by block: for what the factored engine cannot represent.

`DenseBlock` holds every chunk's weights as tensors, which is what spectral normalisation needs (it acts on each step as
a matrix) and what any use of the weights can be made from. `OpaqueModel` runs memory models that do something with
their weights beyond products, one chunk at a time under `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from assoc_scan import AssocScan
from torch import Tensor, nn
from torch.func import vmap

from titans_pytorch.fast_weights.answering import Substitute
from titans_pytorch.fast_weights.inner_gradient import Tap, gradients
from titans_pytorch.fast_weights.interface import Block, Carry, LossFn, Residual, Rows, Weights, Writes
from titans_pytorch.fast_weights.rules.orthogonal import orthogonalised
from titans_pytorch.fast_weights.rules.recurrence import Gates, momenta, poison_after, products, steps
from titans_pytorch.fast_weights.taps import Surprises

Scan = Callable[[Tensor, Tensor, Tensor], Tensor]
"""gates (r n), inputs (r n ...), start (r ...) -> x_j = gate_j x_{j-1} + input_j (r n ...)"""


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
        names, num_chunks = list(base), writes.num_chunks

        def objective(weights: list[Tensor], _: Tap) -> tuple[Tensor, list[Tensor]]:
            prediction = self.call_each(dict(zip(names, weights, strict=True)), writes.keys, writes.slow)
            loss = self.loss_fn(prediction, writes.values)
            return (loss * writes.rates[0]).sum(), [loss]

        # one copy of the weights for each chunk gives each chunk a gradient of its own
        copies = [weight.unsqueeze(1).expand(-1, num_chunks, *weight.shape[1:]) for weight in base.values()]
        if residual is not None and writes.mix is not None:
            copies = [mixed(name, base[name], writes.mix, residual) for name in names]
        found, _, (loss,) = gradients(objective, copies, [])
        return Surprises({}, dict(zip(names, found, strict=True))), loss

    def read(self, block: Block, queries: Tensor, rows: Rows, slow: Weights) -> Tensor:
        """Each group of queries through the model, with the weights of its row of the block.

        queries: (r g k d), slow: (r d)
        """
        weights = {name: block.materialise(name) for name in self.parameters if name not in slow}
        if block.num_chunks == 0:
            weights = {name: w.expand(-1, queries.shape[1], *w.shape[2:]) for name, w in weights.items()}
        else:
            weights = {name: w[:, rows] for name, w in weights.items()}
        return self.call_each(weights, queries, slow)


def mixed(name: str, weight: Tensor, mix: Tensor, residual: Residual) -> Tensor:
    """base + mix_j * weights of the previous layer before chunk j.  weight: (r ...), mix: (r n) -> (r n ...)"""
    previous = residual.layer.materialise(name, residual.first_chunk, mix.shape[1])
    return weight.unsqueeze(1) + mix.reshape(*mix.shape, *[1] * (weight.ndim - 1)) * previous


class DenseBlock(NamedTuple):
    base: Weights
    weights: Weights  # (r n+1 ...)
    last_momenta: dict[str, tuple[Tensor, ...]]

    @property
    def num_chunks(self) -> int:
        return next(iter(self.weights.values())).shape[1] - 1

    def product(self, name: str, x: Tensor, rows: Rows, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        weight = self.weights[name].mT if is_transposed else self.weights[name]
        if isinstance(rows, slice) and self.num_chunks < 2 * x.shape[1]:
            # a product with all entries reads them where they are; one with some of them would copy those first
            around = (0, 0, 0, 0, rows.start, self.num_chunks + 1 - rows.stop)
            return (torch.nn.functional.pad(x, around) @ weight)[:, rows]
        return x @ weight[:, rows]

    def vector(self, name: str, rows: Rows) -> Tensor:
        """-> (r g 1 d)"""
        values = self.weights[name][:, rows]
        return values.reshape(*values.shape[:2], 1, -1)

    def materialise(self, name: str) -> Tensor:
        return self.weights[name]

    def entry(self, row: int) -> Weights:
        return {name: weight[:, row] for name, weight in self.weights.items()}

    def finish(self) -> Carry:
        return Carry(
            self.base, {name: weight[:, -1].clone() for name, weight in self.weights.items()}, self.last_momenta
        )


class StillBlock(NamedTuple):
    """No chunk at all: the weights that were carried, for every group that reads them."""

    start: Carry

    @property
    def num_chunks(self) -> int:
        return 0

    def product(self, name: str, x: Tensor, rows: Rows, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        weight = self.start.weights[name]
        return (x.flatten(1, 2) @ (weight.mT if is_transposed else weight)).unflatten(1, x.shape[1:3])

    def vector(self, name: str, rows: Rows) -> Tensor:
        """-> (r 1 1 d)"""
        return self.start.weights[name].reshape(len(self.start.weights[name]), 1, 1, -1)

    def materialise(self, name: str) -> Tensor:
        return self.start.weights[name].unsqueeze(1)

    def entry(self, row: int) -> Weights:
        return self.start.weights

    def finish(self) -> Carry:
        return self.start


def build(
    carry: Carry, surprises: Surprises, gates: dict[str, Gates], is_spectral: bool, use_accelerated_scan: bool
) -> DenseBlock:
    """Integrate a block's surprises into the weights after each of its chunks."""
    tensors = {name: factors.matrices() for name, factors in surprises.factors.items()} | surprises.tensors
    integrate = integrate_by_scan if use_accelerated_scan else integrate_by_products
    weights, last_momenta = {}, {}
    for name, start in carry.weights.items():
        surprise, poison = tensors.get(name), poison_after(gates[name])
        if surprise is None:  # the model never uses it: it is only forgotten
            surprise = start.new_zeros(()).expand(start.shape[0], poison.shape[-1] - 1, *start.shape[1:])
        transform = orthogonalised if is_spectral and start.ndim == 3 else None
        built, last = integrate(gates[name], surprise, start, carry.momenta.get(name, ()), transform)
        weights[name] = built + poison.reshape(*poison.shape, *[1] * (start.ndim - 1))
        if last:
            last_momenta[name] = last
    return DenseBlock(carry.base, weights, last_momenta)


Transform = Callable[[Tensor], Tensor]


def integrate_by_products(
    gates: Gates, surprise: Tensor, start: Tensor, past: tuple[Tensor, ...], transform: Transform | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A block has few chunks: sums over them with the products of gates are faster than any scan.

    surprise: (r n ...), start: (r ...), past: (r ...) of every order -> weights (r n+1 ...), last momenta (r ...)
    """
    shape = surprise.shape[2:]
    surprise, start = surprise.flatten(2) if shape else surprise[..., None], start.reshape(start.shape[0], 1, -1)
    before = torch.stack([m.reshape(len(m), -1) for m in past], dim=1) if past else None  # (r o ...)
    orders = momenta(gates)
    step = steps(gates, orders)

    def sums(of_past: Tensor, of_surprise: Tensor) -> Tensor:
        out = of_surprise @ surprise
        return out if before is None else torch.baddbmm(out, of_past.permute(1, 2, 0), before)

    taken = sums(*step)
    if transform is not None:
        taken = transform(taken.unflatten(2, shape)).flatten(2)
    keep = products(gates.log_keep)
    if gates.log_keep.ndim == 3:
        weights = forget_channels(
            keep, taken.unflatten(2, (-1, keep.shape[1])), start.unflatten(2, (-1, keep.shape[1]))
        )
    else:
        weights = torch.baddbmm(keep[..., 1:] @ taken, keep[..., :1], start)
    ends = [sums(order.past[..., -1:], order.surprise[..., -1:, :]) for order in orders[1:]]
    last = tuple(end.reshape(len(end), *shape) for end in ends)
    return weights.unflatten(2, shape) if shape else weights.squeeze(2), last


def forget_channels(keep: Tensor, taken: Tensor, start: Tensor) -> Tensor:
    """Every channel has a gate.  keep: (r j n+1 n+1), taken: (r n i j), start: (r 1 i j) -> weights (r n+1 i·j)"""
    steps = torch.cat((start, taken), dim=1)
    return (keep @ steps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(2)


def integrate_by_scan(
    gates: Gates, surprise: Tensor, start: Tensor, past: tuple[Tensor, ...], transform: Transform | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same with the associative scan of the accelerated CUDA kernel."""
    scan = AssocScan(use_accelerated=True)
    wide = [1] * (surprise.ndim - 2)
    stored = None if gates.is_stored is None else gates.is_stored.reshape(*gates.is_stored.shape, *wide)
    orders, last = [surprise], []
    for order, log_gate in enumerate([] if gates.log_momentum is None else gates.log_momentum):
        handed = orders[-1] if stored is None else orders[-1] * stored
        orders.append(scan(log_gate.exp().reshape(*log_gate.shape, *wide), handed, prev=past[order]))
        last.append(orders[-1][:, -1])
    step = orders[-1]
    if gates.combine is not None:
        mixed = orders[len(orders) - gates.combine.shape[0] :]
        step = sum(part.reshape(*part.shape, *wide) * order for part, order in zip(gates.combine, mixed, strict=True))
    if stored is not None:
        step = step * stored
    step = step if transform is None else transform(step)
    keep = gates.log_keep.exp()
    if keep.ndim == 3:  # (r j n): every channel has a gate
        keep = keep.mT.reshape(*step.shape[:2], *wide[1:], *step.shape[2:][-1:]).expand_as(step)
    else:
        keep = keep.reshape(*keep.shape, *wide)
    weights = scan(keep, step, prev=start)
    return torch.cat((start.unsqueeze(1), weights), dim=1), tuple(last)
