"""Linear layers whose outputs are laid out as gates."""

from __future__ import annotations

from einops.layers.torch import Rearrange
from torch import nn

DECAY_RANK = 32
"""Width between tokens and a forgetting gate of every channel; a full map would have as many weights as projections"""


THRESHOLD_BIAS = 0.5413
"""What thresholds of tokens start with, 1 after softplus: about as far as values of features are from nothing"""


class GateLayer(nn.Sequential):
    """A linear layer whose outputs are laid out as the pattern says."""

    def __init__(self, dim: int, num_out: int, pattern: str, *, bias: float | None = None, **sizes: int) -> None:
        super().__init__(starting_at(dim, num_out, bias), Rearrange(pattern, **sizes))


class ChannelGateLayer(nn.Sequential):
    """A gate layer that passes a narrow one, for as many outputs as a memory has channels."""

    def __init__(self, dim: int, num_out: int, pattern: str, *, bias: float | None = None, **sizes: int) -> None:
        rank = min(dim, DECAY_RANK)
        narrow, wide = nn.Linear(dim, rank, bias=False), starting_at(rank, num_out, bias)
        super().__init__(narrow, wide, Rearrange(pattern, **sizes))


class ConstantAtFirst(nn.Linear):
    """A linear layer that gives a constant until it has learned."""

    def __init__(self, dim: int, num_out: int, constant: float) -> None:
        self.constant = constant
        super().__init__(dim, num_out)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # so that a seed's numbers do not depend on this option
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.constant)


def starting_at(dim: int, num_out: int, bias: float | None) -> nn.Linear:
    """A layer that first gives a constant; None: as torch starts it."""
    return nn.Linear(dim, num_out) if bias is None else ConstantAtFirst(dim, num_out, bias)


def threshold_layer(dim: int, heads: int, writes: int) -> GateLayer:
    """How far off the answer to each write of a token may be, before softplus.  (b n c dim) -> (r n c u)"""
    return GateLayer(dim, heads * writes, "b n c (h u) -> (b h) n c u", bias=THRESHOLD_BIAS, h=heads)
