"""From block to block of a linear memory that is surprised at its own weights: the one part that has to wait.

A block's differences F and what it hands on are linear in what it begins with, S, weights and momenta in one column:

    F_t     = A_t^{-1} (V_t - B_t S_t)            A: unit lower triangular, V: values, B: keys by their shares in S
    S_{t+1} = mix_t S_t + R_t^T F_t               mix: shares of slots in slots, R: keys by their shares in the end

All A are inverted at once, so four products a block are left, and four on the way back; `bar` is the gradient of what
it is named for:

    bar V_t = A_t^{-T} (bar F_t + R_t bar S_{t+1}),      bar S_t += mix_t^T bar S_{t+1} - B_t^T bar V_t

The gradients of A, B, R and mix are products that do not wait, and are taken of all blocks at once; A's is -bar V F^T.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.inner_gradient import written_gradients_work
from titans_pytorch.fast_weights.precision import full_precision


class Links(NamedTuple):
    """What makes a block's differences and its end of its start, for T blocks of L writes, `a` slots of (i j)."""

    known: Tensor  # (T r L j)  V
    of_start: Tensor  # (T r L ai)  B
    handed: Tensor  # (T r L ai)  R
    mix: Tensor  # (T r a a)
    system: Tensor  # (T r L L)  A, of which only what is below the diagonal is looked at


def chained(links: Links, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All blocks, from the start of the first (r ai j).  -> F (T r L j), starts S (T r ai j), the last end (r ai j)"""
    if written_gradients_work():
        found: tuple[Tensor, Tensor, Tensor] = Chain.apply(*links, start)
        return found
    differences: list[Tensor] = []
    states = [start]
    for known, of_start, handed, mix, inverse in zip(*links[:4], inverted(links.system), strict=True):
        differences.append(inverse @ (known - of_start @ states[-1]))
        states.append((mix @ by_slot(mix, states[-1])).reshape(start.shape) + handed.mT @ differences[-1])
    return torch.stack(differences), torch.stack(states[:-1]), states[-1]


def inverted(system: Tensor) -> Tensor:
    """The inverse of 1 + what is below the diagonal.  (... L L)"""
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    return torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)


def by_slot(mix: Tensor, state: Tensor) -> Tensor:
    """(... ai j) -> (... a ij)"""
    return state.reshape(*state.shape[:-2], mix.shape[-1], -1)


class Chain(torch.autograd.Function):
    """`chained`, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, known: Tensor, of_start: Tensor, handed: Tensor, mix: Tensor, system: Tensor, start: Tensor
    ) -> Any:
        num, inverse = len(known), inverted(system)
        differences, states = torch.empty_like(known), start.new_empty(num + 1, *start.shape)
        states[0], left = start, torch.empty_like(known[0])
        slots = by_slot(mix, states[:-1]), by_slot(mix, states[1:])
        for t in range(num):
            torch.baddbmm(known[t], of_start[t], states[t], alpha=-1, out=left)
            torch.bmm(inverse[t], left, out=differences[t])
            torch.bmm(mix[t], slots[0][t], out=slots[1][t])
            states[t + 1].baddbmm_(handed[t].mT, differences[t])
        ctx.save_for_backward(of_start, handed, mix, inverse, states, differences)
        ctx.set_materialize_grads(False)
        return differences, states[:-1], states[-1]

    @staticmethod
    def backward(ctx: Any, of_differences: Tensor | None, of_starts: Tensor | None, of_end: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a linear memory whose renewals are solved can be differentiated once, got create_graph=True; where "
                "titans_pytorch.memory.costs.COSTS has solved_writes=(0, 0) and series_elements=0 it can be again"
            )
        of_start, handed, mix, inverse, states, differences = ctx.saved_tensors
        bars = torch.empty_like(states)
        for bar, given in ((bars[:-1], of_starts), (bars[-1], of_end)):
            _ = bar.zero_() if given is None else bar.copy_(given)
        asked = torch.zeros_like(differences) if of_differences is None else of_differences
        with full_precision(states):
            of_known = backwards(of_start, handed, mix, inverse, asked, bars)
            of_mix = by_slot(mix, bars[1:]) @ by_slot(mix, states[:-1]).mT
            of_system = (of_known @ differences.mT).tril_(-1).neg_()
            of_of_start = (of_known @ states[:-1].mT).neg_()
            return of_known, of_of_start, differences @ bars[1:].mT, of_mix, of_system, bars[0]


def backwards(of_start: Tensor, handed: Tensor, mix: Tensor, inverse: Tensor, asked: Tensor, bars: Tensor) -> Tensor:
    """From the last block to the first: `bars`, the gradients of all S, in place.  asked: bar F -> bar V (T r L j)"""
    of_known, slots, turned, left = torch.empty_like(asked), by_slot(mix, bars), mix.mT, torch.empty_like(asked[0])
    for t in reversed(range(len(asked))):
        torch.baddbmm(asked[t], handed[t], bars[t + 1], out=left)
        torch.bmm(inverse[t].mT, left, out=of_known[t])
        slots[t].baddbmm_(turned[t], slots[t + 1])
        bars[t].baddbmm_(of_start[t].mT, of_known[t], alpha=-1)
    return of_known
