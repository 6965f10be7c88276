"""Weights that are built, chunk by chunk, block by block: for what sums of factors cannot represent.

Rules that act on each step as a matrix need them, and memory models that do more with their weights than products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.blocks.factored import scaled_over_chunks, summed_over_chunks
from titans_pytorch.fast_weights.inner_gradient import written_gradients_work
from titans_pytorch.fast_weights.interface import Block, Carry, Entries, PerParameter, Weights, record
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.fast_weights.rules.omega import counted
from titans_pytorch.fast_weights.rules.rule import Memory, Rule
from titans_pytorch.fast_weights.surprises import Surprises


@record
class DenseBlock(Block):
    """Every entry of every parameter as a tensor, and the carry after the last."""

    weights: Weights  # (r n+1 ...)
    last: Carry

    @property
    def num_chunks(self) -> int:
        return next(iter(self.weights.values())).shape[1] - 1

    @property
    def names(self) -> Iterable[str]:
        return self.weights

    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        weight = self.weights[name].mT if is_transposed else self.weights[name]
        if isinstance(entries, slice) and self.num_chunks < 2 * x.shape[1]:
            # a product with all entries reads them where they are; one with some of them would copy those first
            around = (0, 0, 0, 0, entries.start, self.num_chunks + 1 - entries.stop)
            return (F.pad(x, around) @ weight)[:, entries]
        return x @ weight[:, entries]

    def materialise(self, name: str) -> Tensor:
        """-> (r n+1 ...)"""
        return self.weights[name]

    def finish(self) -> Carry:
        return self.last


class Evolved(NamedTuple):
    """One parameter over the chunks of a block."""

    weights: Tensor  # (r n+1 ...)  before each chunk and after the last
    momenta: tuple[Tensor, ...]  # (r ...) each, after the last


Evolve = Callable[[Rule, Memory, Tensor, Gates], Evolved]
"""(rule, memory before the block, surprises (r n ...), gates) -> the memory over its chunks"""


def build(rule: Rule, carry: Carry, surprises: Surprises, gates: PerParameter[Gates], evolve: Evolve) -> DenseBlock:
    """The weights of a block, parameter by parameter."""
    weights, last = {}, {}
    for name in carry.weights:
        memory = carry.memory(name, rule.num_momenta)
        steps = surprises.steps(name)
        if steps is None:  # the model never uses it: it is only forgotten
            rows, *shape = memory.weights.shape
            steps = memory.weights.new_zeros(()).expand(rows, gates[name].num_chunks + rule.window - 1, *shape)
        steps = steps.to(memory.weights.dtype)
        if rule.window > 1:
            steps = sums(counted(gates[name], rule.window), steps, [])
        evolved = evolve(rule, memory, steps, gates[name])
        weights[name] = evolved.weights
        last[name] = Memory(evolved.weights[:, -1].clone(), evolved.momenta)
    return DenseBlock(weights, carry.with_memories(last))


def chunk_by_chunk(rule: Rule, memory: Memory, surprise: Tensor, gates: Gates) -> Evolved:
    """Step after step, for rules that are not linear in surprises."""
    entries = [memory.weights]
    for chunk in range(gates.num_chunks):
        memory = rule.step(memory, surprise[:, chunk], gates.of_chunk(chunk))
        entries.append(memory.weights)
    return Evolved(torch.stack(entries, dim=1), memory.moved)


def by_products(rule: Rule, memory: Memory, surprise: Tensor, gates: Gates) -> Evolved:
    """A block has few chunks: sums over them with the rule's coefficients are faster than any loop or scan."""
    if not rule.is_linear:
        return chunk_by_chunk(rule, memory, surprise, gates)
    found = rule.coefficients(gates)
    momenta = memory.moved
    step = sums(found.step.surprise, surprise, list(zip(found.step.past, momenta, strict=False)))
    known = [step[:, -1].clone()] if found.adds_last_momentum else []
    if rule.transform is not None and step.ndim == 4:
        step = rule.transform(step)
    parts = [(found.keep[..., 0], memory.weights)]
    if found.start is not None and memory.start is not None:
        parts.append((found.start, memory.start))
    weights = sums(found.keep[..., 1:], step, parts)
    last = list(zip(found.last_past, found.last_surprise, strict=True))
    made = [
        sums(of.unsqueeze(-2), surprise, [(p.unsqueeze(-1), m) for p, m in zip(past, momenta, strict=False)]).squeeze(1)
        for past, of in last[: len(last) - len(known)]
    ]
    return Evolved(weights, (*made, *known))


def sums(share: Tensor, steps: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """sum_n share_n step_n, and shares of other tensors, for each of m entries.

    share: (r m n), or of channels (r j m n); steps: (r n ...); parts: (r m) and (r ...) each -> (r m ...)
    """
    if share.ndim == 4:
        return sum((scaled_over_chunks(*part) for part in parts), summed_over_chunks(share, steps))
    shape = steps.shape[2:]
    out = share @ (steps.flatten(2) if shape else steps[..., None])
    if parts:
        shares, tensors = zip(*parts, strict=True)
        flat = together([tensor.reshape(len(tensor), -1) for tensor in tensors], dim=1)
        add = out.baddbmm_ if written_gradients_work() else partial(torch.baddbmm, out)  # no transform knows the former
        out = add(together(shares, dim=-1), flat)
    return out.unflatten(2, shape) if shape else out.squeeze(2)


def together(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """As `torch.stack`; a single one is not copied."""
    return tensors[0].unsqueeze(dim) if len(tensors) == 1 else torch.stack(list(tensors), dim)
