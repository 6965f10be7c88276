"""Attention as an MLP whose weights are the context."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, overload

import torch
from einops import rearrange
from torch import Tensor, nn

from titans_pytorch.attention.rotary import RotaryEmbedding
from titans_pytorch.attention.windowed import attend_causally
from titans_pytorch.checks import tensor_checks, value_checks


class ImplicitMLPCache(NamedTuple):
    """Keys (turned by their position) and values of all tokens so far, of every layer of the implicit MLP."""

    keys: tuple[Tensor, ...]  # (b h t in) each
    values: tuple[Tensor, ...]  # (b h t out) each


class HeadMix(nn.Conv2d):
    """A mix of heads, which begins as every head by itself.  (b h n d) -> same"""

    def __init__(self, heads: int) -> None:
        super().__init__(heads, heads, 1, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # so that a seed's numbers do not depend on this option
        nn.init.dirac_(self.weight)


class ImplicitMLPAttention(nn.Module):
    """A chain of causal attentions: keys are a layer's input weights, values its output weights, one per token.

        attention = ImplicitMLPAttention(512, (64, 128, 128, 64), activation=nn.SiLU(), heads=8)
        out = attention(torch.randn(2, 100, 512))                    # (2 100 512)
        out, cache = attention(tokens, cache=cache, return_kv_cache=True)

    Args:
        dim: features of a token
        mlp_hiddens: widths of the implicit MLP, of a query first, of the output last
        activation: between its layers
        heads: number of heads
        talking_heads: mix heads between its layers
        prenorm: norm of tokens
        keys_rmsnorm: norms of keys
    """

    def __init__(
        self,
        dim: int,
        mlp_hiddens: Sequence[int],
        *,
        activation: nn.Module | None = None,
        heads: int = 8,
        talking_heads: bool = True,
        prenorm: bool = True,
        keys_rmsnorm: bool = True,
    ) -> None:
        super().__init__()
        value_checks.check_whole(dim=dim, heads=heads)
        hiddens = value_checks.check_widths("mlp_hiddens", mlp_hiddens)
        self.dim, self.heads, self.hiddens = dim, heads, hiddens
        pairs = list(pairwise(hiddens))
        self.norm = nn.RMSNorm(dim) if prenorm else nn.Identity()
        self.rotary_embed = RotaryEmbedding(min(hiddens))
        self.to_queries = nn.Linear(dim, heads * hiddens[0], bias=False)
        self.keys = nn.ModuleList([nn.Linear(dim, heads * d_in, bias=False) for d_in, _ in pairs])
        self.values = nn.ModuleList([nn.Linear(dim, heads * d_out, bias=False) for _, d_out in pairs])
        self.key_norms = nn.ModuleList([nn.RMSNorm(d_in) if keys_rmsnorm else nn.Identity() for d_in, _ in pairs])
        self.activation = nn.SiLU() if activation is None else activation
        self.talking_heads = HeadMix(heads) if talking_heads and len(pairs) > 1 else None
        self.to_out = nn.Linear(heads * hiddens[-1], dim, bias=False)

    @overload
    def forward(
        self, tokens: Tensor, cache: ImplicitMLPCache | None = ..., return_kv_cache: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self, tokens: Tensor, cache: ImplicitMLPCache | None = ..., *, return_kv_cache: Literal[True]
    ) -> tuple[Tensor, ImplicitMLPCache]: ...

    @overload
    def forward(
        self, tokens: Tensor, cache: ImplicitMLPCache | None = ..., return_kv_cache: bool = ...
    ) -> Tensor | tuple[Tensor, ImplicitMLPCache]: ...

    def forward(
        self, tokens: Tensor, cache: ImplicitMLPCache | None = None, return_kv_cache: bool = False
    ) -> Tensor | tuple[Tensor, ImplicitMLPCache]:
        """tokens: (b n dim), a whole sequence or the next piece of one -> (b n dim), and if asked for the cache"""
        tensor_checks.check_tokens("tokens", tokens, dim=self.dim, dtype=self.to_out.weight.dtype)
        if cache is not None:
            self.check_cache(cache, tokens.shape[0])
        start = 0 if cache is None else cache.keys[0].shape[2]
        tokens = self.norm(tokens)
        out = self.split(self.to_queries(tokens))
        kept: list[tuple[Tensor, Tensor]] = []
        for i, (to_keys, norm, to_values) in enumerate(zip(self.keys, self.key_norms, self.values, strict=True)):
            k = self.rotary_embed(norm(self.split(to_keys(tokens))), start)
            v = self.split(to_values(tokens))
            if cache is not None:
                k, v = torch.cat((cache.keys[i], k), dim=2), torch.cat((cache.values[i], v), dim=2)
            kept.append((k, v))
            out = out if i == 0 else self.between(out)
            out = attend_causally(self.rotary_embed(out, start), k, v)
        out = self.to_out(rearrange(out, "b h n d -> b n (h d)"))
        keys, values = zip(*kept, strict=True)
        return (out, ImplicitMLPCache(keys, values)) if return_kv_cache else out

    def between(self, x: Tensor) -> Tensor:
        """From one layer of the implicit MLP to the next.  (b h n d) -> same"""
        return self.activation(x if self.talking_heads is None else self.talking_heads(x))

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def check_cache(self, cache: ImplicitMLPCache, batch: int) -> None:
        if not isinstance(cache, ImplicitMLPCache):
            raise TypeError(f"cache must be what an earlier call returned, got {type(cache).__name__}")
        count = cache.keys[0].shape[2]
        for name, given, widths in (
            ("cache.keys", cache.keys, self.hiddens[:-1]),
            ("cache.values", cache.values, self.hiddens[1:]),
        ):
            if len(given) != len(widths):
                raise ValueError(f"{name} must have {len(widths)} tensors, got {len(given)}")
            for i, (x, width) in enumerate(zip(given, widths, strict=True)):
                tensor_checks.check_shape(f"{name}[{i}]", x, (batch, self.heads, count, width))
