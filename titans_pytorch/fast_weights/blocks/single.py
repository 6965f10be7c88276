"""A block of one chunk: the rule as it is written, each step built once.

Where a chunk has many tokens, building its matrix costs less than reading and carrying the momentum through products.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from titans_pytorch.fast_weights.blocks.still import StillBlock
from titans_pytorch.fast_weights.interface import Block, Carry, Entries, PerParameter, Weights, record
from titans_pytorch.fast_weights.rules.gates import ChunkGates, Gates
from titans_pytorch.fast_weights.rules.rule import Memory, Rule
from titans_pytorch.fast_weights.surprises import Surprises


@record
class SingleBlock(Block):
    """All that is read inside a block of one chunk is what it began with."""

    start: Carry
    surprises: Surprises
    gates: PerParameter[Gates]  # (r 1)
    rule: Rule

    @property
    def num_chunks(self) -> int:
        return 1

    @property
    def names(self) -> Iterable[str]:
        return self.start.weights

    def product(self, name: str, x: Tensor, entries: Entries, is_transposed: bool = False) -> Tensor:
        """x: (r g k i) -> (r g k j)"""
        return StillBlock(self.start).product(name, x, entries, is_transposed)

    def vector(self, name: str, entries: Entries) -> Tensor:
        """-> (r 1 1 d)"""
        return StillBlock(self.start).vector(name, entries)

    def materialise(self, name: str) -> Tensor:
        """-> (r 2 ...)"""
        return torch.stack((self.start.weights[name], self.end(name, self.gates[name].of_chunk(0)).weights), dim=1)

    def entry(self, index: int) -> Weights:
        return self.start.weights if index == 0 else self.finish().weights

    def finish(self) -> Carry:
        gates = self.gates.map(lambda gates: gates.of_chunk(0))
        return self.start.with_memories({name: self.end(name, gates[name]) for name in self.names})

    def end(self, name: str, gates: ChunkGates) -> Memory:
        """One parameter after the chunk."""
        weights, steps = self.start.weights[name], self.surprises.steps(name)
        surprise = torch.zeros_like(weights) if steps is None else steps.squeeze(1).to(weights.dtype)
        return self.rule.step(self.start.memory(name, self.rule.num_momenta), surprise, gates)
