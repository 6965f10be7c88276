"""Weights that are built, chunk by chunk, block by block: for what sums of factors cannot represent.

Rules that act on each step as a matrix need them, and memory models that do more with their weights than products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.blocks.sums import Steps, built, sums, sums_and_last
from titans_pytorch.fast_weights.interface import Block, Carry, Entries, PerParameter, Weights, record
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.fast_weights.rules.omega import counted
from titans_pytorch.fast_weights.rules.rule import Coefficients, Memory, Rule
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
    last: Tensor  # (r ...)  after the last, which holds on to nothing else
    momenta: tuple[Tensor, ...]  # (r ...) each, after the last


Evolve = Callable[[Rule, Memory, Tensor, Gates], Evolved]
"""(rule, memory before the block, surprises (r n ...), gates) -> the memory over its chunks"""


def build(
    rule: Rule,
    carry: Carry,
    surprises: Surprises,
    gates: PerParameter[Gates],
    evolve: Evolve,
    coefficients: PerParameter[Coefficients] | None = None,
) -> DenseBlock:
    """The weights of a block, parameter by parameter.

    coefficients: the rule's, if they are known; then nothing else evolves the weights
    """
    weights, last = {}, {}
    for name in carry.weights:
        memory = carry.memory(name, rule.num_momenta)
        steps = steps_of(rule, memory, surprises, gates[name], name)
        if coefficients is None:
            evolved = evolve(rule, memory, built(steps, memory.weights.dtype), gates[name])
        else:
            evolved = by_coefficients(rule, memory, steps, coefficients[name])
        weights[name] = evolved.weights
        last[name] = Memory(evolved.last, evolved.momenta)
    return DenseBlock(weights, carry.with_memories(last))


def steps_of(rule: Rule, memory: Memory, surprises: Surprises, gates: Gates, name: str) -> Steps:
    """What a parameter is surprised by at every chunk, windows counted.  -> (r n ...), or factors"""
    steps = surprises.factors.get(name, surprises.tensors.get(name))
    if steps is None:  # the model never uses it: it is only forgotten
        rows, *shape = memory.weights.shape
        steps = memory.weights.new_zeros(()).expand(rows, gates.num_chunks + rule.window - 1, *shape)
    return sums(counted(gates, rule.window), steps) if rule.window > 1 else steps


def chunk_by_chunk(rule: Rule, memory: Memory, surprise: Tensor, gates: Gates) -> Evolved:
    """Step after step, for rules that are not linear in surprises."""
    entries = [memory.weights]
    for chunk in range(gates.num_chunks):
        memory = rule.step(memory, surprise[:, chunk], gates.of_chunk(chunk))
        entries.append(memory.weights)
    return Evolved(torch.stack(entries, dim=1), memory.weights, memory.moved)


def by_products(rule: Rule, memory: Memory, surprise: Tensor, gates: Gates) -> Evolved:
    """A block has few chunks: sums over them with the rule's coefficients are faster than any loop or scan."""
    if not rule.is_linear:
        return chunk_by_chunk(rule, memory, surprise, gates)
    return by_coefficients(rule, memory, surprise, rule.coefficients(gates))


def by_coefficients(rule: Rule, memory: Memory, surprise: Steps, found: Coefficients) -> Evolved:
    """The sums, whose shares are known.  surprise: (r n ...), or its factors"""
    momenta = memory.moved
    past = list(zip(found.step.past, momenta, strict=False))
    ends = list(zip(found.last_past, found.last_surprise, strict=True))
    known: list[Tensor] = []
    if len(ends) > 1 or not found.adds_last_momentum:  # built once for all who sum them
        surprise = built(surprise, memory.weights.dtype)
    if found.adds_last_momentum:
        step, last_momentum = sums_and_last(found.step.surprise, surprise, past)
        known, ends = [last_momentum], ends[:-1]
    else:
        step = sums(found.step.surprise, surprise, past)
    made = [
        sums(of.unsqueeze(-2), surprise, list(zip(shares.unsqueeze(-1), momenta, strict=False))) for shares, of in ends
    ]
    if rule.transform is not None and step.ndim == 4:
        step = rule.transform(step)
    parts = [(found.keep[..., 0], memory.weights)]
    if found.start is not None and memory.start is not None:
        parts.append((found.start, memory.start))
    weights, last = sums_and_last(found.keep[..., 1:], step, parts)
    return Evolved(weights, last, (*(each.squeeze(1) for each in made), *known))
