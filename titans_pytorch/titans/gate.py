"""How what was attended to and what was remembered become one: the ⊗ of eqs. 25 and 28, whose form is left open.

The paper says: both are normalised with learned vectors as weights, then comes a non-linearity. Four readings of it:

    mix        g y + (1 - g) m  with  g = σ(w y + u m): either may pass; the only one that is not a plain product
    attention  σ(y) m: what was attended to decides how much of what was remembered passes
    memory     y σ(m): what was remembered decides how much of what was attended to passes
    product    silu(y m)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.layers.norm import RMSNorm
from titans_pytorch.titans.config import GateForm


class Gate(nn.Module):
    """(b n dim), (b n dim) -> (b n dim)"""

    def __init__(self, dim: int, form: GateForm) -> None:
        super().__init__()
        self.form = form
        self.attention_norm, self.memory_norm = RMSNorm(dim), RMSNorm(dim)
        self.shares = nn.Parameter(torch.empty(2, dim)) if form == "mix" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.shares is not None:
            nn.init.zeros_(self.shares)

    def forward(self, attended: Tensor, remembered: Tensor) -> Tensor:
        y, m = self.attention_norm(attended), self.memory_norm(remembered)
        if self.shares is not None:
            share = (self.shares[0] * y + self.shares[1] * m).sigmoid()
            return share * y + (1 - share) * m
        if self.form == "attention":
            return y.sigmoid() * m
        return y * m.sigmoid() if self.form == "memory" else F.silu(y * m)
