"""From block to block of a linear memory that is surprised at its own weights: the one part that has to wait.

A block's differences and what it hands on are linear in what it begins with, S, weights and momenta one below another:

    F_t     = U_t - Y_t S_t                       U, Y: solutions of the block's triangular system
    S_{t+1} = mix_t S_t + R_t^T F_t               mix: shares of slots in slots, R: keys by their shares

Three products a block, and three on the way back, where `bar` is the gradient of what it is named for:

    bar F_t += R_t bar S_{t+1},      bar S_t += mix_t^T bar S_{t+1} - Y_t^T bar F_t

The gradients of U, Y, R and mix are sums that do not wait, and are taken of all blocks at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.inner_gradient import written_gradients_work
from titans_pytorch.fast_weights.precision import full_precision


class Links(NamedTuple):
    """What makes a block's differences and its end of its start, for T blocks of L writes, `a` slots of (i j)."""

    known: Tensor  # (T r L j)  U
    of_start: Tensor  # (T r L ai)  Y
    handed: Tensor  # (T r L ai)  R
    mix: Tensor  # (T r a a)


def chained(links: Links, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All blocks, from the start of the first (r ai j).  -> F (T r L j), starts S (T r ai j), the last end (r ai j)"""
    if written_gradients_work():
        found: tuple[Tensor, Tensor, Tensor] = Chain.apply(*links, start)
        return found
    differences: list[Tensor] = []
    states = [start]
    for known, of_start, handed, mix in zip(*links, strict=True):
        differences.append(known - of_start @ states[-1])
        states.append(mixed(mix, states[-1]) + handed.mT @ differences[-1])
    return torch.stack(differences), torch.stack(states[:-1]), states[-1]


def mixed(mix: Tensor, state: Tensor) -> Tensor:
    """Slots as sums of slots.  mix: (... a a), state: (... ai j) -> (... ai j)"""
    return (mix @ by_slot(mix, state)).reshape(state.shape)


def by_slot(mix: Tensor, state: Tensor) -> Tensor:
    """(... ai j) -> (... a ij)"""
    return state.reshape(*state.shape[:-2], mix.shape[-1], -1)


class Chain(torch.autograd.Function):
    """`chained`, differentiable once."""

    @staticmethod
    def forward(ctx: Any, known: Tensor, of_start: Tensor, handed: Tensor, mix: Tensor, start: Tensor) -> Any:
        num = len(known)
        differences, states = torch.empty_like(known), start.new_empty(num + 1, *start.shape)
        states[0] = start
        slots = by_slot(mix, states[:-1]), by_slot(mix, states[1:])
        for t in range(num):
            torch.baddbmm(known[t], of_start[t], states[t], alpha=-1, out=differences[t])
            torch.bmm(mix[t], slots[0][t], out=slots[1][t])
            states[t + 1].baddbmm_(handed[t].mT, differences[t])
        ctx.save_for_backward(of_start, handed, mix, states, differences)
        ctx.set_materialize_grads(False)
        return differences, states[:-1], states[-1]

    @staticmethod
    def backward(ctx: Any, of_differences: Tensor | None, of_starts: Tensor | None, of_end: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a linear memory whose renewals are solved can be differentiated once, got create_graph=True; where "
                "titans_pytorch.memory.costs.COSTS has solved_writes=(0, 0) and series_elements=0 it can be again"
            )
        of_start, handed, mix, states, differences = ctx.saved_tensors
        with full_precision(states):
            return backwards(of_start, handed, mix, states, differences, of_differences, of_starts, of_end)


def backwards(
    of_start: Tensor,
    handed: Tensor,
    mix: Tensor,
    states: Tensor,
    differences: Tensor,
    of_differences: Tensor | None,
    of_starts: Tensor | None,
    of_end: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of U, Y, R, mix and the first start, from those of what `chained` returns; None: nobody asks."""
    of_known = torch.zeros_like(differences) if of_differences is None else of_differences.clone()
    bars = torch.empty_like(states)
    for bar, given in ((bars[:-1], of_starts), (bars[-1], of_end)):
        _ = bar.zero_() if given is None else bar.copy_(given)
    slots, turned = by_slot(mix, bars), mix.mT
    for t in reversed(range(len(differences))):
        of_known[t].baddbmm_(handed[t], bars[t + 1])
        slots[t].baddbmm_(turned[t], slots[t + 1])
        bars[t].baddbmm_(of_start[t].mT, of_known[t], alpha=-1)
    of_of_start = -(of_known @ states[:-1].mT)
    of_mix = slots[1:] @ by_slot(mix, states[:-1]).mT
    return of_known, of_of_start, differences @ bars[1:].mT, of_mix, bars[0]
