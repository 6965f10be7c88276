"""Norms of queries, keys and what is read, head by head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_pytorch.memory.options import ProjectionOptions


class MultiheadRMSNorm(nn.Module):
    """RMS norm with a gain `1 + gamma` for each head.  x: (b h t d)"""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.rmsnorm = nn.RMSNorm(dim, elementwise_affine=False)
        self.gamma = nn.Parameter(torch.empty(heads, 1, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        return self.rmsnorm(x) * (self.gamma + 1)


class L2Norm(nn.Module):
    """Vectors of about length 1, with a bounded gradient; those much shorter than 0.001 stay short.  x: (... d)"""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()


def head_norm(options: ProjectionOptions) -> nn.Module:
    """The norm of queries and keys, head by head."""
    if options.qk_l2norm:
        return L2Norm()
    return MultiheadRMSNorm(options.dim_head, options.heads) if options.qk_rmsnorm else nn.Identity()
