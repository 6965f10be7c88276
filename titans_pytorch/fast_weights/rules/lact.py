"""The rule of LaCT (arXiv 2505.23884): after every step, matrices have the norms again that they began with.

    S_t = beta_t S_{t-1} - grad                         `move`; the gradient is of a chunk's weighted losses
    M_t = normed(M_{t-1} + S_t)                         `retain`

What is normed are the weights of each output, the columns of a matrix that is used as x @ w: each is as long as in the
learned start. So nothing has to be forgotten, and nothing grows. With `Orthogonal` around it, steps are made orthogonal
before they are added, as the paper's best variant does.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from titans_pytorch.fast_weights.norms import length_of, with_length
from titans_pytorch.fast_weights.rules.gates import ChunkGates
from titans_pytorch.fast_weights.rules.rule import GateSpec, Rule, Term
from titans_pytorch.fast_weights.scale import summed


class LaCT(Rule):
    """Momentum, no forgetting, and norms that stay.

    Args:
        has_momentum: whether past surprise carries on
        per_parameter: every parameter of the memory has gates of its own
        rate_bias: constant that the gate of step sizes starts at
        momentum_bias: constant that the gate of momentum starts at
    """

    is_linear = False
    uses_start = True
    why_built = "a rule that keeps norms"

    def __init__(
        self,
        has_momentum: bool = True,
        *,
        per_parameter: bool = False,
        rate_bias: float | None = None,
        momentum_bias: float | None = None,
    ) -> None:
        self.num_momenta = int(has_momentum)
        own: Literal["memory", "parameter"] = "parameter" if per_parameter else "memory"
        gates = [GateSpec("rate", "to_adaptive_step", "rate", "token", varies=own, bias=rate_bias)]
        if has_momentum:
            gates.append(GateSpec("momentum", "to_momentum", varies=own, bias=momentum_bias))
        self.gates = tuple(gates)

    def move(self, momenta: tuple[Term, ...], surprise: Term, gates: ChunkGates) -> tuple[Term, tuple[Term, ...]]:
        """Momentum after a chunk, which is what is added to the weights."""
        if not momenta:
            return surprise, ()
        moved = gates["momentum"][0] * momenta[0] + surprise
        return moved, (moved,)

    def retain(self, weights: Term, step: Term, gates: ChunkGates, start: Term) -> Term:
        """The weights and the step, as long as the start."""
        return as_long_as(summed(gates.keep * weights + step), summed(start))


def as_long_as(weights: Tensor, start: Tensor) -> Tensor:
    """Columns with the lengths of others; vectors are no columns.  (r i j) or (r j) each"""
    return with_length(weights, length_of(start))
