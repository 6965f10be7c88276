"""A short causal convolution over time, in pieces of any length."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans_pytorch.public_names import register_state

OTHER_TOKENS = 0.2
"""Share of torch's usual weights that other tokens begin with, beside the one that a convolution starts at"""


@register_state
class Tails(NamedTuple):
    """The last inputs of each convolution of a memory, which its next outputs still see; None without convolutions.

    Keys and values are those of complete chunks; tokens that wait will be projected when their chunk is complete.
    """

    queries: Tensor | None  # (b size-1 channels)
    keys: Tensor | None
    values: Tensor | None


class CausalConvolution(nn.Module):
    """y_t = sum_l weight_l x_{t-l}, every channel by itself; a stream begins with zeros.  x: (b t channels)

    A sum of shifted inputs, in the same order wherever a stream is cut: pieces give bitwise what one call gives.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, channels).uniform_(-(size**-0.5), size**-0.5))

    @torch.no_grad()
    def start_at(self, lag: int) -> None:
        """Begin near the token so many before, with a little of the others."""
        self.weight.abs_().mul_(OTHER_TOKENS)
        self.weight[min(lag, len(self.weight) - 1)] += 1.0

    def fresh_tail(self, batch: int) -> Tensor:
        """-> (b size-1 channels)"""
        size, channels = self.weight.shape
        return self.weight.new_zeros(batch, size - 1, channels)

    def forward(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """-> (b t channels), the next tail"""
        seen, t = torch.cat((tail, x.to(tail.dtype)), dim=1), x.shape[1]
        newest = self.weight.shape[0] - 1
        out = seen[:, newest:] * self.weight[0]
        for lag in range(1, newest + 1):
            out = torch.addcmul(out, seen[:, newest - lag : newest - lag + t], self.weight[lag])
        return out.to(x.dtype), seen[:, t:].clone()  # not the whole piece's memory


class ConvolvedLinear(nn.Module):
    """A linear map of tokens, then a convolution over time, then an activation.  x: (b t dim)"""

    def __init__(self, dim_in: int, dim_out: int, conv_size: int, activation: nn.Module | None) -> None:
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out, bias=False)
        self.convolution = CausalConvolution(dim_out, conv_size)
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """-> (b t out), the next tail"""
        out, tail = self.convolution(self.linear(x), tail)
        return self.activation(out), tail


def projected(layer: nn.Module, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a layer with or without a convolution makes of tokens, and its next tail."""
    if not isinstance(layer, ConvolvedLinear):
        return layer(x), None
    return layer(x, layer.convolution.fresh_tail(len(x)) if tail is None else tail)


def fresh_tail(layer: nn.Module, batch: int) -> Tensor | None:
    return layer.convolution.fresh_tail(batch) if isinstance(layer, ConvolvedLinear) else None
