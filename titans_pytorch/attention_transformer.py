"""A small transformer of one kind of attention, to try the kinds that this library has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.attention.rotary import RotaryEmbedding
from titans_pytorch.attention.windowed import attend_causally
from titans_pytorch.checks import tensor_checks, value_checks
from titans_pytorch.implicit_mlp_attention import ImplicitMLPAttention
from titans_pytorch.mac.layer import feed_forward
from titans_pytorch.nested_attention import NestedAttention
from titans_pytorch.pretrained import Pretrained

KINDS = ("implicit-mlp", "nested", "full")


class FullCache(NamedTuple):
    keys: Tensor  # (b h t d), turned by their position
    values: Tensor  # (b h t d)


class FullAttention(nn.Module):
    """Ordinary causal attention, to compare with.  Arguments as in `NestedAttention`."""

    def __init__(self, dim: int, *, dim_head: int = 64, heads: int = 8) -> None:
        super().__init__()
        value_checks.check_whole(dim=dim, dim_head=dim_head, heads=heads)
        value_checks.check_even(dim_head=dim_head)
        self.heads = heads
        self.norm = nn.RMSNorm(dim)
        self.rotary_embed = RotaryEmbedding(dim_head)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.query_norm, self.key_norm = nn.RMSNorm(dim_head), nn.RMSNorm(dim_head)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, tokens: Tensor, cache: FullCache | None = None, return_kv_cache: bool = False) -> Any:
        """tokens: (b n dim), a whole sequence or the next piece of one -> (b n dim), and if asked for the cache"""
        start = 0 if cache is None else cache.keys.shape[2]
        split = "b n (three h d) -> three b h n d"
        q, k, v = rearrange(self.to_qkv(self.norm(tokens)), split, three=3, h=self.heads)
        q, k = self.rotary_embed(self.query_norm(q), start), self.rotary_embed(self.key_norm(k), start)
        if cache is not None:
            k, v = torch.cat((cache.keys, k), dim=2), torch.cat((cache.values, v), dim=2)
        out = self.to_out(rearrange(attend_causally(q, k, v), "b h n d -> b n (h d)"))
        return (out, FullCache(k, v)) if return_kv_cache else out


class Block(nn.Module):
    def __init__(self, attention: nn.Module, ff: nn.Module) -> None:
        super().__init__()
        self.attention, self.ff = attention, ff

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        attended, cache = self.attention(x, cache=cache, return_kv_cache=True)
        x = x + attended
        return x + self.ff(x), cache


class AttentionTransformer(Pretrained, nn.Module):
    """A language model of blocks of attention and feed-forward networks.

    Args:
        num_tokens: size of the vocabulary
        dim, depth: features of a token, layers
        attention: implicit-mlp, nested or full
        heads, dim_head: of attention (dim_head of nested and full)
        mlp_hiddens: of implicit-mlp
        ff_mult: width of feed-forward networks
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        attention: Literal["implicit-mlp", "nested", "full"] = "implicit-mlp",
        heads: int = 8,
        dim_head: int = 64,
        mlp_hiddens: Sequence[int] = (64, 128, 64),
        ff_mult: float = 4,
    ) -> None:
        super().__init__()
        value_checks.check_whole(num_tokens=num_tokens, dim=dim, depth=depth)
        value_checks.check_positive(ff_mult=ff_mult)
        if attention not in KINDS:
            raise ValueError(f"attention must be one of {', '.join(KINDS)}, got {attention!r}")

        def attend() -> nn.Module:
            if attention == "implicit-mlp":
                return ImplicitMLPAttention(dim, tuple(mlp_hiddens), heads=heads)
            kind = NestedAttention if attention == "nested" else FullAttention
            return kind(dim, dim_head=dim_head, heads=heads)

        self.num_tokens = num_tokens
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(Block(attend(), feed_forward(dim, ff_mult)) for _ in range(depth))
        self.norm = nn.RMSNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def forward(
        self, ids: Tensor, return_loss: bool = False, cache: tuple[Any, ...] | None = None, return_cache: bool = False
    ) -> Any:
        """ids: (b n) -> logits (b n num_tokens), or the loss; with return_cache (that, what the next piece needs)"""
        tensor_checks.check_ids("ids", ids, self.num_tokens, 2 if return_loss else 1)
        if cache is not None and len(cache) != len(self.layers):
            raise ValueError(f"cache must be of this model's {len(self.layers)} layers, got {len(cache)}")
        x, kept = self.token_emb(ids[:, :-1] if return_loss else ids), []
        for i, layer in enumerate(self.layers):
            x, after = layer(x, None if cache is None else cache[i])
            kept.append(after)
        answer = self.to_logits(self.norm(x))
        if return_loss:
            answer = F.cross_entropy(answer.flatten(0, 1), ids[:, 1:].flatten().long())
        return (answer, tuple(kept)) if return_cache else answer
