"""Gated feed-forward networks: half of the hidden features, each multiplied by the SiLU of the other half."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SiluGate(nn.Module):
    """The first half of the features, gated by the second.  (... 2d) -> (... d)"""

    def forward(self, x: Tensor) -> Tensor:
        x, gates = x.chunk(2, dim=-1)
        return F.silu(gates) * x


def feed_forward(dim: int, hidden: int) -> nn.Sequential:
    """A norm and a gated network with biases, `hidden` features wide.  (... dim) -> (... dim)"""
    return nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, 2 * hidden), SiluGate(), nn.Linear(hidden, dim))


def hidden_width(dim: int, mult: float) -> int:
    """The width at which a gated network has the parameters of a plain one that is `mult` times `dim` wide."""
    return int(dim * mult * 2 / 3)


class SwiGLU(nn.Module):
    """A gated network without biases.  (... dim) -> (... dim)"""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.to_hidden = nn.Linear(dim, 2 * hidden, bias=False)
        self.to_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gates = self.to_hidden(x).chunk(2, dim=-1)
        return self.to_out(F.silu(gates) * x)
