"""Attention over queries, keys and values that are attended to themselves."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from einops import rearrange
from torch import Tensor, nn

from titans_pytorch.attention.rotary import RotaryEmbedding
from titans_pytorch.attention.windowed import attend_causally
from titans_pytorch.checks import tensor_checks, value_checks


class NestedCache(NamedTuple):
    """Keys (turned by their position) and values of all tokens so far."""

    keys: Tensor  # (3 b h t d)
    values: Tensor  # (3 b h t d)
    nested_keys: Tensor  # (b h t d)
    nested_values: Tensor  # (b h t d)


class NestedAttention(nn.Module):
    """Three causal attentions of one query give the query, key and value of a fourth.

        attention = NestedAttention(512)
        out = attention(torch.randn(2, 100, 512))                    # (2 100 512)
        out, cache = attention(tokens, cache=cache, return_kv_cache=True)

    Args:
        dim: features of a token
        dim_head: width of a head
        heads: number of heads
        prenorm: norm of tokens
        keys_rmsnorm: norms of keys
    """

    def __init__(
        self, dim: int, *, dim_head: int = 64, heads: int = 8, prenorm: bool = True, keys_rmsnorm: bool = True
    ) -> None:
        super().__init__()
        value_checks.check_whole(dim=dim, dim_head=dim_head, heads=heads)
        value_checks.check_even(dim_head=dim_head)
        self.dim, self.dim_head, self.heads = dim, dim_head, heads
        inner = dim_head * heads
        self.norm = nn.RMSNorm(dim) if prenorm else nn.Identity()
        self.rotary_embed = RotaryEmbedding(dim_head)
        self.to_queries = nn.Linear(dim, inner, bias=False)
        self.to_keys = nn.Linear(dim, inner * 3, bias=False)
        self.to_values = nn.Linear(dim, inner * 3, bias=False)
        self.key_norms = nn.ModuleList([nn.RMSNorm(dim_head) if keys_rmsnorm else nn.Identity() for _ in range(3)])
        self.nested_key_norm = nn.RMSNorm(dim_head) if keys_rmsnorm else nn.Identity()
        self.to_out = nn.Linear(inner, dim, bias=False)

    @overload
    def forward(
        self, tokens: Tensor, cache: NestedCache | None = ..., return_kv_cache: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self, tokens: Tensor, cache: NestedCache | None = ..., *, return_kv_cache: Literal[True]
    ) -> tuple[Tensor, NestedCache]: ...

    @overload
    def forward(
        self, tokens: Tensor, cache: NestedCache | None = ..., return_kv_cache: bool = ...
    ) -> Tensor | tuple[Tensor, NestedCache]: ...

    def forward(
        self, tokens: Tensor, cache: NestedCache | None = None, return_kv_cache: bool = False
    ) -> Tensor | tuple[Tensor, NestedCache]:
        """tokens: (b n dim), a whole sequence or the next piece of one -> (b n dim), and if asked for the cache"""
        tensor_checks.check_tokens("tokens", tokens, dim=self.dim, dtype=self.to_out.weight.dtype)
        if cache is not None:
            self.check_cache(cache, tokens.shape[0])
        start = 0 if cache is None else cache.nested_keys.shape[2]
        tokens = self.norm(tokens)
        q = rearrange(self.to_queries(tokens), "b n (h d) -> b h n d", h=self.heads)
        split = "b n (three h d) -> three b h n d"
        k = rearrange(self.to_keys(tokens), split, three=3, h=self.heads)
        v = rearrange(self.to_values(tokens), split, three=3, h=self.heads)
        k = torch.stack([norm(each) for norm, each in zip(self.key_norms, k, strict=True)])
        q, k = self.rotary_embed(q, start), self.rotary_embed(k, start)
        if cache is not None:
            k, v = torch.cat((cache.keys, k), dim=3), torch.cat((cache.values, v), dim=3)

        nested_q, nested_k, nested_v = (attend_causally(q, *kv) for kv in zip(k, v, strict=True))
        nested_q = self.rotary_embed(nested_q, start)
        nested_k = self.rotary_embed(self.nested_key_norm(nested_k), start)
        if cache is not None:
            nested_k = torch.cat((cache.nested_keys, nested_k), dim=2)
            nested_v = torch.cat((cache.nested_values, nested_v), dim=2)
        out = attend_causally(nested_q, nested_k, nested_v)
        out = self.to_out(rearrange(out, "b h n d -> b n (h d)"))
        return (out, NestedCache(k, v, nested_k, nested_v)) if return_kv_cache else out

    def check_cache(self, cache: NestedCache, batch: int) -> None:
        if not isinstance(cache, NestedCache):
            raise TypeError(f"cache must be what an earlier call returned, got {type(cache).__name__}")
        shape = (batch, self.heads, cache.nested_keys.shape[2], self.dim_head)
        for name, x in cache._asdict().items():
            tensor_checks.check_shape(f"cache.{name}", x, shape if name.startswith("nested") else (3, *shape))
