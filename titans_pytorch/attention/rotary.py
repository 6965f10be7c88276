"""Rotary position embedding: pairs of features turn with the position, so that products see only distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.attention.masks import kept
from titans_pytorch.fast_weights.precision import at_least_float32

Turns = tuple[Tensor, Tensor]
"""For every position and feature, what multiplies the feature (cosine) and what its neighbour (minus or plus sine).

(t turning) each
"""

ROUNDED = 0.01
"""How far frequencies of half precision are off, relatively"""


class RotaryEmbedding(nn.Module):
    """Turns neighbouring features (0 1), (2 3), ... of a head, the first `dim` of them; the others stay as they are.

    Frequencies are no part of a module's state, which casts to half precision would spoil: they follow from the width,
    in float64, as angles do (at position 1,000,000 those of float32 are off by a tenth of a turn).
    """

    def __init__(self, dim: int, theta: float = 10_000.0) -> None:
        super().__init__()
        self.dim, self.theta = dim, theta

    def turns(self, start: int, count: int, like: Tensor) -> Turns:
        """Cosine and sine for the positions start, start + 1, ..., in at least float32.

        like: tokens, for their device and dtype
        """
        return self.turns_at(torch.arange(start, start + count, device=like.device, dtype=torch.float64), like)

    def turns_at(self, positions: Tensor, like: Tensor) -> Turns:
        """Cosine and sine for any positions (t), in at least float32.  like: tokens, for their device and dtype"""
        angles = positions.double()[:, None] * signed_frequencies(self.dim, self.theta, like.device)
        dtype = at_least_float32(like.dtype)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x: (... t d), the first token being at position `start` -> same"""
        return turned(x, *self.turns(start, x.shape[-2], x))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Older checkpoints hold the frequencies, rounded; they have to be those of this width."""
        given = state_dict.pop(f"{prefix}freqs", None)
        if isinstance(given, Tensor) and not given.is_meta:
            own = signed_frequencies(self.dim, self.theta, given.device)[1::2]
            got = given.to(own.dtype)
            if got.shape != own.shape or not torch.allclose(got, own, rtol=ROUNDED, atol=1e-6):
                error_msgs.append(
                    f"{prefix}freqs must be the {len(own)} frequencies of theta {self.theta:g}, got {given.tolist()}"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


@kept
def signed_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """-f, f, ... of each pair of features, in float64.  -> (turning)"""
    pairs = torch.arange(dim // 2, device=device, dtype=torch.float64)
    freqs = theta ** -(pairs * 2 / dim)
    return torch.stack((-freqs, freqs), dim=-1).flatten()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (... t d), of which as many features turn as the turns have -> same"""
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
    neighbours = torch.stack((odd, even), dim=-1).flatten(-2)
    turned = torch.addcmul(turning * cos, neighbours, sin).to(x.dtype)
    return turned if still.shape[-1] == 0 else torch.cat((turned, still), dim=-1)
