"""Softmax attention of the Titans models: projections and heads, and the sliding window with a prefix."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.attention.key_values import KeyValues
from titans_pytorch.attention.rotary import RotaryEmbedding, Turns, turned
from titans_pytorch.attention.windowed import Windows, attend_in_windows


class Attention(nn.Module):
    """Projections and heads around softmax attention with rotary positions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_queries = nn.Linear(dim, dim, bias=False)
        self.to_keys_values = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.rotary_emb = RotaryEmbedding(dim // heads)

    def turns(self, start: int, count: int, like: Tensor) -> Turns:
        """Cosine and sine for the positions start, start + 1, ... of tokens like these."""
        return self.rotary_emb.turns(start, count, like)

    def queries(self, x: Tensor) -> Tensor:
        """(b n dim) -> (b h n d), not turned"""
        return rearrange(self.to_queries(x), "b n (h d) -> b h n d", h=self.heads)

    def keys_values(self, x: Tensor, turns: Turns | None) -> KeyValues:
        """x: (b n dim); turns: None for tokens that have no position"""
        keys, values = rearrange(self.to_keys_values(x), "b n (kv h d) -> kv b h n d", kv=2, h=self.heads)
        return KeyValues(keys if turns is None else turned(keys, *turns), values)

    def out(self, attended: Tensor) -> Tensor:
        """(b h n d) -> (b n dim)"""
        return self.to_out(rearrange(attended, "b h n d -> b n (h d)"))


def with_unplaced(
    placed: Tensor, unplaced: Tensor, keys: KeyValues, prefix: KeyValues
) -> tuple[Tensor, KeyValues, KeyValues]:
    """Queries and keys of twice the width: tokens are compared where they are, the prefix without a position.

    A prefix at a fixed place would be ever farther away. q k is placed·k for tokens, unplaced·k for the prefix.
    """
    width = unplaced.shape[-1]
    tokens = KeyValues(F.pad(keys.keys, (0, width)), keys.values)
    return torch.cat((placed, unplaced), dim=-1), tokens, KeyValues(F.pad(prefix.keys, (width, 0)), prefix.values)


def attend_sliding(q: Tensor, turns: Turns, tokens: KeyValues, prefix: KeyValues | None, window: int) -> Tensor:
    """Every query sees the prefix and the last `window` tokens, itself included (eqs. 27, 31).

    q: (b h n d), not turned, of the last n of the tokens, before which are at most window - 1 others -> (b h n d)
    """
    placed, windows = turned(q, *turns), Windows(window, lookback=window - 1)
    if prefix is None:
        return attend_in_windows(placed, tokens, prefix, windows)
    if q.is_cpu:  # which has no kernel for values of another width, and pays for every zero
        return attend_in_windows(placed, tokens, prefix, windows, unplaced=q)
    wide, tokens, prefix = with_unplaced(placed, q, tokens, prefix)
    return attend_in_windows(wide, tokens, prefix, windows, scale=q.shape[-1] ** -0.5)
