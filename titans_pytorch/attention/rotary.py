"""Rotary position embedding: pairs of features turn with the position, so that products see only distances."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_pytorch.fast_weights.precision import at_least_float32

Turns = tuple[Tensor, Tensor]
"""For every position and feature, what multiplies the feature (cosine) and what its neighbour (minus or plus sine).

(t turning) each
"""


class RotaryEmbedding(nn.Module):
    """Turns neighbouring features (0 1), (2 3), ... of a head, the first `dim` of them; the others stay as they are.

    Angles are taken in float64: at position 1,000,000 those of float32 are off by a tenth of a turn.
    """

    freqs: Tensor

    def __init__(self, dim: int, theta: float = 10_000.0) -> None:
        super().__init__()
        pairs = dim // 2
        self.register_buffer("freqs", theta ** -(torch.arange(pairs) * 2 / dim))

    def turns(self, start: int, count: int) -> Turns:
        """Cosine and sine for the positions start, start + 1, ..., in at least float32."""
        positions = torch.arange(start, start + count, device=self.freqs.device, dtype=torch.float64)
        freqs = self.freqs.double()
        angles = positions[:, None] * torch.stack((-freqs, freqs), dim=-1).flatten()
        dtype = at_least_float32(self.freqs.dtype)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x: (... t d), the first token being at position `start` -> same"""
        return turned(x, *self.turns(start, x.shape[-2]))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (... t d), of which as many features turn as the turns have -> same"""
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
    neighbours = torch.stack((odd, even), dim=-1).flatten(-2)
    turned = torch.addcmul(turning * cos, neighbours, sin).to(x.dtype)
    return turned if still.shape[-1] == 0 else torch.cat((turned, still), dim=-1)
