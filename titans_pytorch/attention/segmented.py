"""Causal attention over windows of a sequence, whole or in pieces: who sees whom, and what is kept for later tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.attention.flex import create_mac_block_mask, flex_backend
from titans_pytorch.attention.masks import may_attend
from titans_pytorch.attention.rotary import RotaryEmbedding
from titans_pytorch.checks import tensor_checks, value_checks

ATTEND_OPTIONS = {"dropout": (int, float), "scale": (int, float, type(None)), "flash": (bool,)}
FlexFn = Callable[[Tensor, Tensor, Tensor], Tensor]


class KeyValueCache(NamedTuple):
    """What later tokens may still see: at most one window of keys (turned by their position) and values."""

    keys: Tensor  # (b h t d)
    values: Tensor  # (b h t d)
    num_seen: int  # position of the next token

    def map(self, fn: Callable[[Tensor], Tensor]) -> KeyValueCache:
        """fn of both tensors, whose first axis is the batch."""
        return KeyValueCache(fn(self.keys), fn(self.values), self.num_seen)


class AttnIntermediates(NamedTuple):
    value_residual: Tensor  # (b h n d)  the layer's own values, before any mixing
    cached_key_values: KeyValueCache


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """q: (b h i d), k: (b h j d), v: (b h j e), mask: (i j) of who sees whom, None: all -> (b h i e)"""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees all keys up to its own; queries are the last of the tokens that keys belong to.

    q: (b h i d), k: (b h j d), v: (b h j e), j >= i -> (b h i e)
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries == 1:
        return attend(q, k, v, None)
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    positions = torch.arange(num_keys, device=q.device)
    return attend(q, k, v, may_attend(positions[-num_queries:, None], positions, window=num_keys, sliding=True))


class SegmentedAttention(nn.Module):
    """Attention inside windows of `segment_len + num_longterm_mem_tokens` tokens, aligned or sliding.

        attention = SegmentedAttention(dim=512, segment_len=128)
        out, intermediates = attention(torch.randn(2, 1000, 512))           # (2 1000 512)
        more, _ = attention(torch.randn(2, 3, 512), cache=intermediates.cached_key_values)

    Args:
        dim: features of a token
        segment_len, num_longterm_mem_tokens: together the length of a window
        num_persist_mem_tokens: learned keys and values that every token sees
        dim_head, heads: width and number of heads
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
        self.scale, self.dropout = options.get("scale"), float(options.get("dropout", 0.0))
        self.use_flex_attn = use_flex_attn and self.scale is None and self.dropout == 0

        inner = dim_head * heads
        self.norm = nn.RMSNorm(dim)
        self.rotary_emb = RotaryEmbedding(dim_head)
        self.to_qkv = nn.Linear(dim, inner * 3, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        mix = (nn.Linear(dim, heads), Rearrange("b n h -> b h n 1"), nn.Sigmoid())
        self.to_learned_v_mix = nn.Sequential(*mix) if accept_value_residual else None
        self.persistent_memory = nn.Parameter(torch.zeros(2, heads, num_persist_mem_tokens, dim_head))

    def forward(
        self,
        seq: Tensor,
        value_residual: Tensor | None = None,
        flex_attn_fn: FlexFn | None = None,
        disable_flex_attn: bool = False,
        output_gating: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, AttnIntermediates]:
        """Attend, for a whole sequence or the next piece of one.

        Args:
            seq: (b n dim)
            value_residual: (b h n d), values of the same tokens in another layer
            flex_attn_fn: FlexAttention with a block mask for this length; None: made here
            disable_flex_attn: take the dense path although use_flex_attn is on
            output_gating: (b n dim), multiplies what comes out
            cache: what the piece before returned

        Returns: (b n dim), and (the layer's own values, the cache for the next piece)
        """
        self.check_input(seq, value_residual, output_gating, cache)
        normed, start = self.norm(seq), 0 if cache is None else cache.num_seen
        q, k, v = rearrange(self.to_qkv(normed), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        own_values = v
        if self.to_learned_v_mix is not None and value_residual is not None:
            v = v.lerp(value_residual, self.to_learned_v_mix(normed))
        q, k = self.rotary_emb(torch.stack((q, k)), start)

        if self.takes_flex(seq, flex_attn_fn, disable_flex_attn, cache):
            out = self.flexibly(q, k, v, flex_attn_fn)
            next_cache = self.kept(k, v, start + seq.shape[1])
        else:
            if cache is not None:
                k, v = torch.cat((cache.keys, k), dim=2), torch.cat((cache.values, v), dim=2)
            out = self.densely(q, k, v)
            next_cache = self.kept(k, v, start + seq.shape[1])
        out = self.to_out(rearrange(out, "b h n d -> b n (h d)"))
        out = out if output_gating is None else out * output_gating
        return out, AttnIntermediates(own_values, next_cache)

    # ---- the dense path

    def densely(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (b h n d), the last of the tokens of k, v: (b h t d), which begin where a window does -> (b h n d)

        First the queries that still see what was kept from before, then whole windows at once.
        """
        num_kept, window = k.shape[2] - q.shape[2], self.window
        lookback = window if self.sliding else 0
        num_first = min(q.shape[2], window if self.sliding else window - num_kept)
        stop = num_kept + num_first
        first = self.among(q[:, :, :num_first], k[:, :, :stop], v[:, :, :stop])
        if num_first == q.shape[2]:
            return first

        batch, rest = q.shape[0], q.shape[2] - num_first
        padding = (0, 0, 0, -rest % window)
        fold, unfold = "b h (w i) d -> (b w) h i d", "(b w) h i d -> b h (w i) d"
        queries = rearrange(F.pad(q[:, :, num_first:], padding), fold, i=window)
        keys, values = (
            rearrange(
                F.pad(x[:, :, stop - lookback :], padding).unfold(2, lookback + window, window),
                "b h w d j -> (b w) h j d",
            )
            for x in (k, v)
        )
        return torch.cat((first, rearrange(self.among(queries, keys, values), unfold, b=batch)[:, :, :rest]), dim=2)

    def among(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries that are the last of these keys' tokens, and the persistent memories.  -> as q"""
        num_queries, num_keys, persistent = q.shape[2], k.shape[2], self.persistent_memory.shape[2]
        positions = torch.arange(-persistent, num_keys, device=q.device)
        queries = torch.arange(num_keys - num_queries, num_keys, device=q.device)
        mask = may_attend(queries[:, None], positions, window=self.window, sliding=self.sliding)
        k, v = self.with_persistent(k, v)
        return attend(q, k, v, mask, scale=self.scale, dropout=self.dropout if self.training else 0.0)

    def with_persistent(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(b h t d) -> (b h P+t d)"""
        if self.persistent_memory.shape[2] == 0:  # it still takes part, as every parameter must have a gradient
            return k, v + self.persistent_memory.sum() if torch.is_grad_enabled() else v
        pk, pv = repeat(self.persistent_memory, "kv h p d -> kv b h p d", b=k.shape[0])
        return torch.cat((pk.to(k.dtype), k), dim=2), torch.cat((pv.to(v.dtype), v), dim=2)

    def kept(self, k: Tensor, v: Tensor, num_seen: int) -> KeyValueCache:
        """What the next token may see: the window before it, or its aligned window as far as that is filled."""
        most = self.window if self.sliding else num_seen % self.window
        start = max(k.shape[2] - most, 0)
        keys, values = (x if start == 0 else x[:, :, start:].clone() for x in (k, v))
        return KeyValueCache(keys, values, num_seen)

    # ---- FlexAttention

    def takes_flex(self, seq: Tensor, flex_attn_fn: FlexFn | None, is_disabled: bool, cache: Any) -> bool:
        if is_disabled or cache is not None:
            return False
        return flex_attn_fn is not None or (self.use_flex_attn and seq.is_cuda)

    def flexibly(self, q: Tensor, k: Tensor, v: Tensor, flex_attn_fn: FlexFn | None) -> Tensor:
        if flex_attn_fn is None:
            persistent = self.persistent_memory.shape[2]
            block_mask = create_mac_block_mask(q.shape[2], self.window, persistent, self.sliding, device=q.device)
            flex_attn_fn = flex_backend(block_mask)
        return flex_attn_fn(q, *self.with_persistent(k, v))

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
