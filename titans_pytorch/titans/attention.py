"""Softmax attention of the Titans models, over what is handed to it: who sees whom is decided in `titans.masks`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.attention.rotary import RotaryEmbedding, turned
from titans_pytorch.attention.segmented import attend
from titans_pytorch.titans.masks import sliding_mask

Turns = tuple[Tensor, Tensor]  # cosine and sine of each position, (t pairs)


class KeyValues(NamedTuple):
    """Keys (turned by their position) and values of some tokens.  (b h t d) each"""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def at(self, start: int, stop: int) -> KeyValues:
        return KeyValues(self.keys[:, :, start:stop], self.values[:, :, start:stop])

    def last(self, count: int) -> KeyValues:
        """At most so many, as a copy that does not keep the others alive."""
        start = self.length - count
        return self if start <= 0 else KeyValues(*(x[:, :, start:].clone() for x in self))

    def map(self, fn: Callable[[Tensor], Tensor]) -> KeyValues:
        """fn of both tensors, whose first axis is the batch."""
        return KeyValues(fn(self.keys), fn(self.values))


def joined(*parts: KeyValues | None) -> KeyValues:
    """One after another; None is nothing."""
    given = [part for part in parts if part is not None]
    if len(given) == 1:
        return given[0]
    return KeyValues(torch.cat([part.keys for part in given], dim=2), torch.cat([part.values for part in given], dim=2))


class Attention(nn.Module):
    """Projections and heads around softmax attention with rotary positions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_queries = nn.Linear(dim, dim, bias=False)
        self.to_keys_values = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.rotary_emb = RotaryEmbedding(dim // heads)

    def turns(self, start: int, count: int) -> Turns:
        """Of the positions start, start + 1, ..."""
        return self.rotary_emb.turns(start, count)

    def queries(self, x: Tensor) -> Tensor:
        """(b n dim) -> (b h n d), not turned"""
        return rearrange(self.to_queries(x), "b n (h d) -> b h n d", h=self.heads)

    def keys_values(self, x: Tensor, turns: Turns | None) -> KeyValues:
        """x: (b n dim); turns: None for tokens that have no position"""
        keys, values = rearrange(self.to_keys_values(x), "b n (kv h d) -> kv b h n d", kv=2, h=self.heads)
        return KeyValues(keys if turns is None else turned(keys, keys.shape[-1], *turns), values)

    def out(self, attended: Tensor) -> Tensor:
        """(b h n d) -> (b n dim)"""
        return self.to_out(rearrange(attended, "b h n d -> b n (h d)"))


def beside(turned: Tensor, still: Tensor, keys: KeyValues, prefix: KeyValues) -> tuple[Tensor, KeyValues, KeyValues]:
    """Queries and keys of twice the width: tokens are compared where they are, the prefix without a position.

    A prefix at a fixed place would be ever farther away. q k is turned·k for tokens, still·k for the prefix.
    """
    width = still.shape[-1]
    tokens = KeyValues(F.pad(keys.keys, (0, width)), keys.values)
    return torch.cat((turned, still), dim=-1), tokens, KeyValues(F.pad(prefix.keys, (width, 0)), prefix.values)


def attend_sliding(q: Tensor, turns: Turns, tokens: KeyValues, prefix: KeyValues | None, window: int) -> Tensor:
    """Every query sees the prefix and the last `window` tokens, itself included.

    q: (b h n d), not turned, of the last n of the tokens, before which there are at most window - 1 others. First the
    queries that see those; then blocks of a window, each with the window before it, all at once.  -> (b h n d)
    """
    count, num_before, scale = q.shape[2], tokens.length - q.shape[2], q.shape[-1] ** -0.5
    q, still = turned(q, q.shape[-1], *turns), q
    if prefix is not None:
        q, tokens, prefix = beside(q, still, tokens, prefix)

    def masked(queries: Tensor, tokens: KeyValues, prefix: KeyValues | None) -> Tensor:
        num_persistent = 0 if prefix is None else prefix.length
        mask = sliding_mask(queries.shape[2], tokens.length, num_persistent, window, queries.device)
        return attend(queries, *joined(prefix, tokens), None if queries.shape[2] == 1 else mask, scale=scale)

    num_first = min(count, window)
    first = masked(q[:, :, :num_first], tokens.at(0, num_before + num_first), prefix)
    if num_first == count:
        return first

    batch, rest, start = q.shape[0], count - num_first, num_before + num_first - window + 1
    padding = (0, 0, 0, -rest % window)
    queries = rearrange(F.pad(q[:, :, num_first:], padding), "b h (w i) d -> (b w) h i d", i=window)

    def blocks(x: Tensor) -> Tensor:
        return rearrange(F.pad(x[:, :, start:], padding).unfold(2, 2 * window - 1, window), "b h w d j -> (b w) h j d")

    num_blocks = len(queries) // batch
    if prefix is not None:
        prefix = prefix.map(lambda x: x.repeat_interleave(num_blocks, dim=0))
    later = rearrange(masked(queries, tokens.map(blocks), prefix), "(b w) h i d -> b h (w i) d", b=batch)
    return torch.cat((first, later[:, :, :rest]), dim=2)
