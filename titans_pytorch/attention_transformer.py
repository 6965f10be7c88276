"""A small transformer of one kind of attention, to try the kinds that this library has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from einops import rearrange
from torch import Tensor, nn

from titans_pytorch.attention.key_values import KeyValues, joined
from titans_pytorch.attention.rotary import RotaryEmbedding
from titans_pytorch.attention.windowed import attend_causally
from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.checks import value_checks
from titans_pytorch.implicit_mlp_attention import ImplicitMLPAttention, ImplicitMLPCache
from titans_pytorch.layers.feed_forward import feed_forward, hidden_width
from titans_pytorch.nested_attention import NestedAttention, NestedCache
from titans_pytorch.pretrained import Pretrained

BlockCache = ImplicitMLPCache | NestedCache | KeyValues
BlockCaches = tuple[BlockCache, ...]
KINDS = ("implicit-mlp", "nested", "full")


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

    @overload
    def forward(
        self, tokens: Tensor, cache: KeyValues | None = ..., return_kv_cache: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self, tokens: Tensor, cache: KeyValues | None = ..., *, return_kv_cache: Literal[True]
    ) -> tuple[Tensor, KeyValues]: ...

    @overload
    def forward(
        self, tokens: Tensor, cache: KeyValues | None = ..., return_kv_cache: bool = ...
    ) -> Tensor | tuple[Tensor, KeyValues]: ...

    def forward(
        self, tokens: Tensor, cache: KeyValues | None = None, return_kv_cache: bool = False
    ) -> Tensor | tuple[Tensor, KeyValues]:
        """tokens: (b n dim), a whole sequence or the next piece of one -> (b n dim), and if asked for the cache"""
        start = 0 if cache is None else cache.keys.shape[2]
        split = "b n (three h d) -> three b h n d"
        q, k, v = rearrange(self.to_qkv(self.norm(tokens)), split, three=3, h=self.heads)
        q, k = self.rotary_embed(self.query_norm(q), start), self.rotary_embed(self.key_norm(k), start)
        tokens_so_far = joined(cache, KeyValues(k, v))
        out = self.to_out(rearrange(attend_causally(q, *tokens_so_far), "b h n d -> b n (h d)"))
        return (out, tokens_so_far) if return_kv_cache else out


class AttentionBlock(nn.Module):
    """Attention and a feed-forward network, each with a residual connection."""

    def __init__(self, attention: nn.Module, ff: nn.Module) -> None:
        super().__init__()
        self.attention, self.ff = attention, ff

    def forward(self, x: Tensor, cache: BlockCache | None = None) -> tuple[Tensor, BlockCache]:
        attended, cache = self.attention(x, cache=cache, return_kv_cache=True)
        x = x + attended
        return x + self.ff(x), cache


class AttentionTransformer(Pretrained, CausalLM[BlockCaches]):
    """A language model of blocks of attention and feed-forward networks.

    Args:
        num_tokens: size of the vocabulary
        dim: features of a token
        depth: layers
        attention: implicit-mlp, nested or full
        heads: of attention
        dim_head: of nested and full attention
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
        width = hidden_width(dim, ff_mult)
        self.layers = nn.ModuleList(AttentionBlock(attend(), feed_forward(dim, width)) for _ in range(depth))
        self.norm = nn.RMSNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    @overload
    def forward(
        self,
        ids: Tensor,
        return_loss: bool = ...,
        cache: BlockCaches | None = ...,
        return_cache: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self, ids: Tensor, return_loss: bool = ..., cache: BlockCaches | None = ..., *, return_cache: Literal[True]
    ) -> tuple[Tensor, BlockCaches]: ...

    @overload
    def forward(
        self, ids: Tensor, return_loss: bool = ..., cache: BlockCaches | None = ..., return_cache: bool = ...
    ) -> Tensor | tuple[Tensor, BlockCaches]: ...

    def forward(
        self, ids: Tensor, return_loss: bool = False, cache: BlockCaches | None = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, BlockCaches]:
        """ids: (b n) -> logits (b n num_tokens), or the loss; with return_cache (that, what the next piece needs)"""
        answer, after = (self.loss_and_state if return_loss else self.logits_and_state)(ids, cache)
        return (answer, after) if return_cache else answer

    def hidden_states(self, ids: Tensor, state: BlockCaches | None = None) -> tuple[Tensor, BlockCaches]:
        """All layers.  ids: (b n) -> (b n dim) before the last norm, and what the next piece needs"""
        return self.hidden_of(self.token_emb(ids), state)

    def hidden_of(self, x: Tensor, state: BlockCaches | None = None, **reading: Any) -> tuple[Tensor, BlockCaches]:
        """`hidden_states` of tokens that are embedded.  x: (b n dim)"""
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"cache must be of this model's {len(self.layers)} layers, got {len(state)}")
        kept = []
        for i, layer in enumerate(self.layers):
            x, after = layer(x, None if state is None else state[i])
            kept.append(after)
        return x, tuple(kept)

    def logits(self, hidden: Tensor) -> Tensor:
        """(... dim), before the last norm -> (... num_tokens)"""
        return self.to_logits(self.norm(hidden))
