"""Queries projected on keys (TNT, arXiv 2511.07343): a memory is asked within what it was told.

    q'_t = sum of (k k^T / |k|^2) q_t over the keys k of t's span, t's own included        eqs. (7), (15)

A span is the chunk of a token, as the paper's equations have it, or its shard, as its appendix C has it. Keys are those
that will be stored: what is masked is not among them. It takes keys where tokens are read, before their chunk is
complete; so they are made apart from those that are written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.precision import full_precision
from titans_pytorch.memory.convolution import projected
from titans_pytorch.memory.pieces import StoredTokens
from titans_pytorch.memory.projections import Projections
from titans_pytorch.memory_models import l2_normalised
from titans_pytorch.public_names import register_state

PIECE = 64
"""Tokens of a shard that are compared with each other; those before them are there as a sum"""


@register_state
class KeySpan(NamedTuple):
    """The keys of a span so far, and what their convolution still sees."""

    total: Tensor  # (r d d)  the sum of k k^T / |k|^2
    tail: Tensor | None  # (b size-1 channels); None without convolution


class Told(NamedTuple):
    """What a memory is told at the tokens that are read."""

    tokens: StoredTokens
    before: KeySpan
    first: int  # the position of the first token, from 0
    chunk: int | None  # tokens of a span; None: all of them are of one


def on_keys(layers: Projections, queries: Tensor, told: Told) -> tuple[Tensor, KeySpan]:
    """Queries on the keys of their spans.  queries: (r t d) -> (r t d), the span of the next token"""
    with full_precision(queries):
        keys, tail = keys_of(layers, told, queries)
        poison = (keys.detach() * 0).sum(dim=(2, 3))  # 0 * NaN is NaN: tokens before one that is not finite stay so
        directions = l2_normalised(keys.nan_to_num(0.0, 0.0, 0.0))
        found, total = through(queries, directions, told)
        found = found + poison.cumsum(dim=1).unsqueeze(-1)
        return found, KeySpan(total + poison.sum(dim=1)[:, None, None], tail)


def keys_of(layers: Projections, told: Told, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keys as they will be written, zeros where nothing is.  -> (r t u d), the next tail of their convolution"""
    tokens, is_stored, u = told.tokens.keys, told.tokens.is_stored, layers.num_kv_per_token
    found, tail = projected(layers.to_keys, layers.normed(tokens, is_stored), told.before.tail)
    keys = layers.k_norm(layers.key_powers(rearrange(found, "b t (h u d) -> b h (t u) d", h=layers.heads, u=u)))
    keys = rearrange(keys, "b h (t u) d -> (b h) t u d", u=u).to(like.dtype)
    if is_stored is None:
        return keys, tail
    return torch.where(repeat(is_stored, "b t -> (b h) t 1 1", h=layers.heads), keys, 0.0), tail


def through(queries: Tensor, keys: Tensor, told: Told) -> tuple[Tensor, Tensor]:
    """The sums of k (k q), and that of k k^T after the last token.  queries: (r t d), keys: (r t u d), of length 1

    Tokens are compared with those before them in their piece; what came before that is a sum.
    """
    total, count = told.before.total, queries.shape[1]
    size = min(PIECE, count) if told.chunk is None else told.chunk
    front = 0 if told.chunk is None else told.first % told.chunk
    filling = (front, -(front + count) % size)
    asked = F.pad(queries, (0, 0, *filling)).unflatten(1, (-1, size))
    written = F.pad(keys, (0, 0, 0, 0, *filling)).unflatten(1, (-1, size))
    seen = torch.ones(size, size, dtype=torch.bool, device=keys.device).tril().repeat_interleave(keys.shape[2], dim=1)
    written = written.flatten(2, 3)
    sums = written.mT @ written
    found = (asked @ written.mT).where(seen, 0.0) @ written
    if told.chunk is None:
        before = torch.cat((total.unsqueeze(1), sums), dim=1).cumsum(dim=1)
        found, after = found + asked @ before[:, :-1], before[:, -1]
    else:  # a chunk may have begun earlier, and the last may be incomplete
        found = torch.cat((found[:, :1] + asked[:, :1] @ total.unsqueeze(1), found[:, 1:]), dim=1)
        after = sums[:, -1] + total if sums.shape[1] == 1 else sums[:, -1]
        after = after if filling[1] else torch.zeros_like(after)
    return found.flatten(1, 2).narrow(1, front, count), after
