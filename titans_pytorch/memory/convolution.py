"""A short causal convolution over time, in pieces of any length."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titans_pytorch.initialization import whole_of, write
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

    lag: int | None = None  # the token near which it begins
    followers: tuple[CausalConvolution, ...] = ()  # others that begin with its numbers

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch starts a convolution; after `start_at` near a token. Whatever follows it begins with its numbers."""
        like, limit = self.weight, len(self.weight) ** -0.5
        drawn = nn.init.uniform_(torch.empty(like.shape, dtype=like.dtype, device=like.device), -limit, limit)
        for each in (self, *self.followers):
            write(each.weight, near_one_token(drawn, each.lag))

    def start_at(self, lag: int) -> None:
        """Begin near the token so many before, with a little of the others."""
        self.lag = lag
        write(self.weight, near_one_token(self.weight, lag))

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


def near_one_token(weight: Tensor, lag: int | None) -> Tensor:
    """Weights mostly of the token so many before, with a little of the others; None: as they are.  (size channels)"""
    if lag is None:
        return weight
    weight = whole_of(weight)
    near = torch.zeros_like(weight)
    near[min(lag, len(weight) - 1)] = 1.0
    return near + weight.abs() * OTHER_TOKENS


class LeadingLinear(nn.Linear):
    """A linear map without bias, with which others may begin."""

    followers: tuple[nn.Linear, ...] = ()

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for each in self.followers:
            write(each.weight, self.weight)


class ConvolvedLinear(nn.Module):
    """A linear map of tokens, then a convolution over time, then an activation.  x: (b t dim)"""

    def __init__(self, dim_in: int, dim_out: int, conv_size: int, activation: nn.Module | None) -> None:
        super().__init__()
        self.linear = LeadingLinear(dim_in, dim_out)
        self.convolution = CausalConvolution(dim_out, conv_size)
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """-> (b t out), the next tail"""
        out, tail = self.convolution(self.linear(x), tail)
        return self.activation(out), tail


def leading(layer: nn.Module) -> list[Any]:
    """The modules in a projection that own its parameters."""
    return [each for each in layer.modules() if isinstance(each, LeadingLinear | CausalConvolution)]


def projected(layer: nn.Module, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a layer with or without a convolution makes of tokens, and its next tail."""
    if not isinstance(layer, ConvolvedLinear):
        return layer(x), None
    return layer(x, layer.convolution.fresh_tail(len(x)) if tail is None else tail)


def fresh_tail(layer: nn.Module, batch: int) -> Tensor | None:
    return layer.convolution.fresh_tail(batch) if isinstance(layer, ConvolvedLinear) else None
