"""Causal attention over windows of a sequence, whole or in pieces: who sees whom, and what is kept for later tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from titans_pytorch.attention.flex import create_mac_block_mask, flex_backend
from titans_pytorch.attention.kept import by_itself
from titans_pytorch.attention.key_values import KeyValueCache, KeyValues, joined
from titans_pytorch.attention.rotary import RotaryEmbedding, Turns, turned
from titans_pytorch.attention.windowed import Windows, attend_in_windows
from titans_pytorch.checks import tensor_checks, value_checks

ATTEND_OPTIONS = {"dropout": (int, float), "scale": (int, float, type(None)), "flash": (bool,)}
FlexFn = Callable[[Tensor, Tensor, Tensor], Tensor]


class AttnIntermediates(NamedTuple):
    value_residual: Tensor  # (b h n d)  the layer's own values, before any mixing
    cached_key_values: KeyValueCache


class SegmentedAttention(nn.Module):
    """Attention inside windows of `segment_len + num_longterm_mem_tokens` tokens, aligned or sliding.

        attention = SegmentedAttention(dim=512, segment_len=128)
        out, intermediates = attention(torch.randn(2, 1000, 512))           # (2 1000 512)
        more, _ = attention(torch.randn(2, 3, 512), cache=intermediates.cached_key_values)

    Args:
        dim: features of a token
        segment_len: tokens of a window, without long-term tokens
        num_longterm_mem_tokens: long-term tokens of a window
        num_persist_mem_tokens: learned keys and values that every token sees
        dim_head: width of a head
        heads: number of heads
        sliding: every token sees the window before it, not only what is in its own aligned window
        accept_value_residual: mix in the values of another layer, by a learned share of each token and head
        attend_kwargs: of the attention itself: dropout, scale, flash (the fastest exact kernel is taken anyway)
        use_flex_attn: use FlexAttention for whole sequences on CUDA
    """

    def __init__(
        self,
        dim: int,
        segment_len: int,
        num_persist_mem_tokens: int = 0,
        num_longterm_mem_tokens: int = 0,
        dim_head: int = 64,
        heads: int = 8,
        sliding: bool = False,
        accept_value_residual: bool = False,
        attend_kwargs: Mapping[str, Any] | None = None,
        use_flex_attn: bool = False,
    ) -> None:
        super().__init__()
        value_checks.check_whole(dim=dim, segment_len=segment_len, dim_head=dim_head, heads=heads)
        value_checks.check_counts(
            num_persist_mem_tokens=num_persist_mem_tokens, num_longterm_mem_tokens=num_longterm_mem_tokens
        )
        value_checks.check_even(dim_head=dim_head)
        value_checks.check_options("attend_kwargs", attend_kwargs or {}, ATTEND_OPTIONS)
        options = dict(attend_kwargs or {})
        self.dim, self.heads, self.sliding = dim, heads, sliding
        self.window = segment_len + num_longterm_mem_tokens
        self.windows = Windows(self.window, lookback=self.window if sliding else None)
        self.scale, self.dropout = options.get("scale"), float(options.get("dropout", 0.0))
        self.use_flex_attn = use_flex_attn and self.scale is None and self.dropout == 0

        inner = dim_head * heads
        self.norm = nn.RMSNorm(dim)
        self.rotary_emb = RotaryEmbedding(dim_head)
        self.to_qkv = nn.Linear(dim, inner * 3, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.to_learned_v_mix = None
        if accept_value_residual:
            self.to_learned_v_mix = nn.Sequential(nn.Linear(dim, heads), Rearrange("b n h -> b h n 1"), nn.Sigmoid())
        self.persistent_memory = nn.Parameter(torch.empty(2, heads, num_persist_mem_tokens, dim_head))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Only what it owns itself: persistent keys and values begin as nothing."""
        nn.init.zeros_(self.persistent_memory)

    def forward(
        self,
        seq: Tensor,
        value_residual: Tensor | None = None,
        flex_attn_fn: FlexFn | None = None,
        disable_flex_attn: bool = False,
        output_gating: Tensor | None = None,
        cache: KeyValueCache | None = None,
        turns: Turns | None = None,
    ) -> tuple[Tensor, AttnIntermediates]:
        """Attend, for a whole sequence or the next piece of one.

        Args:
            seq: (b n dim)
            value_residual: (b h n d), values of the same tokens in another layer
            flex_attn_fn: FlexAttention with a block mask for this length; None: made here
            disable_flex_attn: take the dense path although use_flex_attn is on
            output_gating: (b n dim), multiplies what comes out
            cache: what the piece before returned
            turns: those of its positions (`rotary_emb.turns`), if they have been computed before

        Returns: (b n dim), and (the layer's own values, the cache for the next piece)
        """
        self.check_input(seq, value_residual, output_gating, cache)
        start = 0 if cache is None else cache.num_seen
        turns = self.rotary_emb.turns(start, seq.shape[1], seq) if turns is None else turns
        q, (k, v), own_values = self.projected(seq, value_residual, turns)

        if self.persistent_memory.shape[2] == 0 and torch.is_grad_enabled():  # every parameter must have a gradient
            v = v + self.persistent_memory.sum()
        tokens = KeyValues(k, v)
        if self.takes_flex(seq, flex_attn_fn, disable_flex_attn, cache):
            out = self.by_flex_attention(q, tokens, flex_attn_fn)
        else:
            tokens = tokens if cache is None else joined(cache.key_values, tokens)
            out = self.by_windows(q, tokens)
        next_cache = self.kept(tokens, start + seq.shape[1])
        return self.answer(out, output_gating), AttnIntermediates(own_values, next_cache)

    def projected(self, seq: Tensor, value_residual: Tensor | None, turns: Turns) -> tuple[Tensor, KeyValues, Tensor]:
        """Queries, keys and values of tokens, turned and mixed, and the layer's own values.  (b h n d) each"""
        normed = self.norm(seq)
        split = rearrange(self.to_qkv(normed), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        queries_keys, (own_values,) = split.split((2, 1))
        v = own_values = by_itself(own_values)
        if self.to_learned_v_mix is not None and value_residual is not None:
            v = v.lerp(value_residual, self.to_learned_v_mix(normed))
        q, k = turned(queries_keys, *turns)
        return q, KeyValues(k, v), own_values

    def answer(self, attended: Tensor, gating: Tensor | None) -> Tensor:
        """What comes out of attention, gated.  (b h n d) -> (b n dim)"""
        out: Tensor = self.to_out(rearrange(attended, "b h n d -> b n (h d)"))
        return out if gating is None else out * gating

    # ---- the dense path

    def by_windows(self, q: Tensor, tokens: KeyValues) -> Tensor:
        """Attention of the last n of the tokens, which begin where a window does.  q: (b h n d) -> (b h n d)"""
        dropout = self.dropout if self.training else 0.0
        return attend_in_windows(q, tokens, self.prefix(tokens), self.windows, scale=self.scale, dropout=dropout)

    def prefix(self, tokens: KeyValues) -> KeyValues | None:
        """The persistent memories as keys and values that all sequences share, in the dtypes of tokens.  (1 h p d)"""
        if self.persistent_memory.shape[2] == 0:
            return None
        keys, values = self.persistent_memory.unsqueeze(1)
        return KeyValues(keys.to(tokens.keys.dtype), values.to(tokens.values.dtype))

    def kept(self, tokens: KeyValues, num_seen: int) -> KeyValueCache:
        """What the next token may see: the window before it, or its aligned window as far as that is filled."""
        return KeyValueCache(*tokens.last(self.window if self.sliding else num_seen % self.window), num_seen)

    # ---- FlexAttention

    def takes_flex(self, seq: Tensor, flex_attn_fn: FlexFn | None, is_disabled: bool, cache: Any) -> bool:
        if is_disabled or cache is not None:
            return False
        return flex_attn_fn is not None or (self.use_flex_attn and seq.is_cuda)

    def by_flex_attention(self, q: Tensor, tokens: KeyValues, flex_attn_fn: FlexFn | None) -> Tensor:
        """Attention of all tokens of a sequence.  q: (b h n d) -> (b h n d)"""
        if flex_attn_fn is None:
            persistent = self.persistent_memory.shape[2]
            block_mask = create_mac_block_mask(q.shape[2], self.window, persistent, self.sliding, device=q.device)
            flex_attn_fn = flex_backend(block_mask)
        prefix = self.prefix(tokens)
        if prefix is not None:
            tokens = joined(prefix.map(lambda x: x.expand(q.shape[0], -1, -1, -1)), tokens)
        return flex_attn_fn(q, *tokens)

    # ---- what comes in

    def check_input(
        self, seq: Tensor, value_residual: Tensor | None, output_gating: Tensor | None, cache: KeyValueCache | None
    ) -> None:
        tensor_checks.check_tokens("seq", seq, dim=self.dim, dtype=self.to_qkv.weight.dtype)
        batch, count, _ = seq.shape
        d = self.persistent_memory.shape[-1]
        accepts = self.to_learned_v_mix is not None
        if accepts != (value_residual is not None):
            got = "None" if value_residual is None else "one"
            raise ValueError(f"value_residual goes with accept_value_residual=True, got {got} with {accepts}")
        if value_residual is not None:
            tensor_checks.check_shape("value_residual", value_residual, (batch, self.heads, count, d))
        if output_gating is not None:
            tensor_checks.check_shape("output_gating", output_gating, (batch, count, self.dim))
        if cache is None:
            return
        if not isinstance(cache, KeyValueCache):
            raise TypeError(f"cache must be the cached_key_values of an earlier call, got {type(cache).__name__}")
        kept = min(cache.num_seen, self.window) if self.sliding else cache.num_seen % self.window
        for name, x in (("cache.keys", cache.keys), ("cache.values", cache.values)):
            tensor_checks.check_shape(name, x, (batch, self.heads, kept, d))
