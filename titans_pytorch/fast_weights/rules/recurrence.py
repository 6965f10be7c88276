"""How gates turn surprises into weights, with all chunks of a block at once.

Momentum and forgetting are linear in the surprises, with one number per chunk:

    m_j = eta_j m_{j-1} + u_j            momentum, orders chained (eq. 10, 14)
    w_j = (1 - alpha_j) w_{j-1} + step_j  forgetting (eq. 13)

so after chunk j

    w_j = initial_j w_0 + sum_o past_{o,j} m_{o,0} + sum_i surprise_{j,i} u_i

with small arrays per row that depend on the gates alone.  `unroll` computes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """What decides how a row's weights evolve over chunks; logarithms keep products of many gates exact."""

    log_keep: Tensor  # (... n)    log(1 - alpha), or of every channel (... j n)
    log_momentum: Tensor | None  # (o ... n)  log(eta), None without momentum
    combine: Tensor | None  # (p ... n)  weights of the orders, None to take the last
    is_stored: Tensor | None  # (... n)    0 where a chunk has nothing to store, else 1; None: all do
    poison: Tensor  # (... n)    0, or NaN where a chunk is not finite: nothing before it may turn NaN

    def select(self, chunks: slice) -> Gates:
        def part(gate: Tensor | None) -> Tensor | None:
            return None if gate is None else gate[..., chunks]

        optional = (part(self.log_momentum), part(self.combine), part(self.is_stored))
        return Gates(self.log_keep[..., chunks], *optional, self.poison[..., chunks])


class Coefficients(NamedTuple):
    """Weights and momenta after each chunk as sums of what the block began with and the block's surprises."""

    initial: Tensor  # (... n+1)      of w_0 in w_j
    past: Tensor  # (o ... n+1)    of m_{o,0} in w_j
    surprise: Tensor  # (... n+1 n)    of u_i in w_j
    last_past: Tensor  # (o o ...)      of m_{p,0} in the last m_o
    last_surprise: Tensor  # (o ... n)      of u_i in the last m_o


class Steps(NamedTuple):
    """One quantity per chunk as a sum of the momenta that the block began with and the block's surprises."""

    past: Tensor  # (o ... n)
    surprise: Tensor  # (... n n)


def products(log_gates: Tensor) -> Tensor:
    """All products of consecutive gates.  (... n) -> (... n+1 n+1), [j, i] = prod_{k=i+1..j} gate_k, 0 above

    Every sum of logarithms is taken by itself: differences of one long cumulative sum would lose digits, quotients of
    products would divide by zero.
    """
    n = log_gates.shape[-1]
    rows = log_gates.new_zeros(*log_gates.shape[:-1], 1)
    logs = torch.cat((rows, log_gates), dim=-1).unsqueeze(-1).expand(*log_gates.shape[:-1], n + 1, n + 1)
    return logs.tril(-1).cumsum(dim=-2).exp().tril()


def momenta(gates: Gates) -> list[Steps]:
    """The momentum of every order after each chunk; order 0, the surprise itself, comes first."""
    like, is_stored = gates.poison, gates.is_stored
    n = like.shape[-1]
    identity = torch.eye(n, dtype=like.dtype, device=like.device).expand(*like.shape, n)
    log_momentum = [] if gates.log_momentum is None else list(gates.log_momentum)
    past = like.new_zeros(len(log_momentum), *like.shape)
    orders = [Steps(past, identity)]
    for order, log_gate in enumerate(log_momentum):
        from_past, from_surprise = orders[-1]
        decay = products(log_gate)
        within = decay[..., 1:, 1:]
        if is_stored is not None:  # a chunk without anything to store hands nothing on
            within = within * is_stored.unsqueeze(-2)
        own = decay[..., 1:, 0]
        handed = [(within @ from_past[p].unsqueeze(-1)).squeeze(-1) for p in range(order)]
        rest = [torch.zeros_like(own)] * (len(log_momentum) - order - 1)
        orders.append(Steps(torch.stack([*handed, own, *rest]), within if order == 0 else within @ from_surprise))
    return orders


def steps(gates: Gates, orders: list[Steps]) -> Steps:
    """What is added to the weights at each chunk: the last momentum, or a learned mix of the orders."""
    past, surprise = orders[-1]
    if gates.combine is not None:
        mixed = orders[len(orders) - gates.combine.shape[0] :]
        past = sum(part * order.past for part, order in zip(gates.combine, mixed, strict=True))
        surprise = sum(part.unsqueeze(-1) * order.surprise for part, order in zip(gates.combine, mixed, strict=True))
    if gates.is_stored is not None:
        past, surprise = past * gates.is_stored, surprise * gates.is_stored.unsqueeze(-1)
    return Steps(past, surprise)


def unroll(gates: Gates) -> Coefficients:
    """All chunks of a block at once; see the head of this file."""
    orders = momenta(gates)
    step = steps(gates, orders)
    keep = products(gates.log_keep)
    handed = keep[..., 1:]
    past = (handed @ step.past.unsqueeze(-1)).squeeze(-1)
    surprise = handed if gates.log_momentum is None and gates.is_stored is None else handed @ step.surprise
    return Coefficients(keep[..., 0] + poison_after(gates), past, surprise, *last_momenta(gates, orders))


def unroll_channels(gates: Gates) -> Coefficients:
    """The same where every channel is forgotten by itself: what makes weights has channels before the chunks.

    log_keep: (... j n) -> initial (... j n+1), past (o ... j n+1), surprise (... j n+1 n); momenta have no channels
    """
    orders = momenta(gates)
    step = steps(gates, orders)
    keep = products(gates.log_keep)
    handed = keep[..., 1:]
    past = (handed @ step.past.unsqueeze(-2).unsqueeze(-1)).squeeze(-1)
    initial = keep[..., 0] + poison_after(gates).unsqueeze(-2)
    return Coefficients(initial, past, handed @ step.surprise.unsqueeze(-3), *last_momenta(gates, orders))


def last_momenta(gates: Gates, orders: list[Steps]) -> tuple[Tensor, Tensor]:
    """Of the momenta and the surprises of a block in its last momenta.  (o o ...), (o ... n)"""
    if gates.log_momentum is None:
        return gates.poison.new_zeros(0, 0, *gates.poison.shape[:-1]), gates.poison.new_zeros(0, *gates.poison.shape)
    last_past = torch.stack([order.past[..., -1] for order in orders[1:]])
    return last_past, torch.stack([order.surprise[..., -1, :] for order in orders[1:]])


def poison_after(gates: Gates) -> Tensor:
    """NaN for every entry of a block after the first chunk that is not finite.  -> (... n+1)"""
    return torch.nn.functional.pad(gates.poison.cumsum(dim=-1), (1, 0))
