"""Blocks that do not wait for each other: where all of them are surprised at one base, their starts are one solution.

What a block begins with is what the one before it began with, times shares, and what its chunks have brought,

    x_{t+1} = mix_t x_t + new_t           x: weights and momenta, mix: shares that depend on the gates alone

So all starts x solve (1 - L) x = (x_0, new_0, new_1, ...), where L has mix_t below the diagonal: one triangular system
for all elements of a parameter. The number of operations does not depend on how many blocks there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_pytorch.fast_weights.blocks.factored import FactoredBlock
from titans_pytorch.fast_weights.blocks.series import FoldedBlock
from titans_pytorch.fast_weights.interface import Carry, PerParameter
from titans_pytorch.fast_weights.loop.tables import mix_of
from titans_pytorch.fast_weights.rules.rule import Memory, Shares
from titans_pytorch.fast_weights.surprises import Factors, Surprises


def blocks_at_once(
    carry: Carry, surprises: Surprises, shares: PerParameter[Shares], num_blocks: int, num_momenta: int
) -> FoldedBlock:
    """surprises: of all chunks (r n ...); shares: of the blocks, with T·r rows"""
    folded = in_blocks(surprises, num_blocks)
    from_nothing = FactoredBlock(Carry({}, dict(carry.weights), {}, {}), folded, shares)
    systems = shares.map(lambda found: system_of(mix_of(found, num_blocks)))
    starts: dict[str, tuple[Tensor, ...]] = {}
    last: dict[str, Memory] = {}
    for name, weight in carry.weights.items():
        before = (weight, *carry.momenta.get(name, (torch.zeros_like(weight),) * num_momenta))
        brought = from_nothing.with_surprises(name, [None] * len(before))  # (T·r ...) each
        states = solved(systems[name], before, brought)  # (T+1 a r ...)
        starts[name] = states[:-1].movedim(1, 0).flatten(1, 2).unbind(0)  # (T·r ...) each
        end, *moved = states[-1].unbind(0)
        last[name] = Memory(end, tuple(moved))
    momenta = {name: slots[1:] for name, slots in starts.items() if len(slots) > 1}
    begins = Carry({}, {name: slots[0] for name, slots in starts.items()}, momenta, {})
    return FoldedBlock(FactoredBlock(begins, folded, shares), carry.with_memories(last), num_blocks)


def in_blocks(surprises: Surprises, num_blocks: int) -> Surprises:
    """(r T·b ...) -> (T·r b ...)"""

    def fold(x: Tensor) -> Tensor:
        return x.unflatten(1, (num_blocks, -1)).movedim(1, 0).flatten(0, 1)

    factors = {name: Factors(fold(left), fold(right)) for name, (left, right) in surprises.factors.items()}
    return Surprises(factors, {name: fold(tensor) for name, tensor in surprises.tensors.items()})


def system_of(mix: Tensor) -> Tensor:
    """1 - L.  mix: (T r a a) -> (r T+1·a T+1·a)"""
    below = torch.diag_embed(mix.permute(1, 2, 3, 0), offset=-1, dim1=1, dim2=3)  # (r T+1 a T+1 a)
    size = below.shape[1] * below.shape[2]
    return torch.eye(size, dtype=mix.dtype, device=mix.device) - below.reshape(-1, size, size)


def solved(system: Tensor, first: Sequence[Tensor], brought: Sequence[Tensor]) -> Tensor:
    """The starts of all blocks and the end of the last, slot by slot.

    system: (r T+1·a T+1·a), first: (r ...) each, brought: (T·r ...) each -> (T+1 a r ...)
    """
    rows, *shape = first[0].shape
    slots = [torch.cat((x.unsqueeze(0), new.unflatten(0, (-1, rows)))) for x, new in zip(first, brought, strict=True)]
    known = torch.stack(slots, dim=2).flatten(3).movedim(1, 0).flatten(1, 2)  # (r T+1·a p)
    found = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    return found.unflatten(2, shape).unflatten(1, (-1, len(slots))).movedim(0, 2)
