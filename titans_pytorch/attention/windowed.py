"""Softmax attention over windows of a sequence: every query sees a prefix and the tokens near before it.

Queries are always the last of the tokens whose keys are given, so a piece of a sequence comes with what earlier pieces
have kept. No more is computed than two windows of keys per query, however long the sequence is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.attention.key_values import KeyValues, joined
from titans_pytorch.attention.masks import window_mask
from titans_pytorch.fast_weights.precision import at_least_float32, full_precision


class Windows(NamedTuple):
    """Which tokens a query sees: those of its own aligned window, or a number of tokens before it, and itself."""

    length: int  # tokens of a window, that are worked on at once
    lookback: int | None = None  # tokens before a query that it sees, a window at most; None: its aligned window

    @property
    def num_kept(self) -> int:
        """How many tokens before a window its queries may see."""
        return 0 if self.lookback is None else self.lookback

    def num_first(self, num_queries: int, num_before: int) -> int:
        """How many of the queries still see tokens that were kept from before, or share a window with them."""
        return min(num_queries, self.length - num_before if self.lookback is None else self.length)

    def mask(self, num_queries: int, num_tokens: int, num_persistent: int, device: torch.device) -> Tensor | None:
        """Who sees whom (i j); None for a single query, which sees all that was kept for it."""
        if num_queries == 1:
            return None
        if self.lookback is None:
            return window_mask(num_queries, num_tokens, num_persistent, self.length, False, device)
        return window_mask(num_queries, num_tokens, num_persistent, self.lookback, True, device)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """q: (b h i d), k: (b h j d), v: (b h j e), mask: (i j) of who sees whom, None: all -> (b h i e)"""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


def attend_apart(
    q: Tensor,
    unplaced: Tensor,
    tokens: KeyValues,
    prefix: KeyValues,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`attend` where tokens are compared with q, and a prefix with other queries, without wider queries and keys.

    All in at least float32, as `attend` does it on a CPU.
    q, unplaced: (b h i d), tokens: (b h t d), prefix: (b h p d), mask: (i p+t) of who sees whom, None: all -> (b h i d)
    """
    dtype, scale = at_least_float32(q.dtype), q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q):
        before, near = (each.map(lambda x: x.to(dtype)) for each in (prefix, tokens))
        scores = torch.cat((unplaced.to(dtype) @ before.keys.mT, q.to(dtype) @ near.keys.mT), dim=-1) * scale
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        weights = F.dropout(scores.softmax(dim=-1), dropout) if dropout else scores.softmax(dim=-1)
        of_before, of_near = weights.split((before.length, near.length), dim=-1)
        return (of_near @ near.values + of_before @ before.values).to(q.dtype)


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees all keys up to its own; queries are the last of the tokens that keys belong to.

    q: (b h i d), k: (b h j d), v: (b h j e), j >= i -> (b h i e)
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries == 1:
        return attend(q, k, v, None)
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attend(q, k, v, window_mask(num_queries, num_keys, 0, num_keys, True, q.device))


def attend_in_windows(
    q: Tensor,
    tokens: KeyValues,
    prefix: KeyValues | None,
    windows: Windows,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    unplaced: Tensor | None = None,
) -> Tensor:
    """Attention of the last n of the tokens to the prefix, which all see, and to the windows before them.

    First the queries that see what was kept from before, then all whole windows at once, each with as many tokens
    before it as its queries see.

    q: (b h n d), tokens: (b h t d), which begin where a window does or hold what the first query sees;
    prefix: (b or 1, h p d); unplaced: (b h n d), with which the prefix is compared instead -> (b h n e)
    """
    batch, count, num_before = q.shape[0], q.shape[2], tokens.length - q.shape[2]

    def attended(tokens: KeyValues, num_windows: int, queries: Tensor, unplaced: Tensor | None = None) -> Tensor:
        before = None if prefix is None else for_each_window(prefix, batch, num_windows)
        num_prefix = 0 if before is None else before.length
        mask = windows.mask(queries.shape[2], tokens.length, num_prefix, queries.device)
        if before is not None and unplaced is not None:
            return attend_apart(queries, unplaced, tokens, before, mask, scale=scale, dropout=dropout)
        return attend(queries, *joined(before, tokens), mask, scale=scale, dropout=dropout)

    asking = [q] if unplaced is None else [q, unplaced]
    num_first = windows.num_first(count, num_before)
    stop = num_before + num_first
    first = attended(tokens.at(0, stop), 1, *(x[:, :, :num_first] for x in asking))
    if num_first == count:
        return first

    length, rest, lookback = windows.length, count - num_first, windows.num_kept
    padding = (0, 0, 0, -rest % length)

    def by_window(x: Tensor) -> Tensor:
        """(b h w·i d) -> (b w h i d)"""
        return x.unflatten(2, (-1, length)).transpose(1, 2)

    def overlapping(x: Tensor) -> Tensor:
        stretch = F.pad(x[:, :, stop - lookback :], padding)
        own = by_window(stretch[:, :, lookback:])
        if lookback > 0:
            before = by_window(stretch[:, :, : stretch.shape[2] - lookback])[:, :, :, :lookback]
            own = torch.cat((before, own), dim=3)
        return own.flatten(0, 1)

    later_asking = [by_window(F.pad(x[:, :, num_first:], padding)).flatten(0, 1) for x in asking]
    later = attended(tokens.map(overlapping), len(later_asking[0]) // batch, *later_asking)
    return torch.cat((first, rearrange(later, "(b w) h i d -> b h (w i) d", b=batch)[:, :, :rest]), dim=2)


def for_each_window(prefix: KeyValues, batch: int, num_windows: int) -> KeyValues:
    """The prefix of every sequence once for each of its windows.  (b or 1, h p d) -> (b·w h p d)"""
    if num_windows == 1 and prefix.keys.shape[0] == batch:  # as when decoding: nothing to do
        return prefix
    return prefix.map(lambda x: x.unsqueeze(1).expand(batch, num_windows, -1, -1, -1).flatten(0, 1))
