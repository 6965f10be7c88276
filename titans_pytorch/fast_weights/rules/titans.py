"""The rule of Titans (arXiv 2501.00663): past surprise as momentum, and forgetting.

    S_t = eta_t S_{t-1} - theta_t grad        (10, 14)   `move`; the surprise of a chunk is -theta grad
    M_t = (1 - alpha_t) M_{t-1} + S_t         (13)       `retain`; keep = 1 - alpha

Orders of momentum are chained: each is a moving average of the one before, the surprise itself being order 0.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from titans_pytorch.fast_weights.rules.gates import ChunkGates, Gates
from titans_pytorch.fast_weights.rules.omega import window_gate
from titans_pytorch.fast_weights.rules.rule import Coefficients, GateSpec, Rule, Sums, Term


class Titans(Rule):
    """Momentum and forgetting with a gate for each chunk.

    Args:
        orders: of momentum; 0: none
        num_combined: how many of the last orders a learned mix adds up; 0: the last one is added
        per_parameter: every parameter of the memory has gates of its own
        channelwise: every entry along the last axis of every parameter is forgotten by itself
        rate_bias: constant that the gate of step sizes starts at
        momentum_bias: constant that the gate of momentum starts at
        decay_bias: constant that the gate of forgetting starts at
        window: chunks whose surprises a step adds up (`omega.py`)
    """

    def __init__(
        self,
        orders: int = 1,
        num_combined: int = 0,
        *,
        per_parameter: bool = False,
        channelwise: bool = False,
        rate_bias: float | None = None,
        momentum_bias: float | None = None,
        decay_bias: float | None = None,
        window: int = 1,
    ) -> None:
        self.num_momenta, self.window = orders, window
        own: Literal["memory", "parameter"] = "parameter" if per_parameter else "memory"
        gates = [
            GateSpec("rate", "to_adaptive_step", "rate", "token", varies=own, bias=rate_bias),
            GateSpec("keep", "to_decay_factor", "decay", varies="channel" if channelwise else own, bias=decay_bias),
        ]
        if orders:
            gates.append(GateSpec("momentum", "to_momentum", number=orders, varies=own, bias=momentum_bias))
        if num_combined:
            gates.append(GateSpec("combine", "to_learned_momentum_combine", "share", number=num_combined))
        if window > 1:
            gates.append(window_gate(window, own))
        self.gates = tuple(gates)

    def move(self, momenta: tuple[Term, ...], surprise: Term, gates: ChunkGates) -> tuple[Term, tuple[Term, ...]]:
        """Momentum of every order after a chunk, and what of it is added to the weights."""
        orders = [surprise]
        for eta, momentum in zip(gates["momentum"], momenta, strict=True):
            orders.append(eta * momentum + orders[-1])  # eqs. 10, 14
        return self.mix(gates["combine"], orders), tuple(orders[1:])

    def retain(self, weights: Term, step: Term, gates: ChunkGates, start: Term) -> Term:
        """The weights after a chunk: what is not forgotten, and the step."""
        return gates.keep * weights + step  # eq. 13, keep = 1 - alpha

    def mix(self, shares: list[Any], orders: list[Any]) -> Any:
        """The last order of momentum, or a learned mix of the last ones."""
        if not shares:
            return orders[-1]
        first, *more = (share * order for share, order in zip(shares, orders[-len(shares) :], strict=True))
        return sum(more, first)

    def coefficients(self, gates: Gates) -> Coefficients:
        """The equations for all chunks of a block at once: products of gates in place of a loop over chunks."""
        like, n, o = gates.like, gates.num_chunks, self.num_momenta
        identity = torch.eye(n, dtype=like.dtype, device=like.device).expand(*like.shape, n)
        orders = [Sums(like.new_zeros(o, *like.shape), identity)]
        for order, decay in enumerate(gates.products("momentum")):
            before, within = orders[-1], decay[..., 1:, 1:]
            handed = [(within @ before.past[p].unsqueeze(-1)).squeeze(-1) for p in range(order)]
            rest = [torch.zeros_like(like)] * (o - order - 1)
            past = torch.stack([*handed, decay[..., 1:, 0], *rest])
            orders.append(Sums(past, within if order == 0 else within @ before.surprise))
        shares = gates.shares.get("combine", ())
        past = self.mix(list(shares), [order.past for order in orders])
        surprise = self.mix([share.unsqueeze(-1) for share in shares], [order.surprise for order in orders])
        (keep,) = gates.products("keep")
        adds_last = self.num_momenta > 0 and "combine" not in gates.shares
        return Coefficients(Sums(past, surprise), keep, None, *ends(orders[1:], like), adds_last)


def ends(orders: list[Sums], like: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of earlier momenta and of the surprises in the momenta after the last chunk.  (o o ...), (o ... n)"""
    if not orders:
        return like.new_zeros(0, 0, *like.shape[:-1]), like.new_zeros(0, *like.shape)
    last_past = torch.stack([order.past[..., -1] for order in orders])
    return last_past, torch.stack([order.surprise[..., -1, :] for order in orders])
