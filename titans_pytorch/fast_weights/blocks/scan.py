"""The weights of a block by a parallel scan over its chunks, with the accelerated CUDA kernel.

A rule's equations are used as they are, on all chunks at once: where they say `gate * old + new`, with what was there
before the block as the old and one tensor for each chunk as the new, a scan takes its place.
"""

from __future__ import annotations

from typing import Any

import torch
from assoc_scan import AssocScan
from torch import Tensor

from titans_pytorch.fast_weights.blocks.dense import Evolved
from titans_pytorch.fast_weights.rules.gates import ChunkGates, Gates
from titans_pytorch.fast_weights.rules.rule import Memory, Rule
from titans_pytorch.fast_weights.scale import ZERO, Scale, Sum, Zero, summed


class Old(Sum):
    """A gate of each chunk times what was before it, and what chunks add: x_j = gate_j x_{j-1} + new_j."""

    def __init__(self, gate: Factor, before: Tensor | Zero, new: Tensor | None = None) -> None:
        self.gate, self.before, self.new = gate, before, new

    def plus(self, term: Tensor | Sum) -> Old:
        new = summed(term)
        return Old(self.gate, self.before, new if self.new is None else self.new + new)

    def tensor(self) -> Tensor:
        """Without what comes in chunks that store nothing.  -> (r n ...)"""
        gate, new, before = self.gate, self.new, None if isinstance(self.before, Zero) else self.before
        if new is None:
            raise ValueError("a rule must add something to what is old, got a gate times that alone")
        new = new if gate.is_stored is None else new * over(gate.is_stored.to(new.dtype), new)
        return gate.scan(over(gate.value, new), new, prev=before)


class Factor(Scale):
    """A gate of every chunk that multiplies what is old.  (r n), of channels (r j n)"""

    def __init__(self, value: Tensor, is_stored: Tensor | None, scan: AssocScan) -> None:
        super().__init__(value)
        self.is_stored, self.scan = is_stored, scan

    def __mul__(self, old: Any) -> Any:
        return Old(self, old)

    def __rsub__(self, one: float) -> Share:
        return Share(one - self.value)


class Share(Scale):
    """A gate of every chunk that multiplies what that chunk brings, or what is the same for all.  (r n), (r j n)"""

    def __mul__(self, new: Any) -> Any:
        return new if isinstance(new, Zero) else over(self.value, summed(new)) * summed(new)


def over(gates: Tensor, x: Tensor) -> Tensor:
    """Gates of chunks, shaped as tensors of chunks.  gates: (r n) or (r j n), x: (r n ... j) -> (r n ... j)"""
    if gates.ndim == 2:
        return gates.reshape(*gates.shape, *[1] * (x.ndim - 2)).expand(*gates.shape, *x.shape[2:])
    shape = (gates.shape[0], gates.shape[2], *[1] * (x.ndim - 3), *x.shape[2:][-1:])
    return gates.mT.reshape(shape).expand(*shape[:2], *x.shape[2:])


def by_scan(rule: Rule, memory: Memory, surprise: Tensor, gates: Gates, use_accelerated: bool = True) -> Evolved:
    """One parameter over the chunks of a block.  surprise: (r n ...)"""
    scan = AssocScan(use_accelerated=use_accelerated)
    values: dict[str, list[Scale]] = {
        name: [Factor(log.exp(), gates.is_stored, scan) for log in logs] for name, logs in gates.factors.items()
    }
    values |= {name: [Share(share) for share in shares] for name, shares in gates.shares.items()}
    of_all = ChunkGates(values, None)
    start = ZERO if memory.start is None else memory.start.unsqueeze(1)
    added, momenta = rule.move(memory.momenta, surprise, of_all)
    step = summed(added)
    if rule.transform is not None and step.ndim == 4:
        step = rule.transform(step)
    weights = summed(rule.retain(memory.weights, step, of_all, start))
    entries = torch.cat((memory.weights.unsqueeze(1), weights), dim=1)
    return Evolved(entries, entries[:, -1].clone(), tuple(summed(momentum)[:, -1] for momentum in momenta))
