"""One vector for each chunk, which the gates of chunks are made of."""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor, nn

from titans_pytorch.memory.gate_layers import ConstantAtFirst


class AveragePool(nn.Module):
    """One vector for each chunk, the mean of its stored tokens.  x: (b n c d), is_stored: (b n c) -> (b n d)"""

    def forward(self, x: Tensor, is_stored: Tensor | None = None) -> Tensor:
        if is_stored is None:
            return reduce(x, "b n c d -> b n d", "mean")
        count = reduce(is_stored.to(x.dtype), "b n c -> b n 1", "sum").clamp(min=1)
        return reduce(x, "b n c d -> b n d", "sum") / count


class AttentionPool(nn.Module):
    """One vector for each chunk, a learned softmax over its stored tokens for every feature; starts as their mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_attn_logits = ConstantAtFirst(dim, dim, 0.0)

    def forward(self, x: Tensor, is_stored: Tensor | None = None) -> Tensor:
        logits = self.to_attn_logits(x)
        if is_stored is not None:  # a very negative number, as a chunk without any stored token has to stay finite
            logits = logits.masked_fill(~is_stored[..., None], torch.finfo(logits.dtype).min / 2)
        return (logits.softmax(dim=-2) * x).sum(dim=-2)
