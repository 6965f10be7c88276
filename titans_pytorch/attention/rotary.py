"""Rotary position embedding: pairs of features turn with the position, so that products see only distances."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Turns neighbouring features (0 1), (2 3), ... of a head, the first `dim` of them; the others stay as they are.

    Angles are taken in float64: at position 1,000,000 those of float32 are off by a tenth of a turn.
    """

    freqs: Tensor

    def __init__(self, dim: int, theta: float = 10_000.0) -> None:
        super().__init__()
        pairs = dim // 2
        self.register_buffer("freqs", theta ** -(torch.arange(pairs) * 2 / dim))

    def turns(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine for the positions start, start + 1, ...  -> (t pairs) each, in at least float32"""
        positions = torch.arange(start, start + count, device=self.freqs.device, dtype=torch.float64)
        angles = positions[:, None] * self.freqs.double()
        dtype = torch.promote_types(self.freqs.dtype, torch.float32)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x: (... t d), the first token being at position `start` -> same"""
        turning = 2 * self.freqs.shape[0]
        return turned(x, turning, *self.turns(start, x.shape[-2]))


def turned(x: Tensor, turning: int, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (... t d), of which the first `turning` features turn -> same"""
    still = x[..., turning:]
    even, odd = x[..., :turning].to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
    return turned if still.shape[-1] == 0 else torch.cat((turned, still), dim=-1)
